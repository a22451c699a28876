"""The runs of a fit, one for each gamma, with their progress and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from transclip_fast.callbacks import Checkpoint, FitProgress, Progress
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.ops.ranked import RankedRows
from transclip_fast.solver.loop import passes_before, solve
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
        passes, steps = passes_before(inputs.prior), parameters.max_iter
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


def _ignored(progress: Progress) -> None:
    pass
