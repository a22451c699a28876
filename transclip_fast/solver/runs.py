"""The runs of a fit, one for each gamma or two, with their progress and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from transclip_fast.callbacks import Checkpoint, FitProgress, Progress, Step
from transclip_fast.data.feature_rows import Rows, evenly_spaced_rows
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.solver.class_cost import LEAD, is_charged, is_undecided, plausibility
from transclip_fast.solver.loop import passes_before, solve
from transclip_fast.solver.parameters import Parameters
from transclip_fast.solver.prior import LinearPrior
from transclip_fast.solver.problem import Inputs, Settings
from transclip_fast.solver.sharpened import shared_labels
from transclip_fast.solver.state import Solution

AGREEMENT_ROWS = 1 << 16  # whose neighbours tell how many have the same label
TRIED_STEPS = 4  # after which a class cost is given up where it is behind


class _BehindError(Exception):
    """The labels with a class cost are less plausible than those without."""


def solve_each(
    inputs: Inputs,
    graph: NeighborGraph,
    settings: Settings,
    gammas: Sequence[float | None],
    report: Callable[[Progress], None] | None,
    checkpoint: Callable[[str, dict[str, Any]], Checkpoint] | None,
) -> Iterator[Solution]:
    """Solve with each gamma in turn; without and with a class cost where "auto" is undecided."""
    parameters, features, meter = settings.parameters, inputs.features, None
    sha256 = features.digest(lambda rows: graph.part(rows).sha256()) if checkpoint else ""
    if report is not None:
        linear, steps = isinstance(inputs.prior, LinearPrior), parameters.max_iter
        passes = passes_before(linear=linear)
        meter = FitProgress(len(features.local()), passes, steps, len(gammas), report)
        features.on_read = meter.rows
    if parameters.precision == "float16":
        inputs = replace(inputs, features=features.half())

    def one_run(
        run: int, settings: Settings, gamma: float | None, watch: Callable[[Step], None]
    ) -> Solution:
        identity = settings.identity(gamma, sha256)
        saved = checkpoint(f"solve-{run}", identity) if checkpoint else None
        count = None if meter is None else meter.run(run)

        def after_step(step: Step) -> None:
            if count is not None:
                count(step)
            watch(step)

        return solve(inputs, graph, settings, gamma, progress=after_step, checkpoint=saved)

    def plausible(labels: torch.Tensor) -> float:
        return _plausibility(labels, inputs.prior.n_classes, features, graph)

    def charged_or(free: Solution, run: int, gamma: float | None) -> Solution:
        """The solution with a class cost, unless the `free` one is more plausible."""
        least = plausible(free.assignments.best()[0])
        charged = replace(settings, parameters=replace(parameters, class_cost=True))

        def give_up_behind(step: Step) -> None:
            if step.number == TRIED_STEPS and plausible(step.labels) < least - LEAD:
                raise _BehindError

        try:
            found = one_run(len(gammas) + run, charged, gamma, give_up_behind)
        except _BehindError:
            return free
        return found if plausible(found.assignments.best()[0]) >= least else free

    try:
        for run, gamma in enumerate(gammas):
            found = one_run(run, settings, gamma, lambda step: None)
            few_shot = gamma is not None
            effective, n_classes = found.n_effective, inputs.prior.n_classes
            if is_undecided(parameters.class_cost, effective, n_classes, few_shot=few_shot):
                found = charged_or(found, run, gamma)
            yield found
    finally:
        features.on_read = None


def _plausibility(
    labels: torch.Tensor, n_classes: int, features: Rows, graph: NeighborGraph
) -> float:
    """By which `class_cost` chooses between the labels (n,) of two solutions."""
    (sizes,) = features.total(
        lambda rows: (torch.bincount(labels[rows], minlength=n_classes).double(),), [(n_classes,)]
    )
    ids = evenly_spaced_rows(len(features), AGREEMENT_ROWS, labels.device)
    return plausibility(shared_labels(labels, ids, features, graph), sizes)


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

    With `class_cost="auto"` the most that there can be, unless it solves twice.
    """
    run = passes_before(linear=linear) + 2 * (parameters.max_iter + 1)
    charged = sum(
        is_charged(parameters.class_cost, 0.0, 1, few_shot=gamma is not None) for gamma in gammas
    )
    return len(gammas) * run + charged * (1 + support) + support + validation
