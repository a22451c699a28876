"""Whole solves of `bench.gpu_suite`: the same bits each time, and beside the strong baseline."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench import baseline
from bench.gpu_lines import Line, Suite
from bench.gpu_problems import made_graph, made_problem
from bench.gpu_timing import Stopwatch, setting
from transclip_fast.data.feature_rows import Rows
from transclip_fast.ops import backend_class
from transclip_fast.solver import loop, state
from transclip_fast.solver.layout import Layout
from transclip_fast.solver.parameters import Parameters
from transclip_fast.solver.prior import LinearPrior
from transclip_fast.solver.problem import Inputs, Settings
from transclip_fast.types import NeighborGraph, Truncation

STREAMED = 2_000_000_000  # entries of features, at most, that are also read from host memory
IN_FLOAT32 = 2e15  # operations of all scores, at most, of a solve in float32 beside it
WIDTH = 16
STEPS = Parameters()  # 10 x 5


class Problem:
    """A made problem of N rows, K classes and d dimensions, its graph, and what solves it."""

    def __init__(self, n: int, k: int, d: int, device: str) -> None:
        self.shape, self.device = (n, k, d), device
        self.features, self.prototypes = made_problem(n, k, d, device)
        self.graph = made_graph(n, k)

    def labels(self, features: torch.Tensor | Rows) -> torch.Tensor:
        """Labels of a solve on the kernels."""
        width, device = min(WIDTH, self.shape[1]), torch.device(self.device)
        prior = LinearPrior.from_prototypes(self.prototypes, 100.0)
        rows = features if isinstance(features, Rows) else Rows(features, device=device)
        layout, truncation = Layout(width, held=True), Truncation(width, width)
        settings = Settings(STEPS, device, 1.0, layout, truncation, "triton")
        solution = loop.solve(Inputs(rows, prior, prior), self.graph, settings)
        return solution.assignments.best()[0]

    def rival(self, compiled: bool) -> torch.Tensor:
        """Labels of the strong baseline."""
        pair = lists_on(self.graph, self.device)
        return baseline.solve(self.features, self.prototypes, pair, compiled=compiled).argmax(1)


def lists_on(graph: NeighborGraph, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and similarities of a graph as tensors."""
    lists = torch.from_numpy(graph.neighbors), torch.from_numpy(graph.similarities)
    return lists[0].to(device), lists[1].to(device)


def solve(suite: Suite, n: int, k: int, d: int) -> None:
    """A whole solve, 10 x 5, graph given, beside the baseline and its compiled form."""
    name = f"solve {n} x {k} x {d}"
    problem = Problem(n, k, d, suite.gpu.device)
    half = problem.features.half()
    arms: dict[str, Callable[[], torch.Tensor]] = {"float16": partial(problem.labels, half)}
    if 22.0 * n * k * d <= IN_FLOAT32:
        arms["float32"] = partial(problem.labels, problem.features)
        arms["baseline"] = partial(problem.rival, False)
        arms["baseline, torch.compile"] = partial(problem.rival, True)
    if n * d <= STREAMED:
        rows = Rows(problem.features.cpu(), device=suite.gpu.device, held=False).half()
        arms["float16, streamed"] = partial(problem.labels, rows)
    first: torch.Tensor | None = None
    for arm, run in arms.items():
        taken = suite.attempt(f"{name}, {arm}", partial(suite.gpu.seconds, run))
        if taken is None:
            continue
        labels, seconds, peak = taken
        first = labels if first is None else first
        same = float((labels == first).float().mean())
        detail: dict[str, Any] = {"peak_gb": peak / 1e9, "same_labels": same}
        if arm == "float16":
            detail["stages"] = stages_of(suite, run)
        suite.add(Line(name, arm, 1e3 * seconds, detail=detail))


def stages_of(suite: Suite, run: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of each operation of a solve."""
    watch = Stopwatch(backend_class("triton"), suite.gpu)
    with setting(state, "backend_class", lambda _: watch):
        run()
    return watch.stages()
