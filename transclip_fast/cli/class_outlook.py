"""How many classes the prior uses, before a solve, and how their sizes changed, after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from transclip_fast.cli.session import counted
from transclip_fast.data.checks import unit_divisors, unit_sample
from transclip_fast.data.feature_rows import evenly_spaced_rows
from transclip_fast.data.names import class_name
from transclip_fast.graph.exact import nearest
from transclip_fast.solver.class_cost import (
    agreement,
    effective_classes,
    is_charged,
    is_undecided,
    sharpness,
)
from transclip_fast.solver.parameters import Parameters
from transclip_fast.solver.prior import LinearPrior
from transclip_fast.solver.problem import PRIOR_SAMPLE_ROWS, Problem

SAMPLE_ENTRIES = 1 << 22  # of the prior and of the rows that it is of, worth computing twice
NEIGHBOR_ROWS = 4096  # among which neighbours are searched: a fraction of a second
RARE = 0.05  # of a fair share of the rows
NAMED = 3  # classes of a line
ZERO_SHOT = "zero-shot"
COSTS = {
    True: "each class in use is charged, so that absent ones take no images",
    False: "no charge for a class in use",
    None: "solved twice, with and without a charge for each class in use",
}
KEPT = {True: "with", False: "without"}  # what a second solve decided


def outlook(problem: Problem, parameters: Parameters) -> dict[str, Any]:
    """
    K_eff and the rare classes by the prior of some rows, as JSON.

    `class_cost` is None where the solve decides it.

    InputError if one of these rows cannot be used.
    """
    n_classes = problem.prior.n_classes
    widest = max(n_classes, problem.features.shape[1])
    log_prior = problem.prior_sample(max(PRIOR_SAMPLE_ROWS, SAMPLE_ENTRIES // widest))
    ids = evenly_spaced_rows(len(problem.features), len(log_prior))
    rows = unit_sample(problem.features, ids)
    if not rows.isfinite().all():
        unit_divisors(problem.features, "X")  # names the first row that is not finite, or zero
    power = _sharpness(rows, log_prior, parameters.n_neighbors)
    shares = torch.softmax(power * log_prior.double(), 1).mean(0)
    effective = effective_classes(shares)
    few_shot = None not in problem.gammas(parameters)
    facts = parameters.class_cost, effective, n_classes
    undecided = is_undecided(*facts, few_shot=few_shot)
    return {
        "by": counted_by(problem),
        "rows": len(log_prior),
        "n_effective_classes": effective,
        "class_cost": None if undecided else is_charged(*facts, few_shot=few_shot),
        "rare_classes": (n_classes * shares < RARE).nonzero()[:, 0].tolist(),
    }


def counted_by(problem: Problem) -> str:
    """Whose classes are counted: those of the texts alone, or of another prior."""
    of_texts = isinstance(problem.prior, LinearPrior) and problem.prior is problem.zero_shot
    return ZERO_SHOT if of_texts else "the prior"


def _sharpness(rows: torch.Tensor, log_prior: torch.Tensor, n_neighbors: int) -> float:
    """T of `transclip_fast.solver.class_cost`, from some rows and their neighbours among these."""
    some = evenly_spaced_rows(len(rows), NEIGHBOR_ROWS)
    rows, labels = rows[some], log_prior[some].argmax(1)
    neighbors, _ = nearest(rows, rows, n_neighbors, own=torch.arange(len(rows)))
    return sharpness(log_prior[some], agreement(labels, labels[neighbors]))


def describe_outlook(found: dict[str, Any], n_classes: int, names: Sequence[str] | None) -> str:
    """An outlook in one line."""
    effective, rare = found["n_effective_classes"], found["rare_classes"]
    line = use_of_classes(effective, n_classes, found["class_cost"], found["by"])
    if rare:
        some = ", ".join(class_name(k, names) for k in rare[:NAMED])
        more = ", ..." if len(rare) > NAMED else ""
        line += f"; {len(rare):,} hardly {'occurs' if len(rare) == 1 else 'occur'}: {some}{more}"
    return f"plan: by {counted(found['rows'], 'image')}, {line}"


def use_of_classes(
    effective: float,
    n_classes: int,
    charged: bool | None,
    by: str,
    *,
    decided: bool = False,
) -> str:
    """
    K_eff `by` some prior, and whether classes are charged.

    None if a solve decides it; `decided` if it has.
    """
    uses = f"{by} uses about {effective:.0f} of {counted(n_classes, 'class')}"
    if decided and charged is not None:
        costs = f"{COSTS[None]}; kept: {KEPT[charged]} it"
    else:
        costs = COSTS[charged]
    return f"{uses}: {costs} (--class-cost)"


def size_changes(labels: np.ndarray, zero_shot: np.ndarray, n_classes: int) -> list[list[int]]:
    """Class, size by zero-shot and size now of those that changed most, as JSON."""
    now, before = (np.bincount(found, minlength=n_classes) for found in (labels, zero_shot))
    most = np.argsort(-np.abs(now - before), kind="stable")[: 2 * NAMED]
    return [[int(k), int(before[k]), int(now[k])] for k in most if now[k] != before[k]]


def describe_changes(run: Mapping[str, Any]) -> list[str]:
    """Lines of the classes that grew and that shrank most, as of run.json."""
    lines = []
    for verb, sign in (("grew", 1), ("shrank", -1)):
        some = [
            f"{class_name(k, run['class_names'])} {before:,} -> {now:,}"
            for k, before, now in run["size_changes"]
            if sign * (now - before) > 0
        ]
        if some:
            lines.append(f"{verb} most: {', '.join(some[:NAMED])}")
    return lines
