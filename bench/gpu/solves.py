"""The solves of `bench.gpu.suite`: the same bits twice, and times beside the strong baseline."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.common import SAME_LABELS
from bench.gpu.lines import Line, Suite
from bench.gpu.problems import made_graph, made_problem
from bench.gpu.timing import Stopwatch, bits_differ, setting
from bench.rivals import baseline
from transclip_fast.data.feature_rows import Rows
from transclip_fast.ops import backend_class
from transclip_fast.solver import loop as solver
from transclip_fast.solver import state
from transclip_fast.solver.layout import Layout
from transclip_fast.solver.parameters import Parameters
from transclip_fast.solver.prior import LinearPrior
from transclip_fast.solver.problem import Inputs, Settings
from transclip_fast.types import NeighborGraph, Truncation

STREAMED_ENTRIES = 2_000_000_000  # largest features that are also read from host memory
FLOAT32_OPERATIONS = 2e15  # of all scores: a longer solve is not repeated in float32
WIDTH = 16  # candidates, and entries of z
OTHER_LABELS = 1 - SAME_LABELS  # largest share of rows whose label may differ from the first arm's
STEPS = Parameters(class_cost=False)  # 10 x 5; the rivals have no class cost


class GpuProblem:
    """A made problem of N rows, K classes and d dimensions with its graph, and its solvers."""

    def __init__(self, n: int, k: int, d: int, device: str) -> None:
        self.shape, self.device = (n, k, d), device
        self.features, self.prototypes = made_problem(n, k, d, device)
        self.graph = made_graph(n, k)

    def solution(self, features: torch.Tensor | Rows) -> state.Solution:
        """Solve on the kernels."""
        width, device = min(WIDTH, self.shape[1]), torch.device(self.device)
        rows = features if isinstance(features, Rows) else Rows(features, device=device)
        prior = LinearPrior.from_prototypes(self.prototypes, 100.0)
        settings = Settings(
            STEPS, device, 1.0, Layout(width, held=rows.held), Truncation(width, width), "triton"
        )
        return solver.solve(Inputs(rows, prior, prior), self.graph, settings)

    def labels(self, features: torch.Tensor | Rows) -> torch.Tensor:
        """Return the labels (N,) of a solve on the kernels."""
        return self.solution(features).assignments.best()[0]

    def rival(self, compiled: bool) -> torch.Tensor:
        """Return the labels (N,) of the strong baseline."""
        pair = lists_on(self.graph, self.device)
        return baseline.solve(self.features, self.prototypes, pair, compiled=compiled).argmax(1)


def lists_on(graph: NeighborGraph, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and similarities of a graph as tensors."""
    lists = torch.from_numpy(graph.neighbors), torch.from_numpy(graph.similarities)
    return lists[0].to(device), lists[1].to(device)


def repeated(suite: Suite, n: int = 20_000, k: int = 1000, d: int = 512) -> None:
    """Check that two solves of the same problem have the same bits."""
    problem = GpuProblem(n, k, d, suite.gpu.device)
    features = problem.features.half()

    def run() -> list[torch.Tensor]:
        solution = problem.solution(features)
        z, mixture = solution.assignments, solution.mixture
        arrays = [z.values, mixture.means, mixture.variances, torch.tensor(solution.objective)]
        return [x.cpu() for x in (*arrays, *([] if z.classes is None else [z.classes]))]

    suite.check(f"two solves, {n} rows", bits_differ(run(), run()), 0.0)


def solve(suite: Suite, n: int, k: int, d: int) -> None:
    """Time a solve of 10 x 5 with its graph, beside the baseline and its compiled form.

    Labels are compared with those of the first arm that ran. Where they differ, the later line is
    marked, whichever arm is at fault.
    """
    name = f"solve {n} x {k} x {d}"
    problem = GpuProblem(n, k, d, suite.gpu.device)
    half = problem.features.half()
    arms: dict[str, Callable[[], torch.Tensor]] = {"float16": partial(problem.labels, half)}
    if 22.0 * n * k * d <= FLOAT32_OPERATIONS:
        arms["float32"] = partial(problem.labels, problem.features)
        arms["baseline"] = partial(problem.rival, False)
        arms["baseline, torch.compile"] = partial(problem.rival, True)
    if n * d <= STREAMED_ENTRIES:
        rows = Rows(problem.features.cpu(), device=suite.gpu.device, held=False).half()
        arms["float16, streamed"] = partial(problem.labels, rows)
    first: torch.Tensor | None = None
    for arm, run in arms.items():
        taken = suite.attempt(f"{name}, {arm}", partial(suite.gpu.seconds, run))
        if taken is None:
            continue
        labels, seconds, peak = taken
        first = labels if first is None else first
        differ = float((labels != first).float().mean())
        detail: dict[str, Any] = {"peak_gb": peak / 1e9, "same_labels": 1 - differ}
        if arm == "float16":
            detail["stages"] = stages_of(suite, run)
        suite.add(Line(name, arm, 1e3 * seconds, error=differ, allowed=OTHER_LABELS, detail=detail))


def stages_of(suite: Suite, run: Callable[[], Any]) -> dict[str, float]:
    """Return the milliseconds of each operation of a solve."""
    watch = Stopwatch(backend_class("triton"), suite.gpu)
    with setting(state, "backend_class", lambda _: watch):
        run()
    return watch.stages()
