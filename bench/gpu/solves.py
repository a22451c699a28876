"""The solves of `bench.gpu.suite`: the same bits twice, and times beside the strong baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.common import SAME_LABELS
from bench.gpu.lines import Line, Suite
from bench.gpu.problems import made_graph, made_problem
from bench.gpu.timing import Stopwatch, bits_differ, setting
from bench.rivals import baseline
from transclip_fast.data.feature_rows import Rows
from transclip_fast.device import current_device
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.memory import free_bytes
from transclip_fast.ops import backend_class
from transclip_fast.solver import loop as solver
from transclip_fast.solver import state
from transclip_fast.solver.layout import Layout
from transclip_fast.solver.parameters import Parameters
from transclip_fast.solver.prior import LinearPrior
from transclip_fast.solver.problem import Inputs, Problem, Settings
from transclip_fast.solver.runs import solve_each
from transclip_fast.types import Truncation

WIDTH = 16  # candidates, and entries of z
OTHER_LABELS = 1 - SAME_LABELS  # largest share of rows whose label may differ from the first arm's
STEPS = Parameters(class_cost=False)  # 10 x 5; the rivals have no class cost


class GpuProblem:
    """A made problem of N rows, K classes and d dimensions with its graph, and its solvers."""

    def __init__(self, n: int, k: int, d: int, device: str) -> None:
        self.shape, self.device = (n, k, d), device
        self.features, self.prototypes = made_problem(n, k, d, device)
        self.graph = made_graph(n, k)
        self._half: torch.Tensor | None = None
        self._streamed: Rows | None = None

    def solution(self, features: torch.Tensor | Rows) -> state.Solution:
        """Solve on the kernels."""
        width, device = min(WIDTH, self.shape[1]), torch.device(self.device)
        rows = features if isinstance(features, Rows) else Rows(features, device=device)
        prior = LinearPrior.from_prototypes(self.prototypes, 100.0)
        layout, truncation = Layout(width, held=rows.held), Truncation(width, width)
        settings = Settings(STEPS, device, 1.0, layout, truncation, "triton", free_bytes(device))
        return solver.solve(Inputs(rows, prior, prior), self.graph, settings)

    def labels(self, features: torch.Tensor | Rows) -> torch.Tensor:
        """Return the labels (N,) of a solve on the kernels."""
        return self.solution(features).assignments.best()[0]

    def defaults(self) -> torch.Tensor:
        """Return the labels of a fit with default parameters."""
        parameters = Parameters(device=self.device, backend="triton", assignments="sparse")
        return labels_of(parameters, self.features, self.prototypes, self.graph)

    def arms(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Return all arms by name, each a function that returns labels."""

        def half() -> torch.Tensor:
            if self._half is None:
                self._half = self.features.half()
            return self.labels(self._half)

        def streamed() -> torch.Tensor:
            if self._streamed is None:
                rows = self.features.cpu()
                self._streamed = Rows(rows, device=self.device, held=False).half()
            return self.labels(self._streamed)

        return {
            "float16": half,
            "float32": lambda: self.labels(self.features),
            "float16, streamed": streamed,
            "baseline": lambda: self.rival(False),
            "baseline, torch.compile": lambda: self.rival(True),
        }

    def rival(self, compiled: bool) -> torch.Tensor:
        """Return the labels (N,) of the strong baseline."""
        pair = lists_on(self.graph, self.device)
        return baseline.solve(self.features, self.prototypes, pair, compiled=compiled).argmax(1)


def labels_of(
    parameters: Parameters,
    features: torch.Tensor,
    prototypes: torch.Tensor,
    graph: NeighborGraph,
    *,
    held: bool | None = None,
) -> torch.Tensor:
    """Return the labels (N,) of a fit, which needs no estimator, and so neither scipy nor tqdm."""
    problem = Problem.check(features, prototypes, logit_scale=parameters.logit_scale)
    settings = Settings.resolve(parameters, problem)
    if held is not None:
        settings = replace(settings, layout=replace(settings.layout, held=held))
    with current_device(settings.device):
        inputs = problem.load(settings)
        (solution,) = solve_each(inputs, graph, settings, (None,), None, None)
        return solution.assignments.best()[0]


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
        arrays = [
            z.values,
            mixture.means,
            mixture.variances,
            torch.tensor(solution.history.objective),
        ]
        return [x.cpu() for x in (*arrays, *([] if z.classes is None else [z.classes]))]

    suite.check(f"two solves, {n} rows", bits_differ(run(), run()), 0.0)


def solve(
    suite: Suite, n: int, k: int, d: int, arms: Sequence[str] = (), *, warm: bool = True
) -> None:
    """Time solves of 10 x 5 with their graph by some arms, all by default.

    Labels are compared with those of the first arm that ever ran here. Where they differ, the later
    line is marked, whichever arm is at fault.
    """
    problem = GpuProblem(n, k, d, suite.gpu.device)
    known = problem.arms()
    for arm in arms or known:
        timed_labels(suite, problem, arm, known[arm], warm=warm)


def defaults(suite: Suite, n: int, k: int, d: int) -> None:
    """Time `TransCLIP()` as it comes beside the baseline."""
    problem = GpuProblem(n, k, d, suite.gpu.device)
    timed_labels(suite, problem, "TransCLIP()", problem.defaults)
    timed_labels(suite, problem, "baseline", problem.arms()["baseline"])


def timed_labels(
    suite: Suite,
    problem: GpuProblem,
    arm: str,
    run: Callable[[], torch.Tensor],
    *,
    warm: bool = True,
) -> None:
    """Add the line of a solve that returns labels; of float16 with the time of each stage."""
    name = "solve {} x {} x {}".format(*problem.shape)
    taken = suite.attempt(f"{name}, {arm}", partial(suite.gpu.seconds, run, warm=warm))
    if taken is None:
        return
    labels, seconds, peak = taken
    labels = labels.cpu().numpy()
    path = suite.folder / "labels_{}_{}_{}.npy".format(*problem.shape)
    if not path.exists():
        np.save(path, labels)
    differ = float((labels != np.load(path)).mean())
    detail: dict[str, Any] = {"peak_gb": peak / 1e9, "same_labels": 1 - differ}
    if arm == "float16" and warm:
        detail["stages"] = stages_of(suite, run)
    suite.add(Line(name, arm, 1e3 * seconds, error=differ, allowed=OTHER_LABELS, detail=detail))


def stages_of(suite: Suite, run: Callable[[], Any]) -> dict[str, float]:
    """Return the milliseconds of each operation of a solve."""
    watch = Stopwatch(backend_class("triton"), suite.gpu)
    with setting(state, "backend_class", lambda _: watch):
        run()
    return watch.stages()
