"""The runs of a fit, one for each gamma, with their progress and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from transclip_fast.callbacks import Checkpoint, FitProgress, Progress
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.ops.ranked import RankedRows
from transclip_fast.solver.class_cost import is_charged
from transclip_fast.solver.loop import passes_before, solve
from transclip_fast.solver.parameters import Parameters
from transclip_fast.solver.prior import LinearPrior
from transclip_fast.solver.problem import Inputs, Settings
from transclip_fast.solver.state import Solution


def solve_each(
    inputs: Inputs,
    graph: NeighborGraph,
    settings: Settings,
    gammas: Sequence[float | None],
    report: Callable[[Progress], None] | None,
    checkpoint: Callable[[str, dict[str, Any]], Checkpoint] | None,
) -> Iterator[Solution]:
    """Solve with each gamma in turn."""
    parameters, features, meter = settings.parameters, inputs.features, None
    sha256 = checkpoint and features.digest(lambda rows: graph.part(rows).sha256())
    if report is None and isinstance(features, RankedRows):
        report = _ignored  # steps are counted by all processes or by none
    if report is not None:
        linear, steps = isinstance(inputs.prior, LinearPrior), parameters.max_iter
        passes = passes_before(linear=linear)
        meter = FitProgress(len(features.local()), passes, steps, len(gammas), report)
        features.on_read = meter.rows
    if parameters.precision == "float16":
        inputs = replace(inputs, features=features.half())
    try:
        for run, gamma in enumerate(gammas):
            identity = settings.identity(gamma, sha256 or "")
            saved = checkpoint and checkpoint(f"solve-{run}", identity)
            step = None if meter is None else meter.run(run)
            yield solve(inputs, graph, settings, gamma, progress=step, checkpoint=saved)
    finally:
        features.on_read = None


def passes_of_fit(
    parameters: Parameters,
    gammas: Sequence[float | None] = (None,),
    *,
    linear: bool = True,
    support: bool = False,
    validation: bool = False,
) -> int:
    """
    Passes over the features to load a problem and solve it with each gamma: see `Problem.load`.

    With `class_cost="auto"` the most that there can be.
    """
    run = passes_before(linear=linear) + 2 * (parameters.max_iter + 1)
    charged = sum(
        is_charged(parameters.class_cost, 0.0, 1, few_shot=gamma is not None) for gamma in gammas
    )
    return len(gammas) * run + charged * (1 + support) + support + validation


def _ignored(progress: Progress) -> None:
    pass
