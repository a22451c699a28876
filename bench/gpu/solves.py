"""Whole solves of `bench.gpu.suite`: the same bits each time, and beside the strong baseline."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.gpu.lines import Line, Suite
from bench.gpu.problems import made_graph, made_problem
from bench.gpu.timing import Stopwatch, bits_differ, setting
from bench.rivals import baseline
from transclip_fast.data.feature_rows import Rows
from transclip_fast.ops import operations
from transclip_fast.solver import loop as solver
from transclip_fast.solver.parameters import Parameters
from transclip_fast.solver.prior import LinearPrior
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

    def solution(self, features: torch.Tensor | Rows, *, short: bool = True) -> solver.Solution:
        """On the kernels."""
        width = min(WIDTH, self.shape[1])
        return solver.solve(
            features, LinearPrior.from_prototypes(self.prototypes, 100.0), self.graph,
            STEPS, kl_weight=1.0, truncation=Truncation(width, width) if short else None,
            backend="triton",
        )  # fmt: skip

    def labels(self, features: torch.Tensor | Rows) -> torch.Tensor:
        return self.solution(features).assignments.best()[0]

    def rival(self, compiled: bool) -> torch.Tensor:
        """Labels of the strong baseline."""
        pair = lists_on(self.graph, self.device)
        return baseline.solve(self.features, self.prototypes, pair, compiled=compiled).argmax(1)


def lists_on(graph: NeighborGraph, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and similarities of a graph as tensors."""
    lists = torch.from_numpy(graph.neighbors), torch.from_numpy(graph.similarities)
    return lists[0].to(device), lists[1].to(device)


def captured(suite: Suite, n: int = 20_000, k: int = 1000, d: int = 512) -> None:
    """Steps recorded as a CUDA graph against steps that are not, and one run against another."""
    from transclip_fast.ops import triton_backend as ops

    problem = Problem(n, k, d, suite.gpu.device)
    for short, features in ((True, problem.features.half()), (False, problem.features)):
        name = f"{'short' if short else 'full'} form, {n} rows"

        def run(features: torch.Tensor = features, short: bool = short) -> list[torch.Tensor]:
            solution = problem.solution(features, short=short)
            z, mixture = solution.assignments, solution.mixture
            classes = [] if z.classes is None else [z.classes]
            objective = torch.tensor(solution.objective)
            return [z.values.cpu(), mixture.means.cpu(), mixture.variances.cpu(), objective, *(
                x.cpu() for x in classes)]  # fmt: skip

        recorded, quick, _ = suite.gpu.seconds(run)
        with setting(ops, "CAPTURED_ROWS", 0):
            plain, slow, _ = suite.gpu.seconds(run)
            again = run()
        suite.check(f"two runs, {name}", bits_differ(plain, again), 0.0)
        differ = bits_differ(recorded, plain)
        suite.add(Line(f"solve, {name}", "captured", 1e3 * quick, error=differ))
        suite.add(Line(f"solve, {name}", "not captured", 1e3 * slow))


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
    watch = Stopwatch(operations("triton"), suite.gpu)
    with setting(solver, "operations", lambda _: watch):
        run()
    return watch.stages()
