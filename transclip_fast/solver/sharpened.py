"""The sharpened prior y_hat^T of `class_cost`: T, and the mass of each class."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from transclip_fast.data.feature_rows import Rows, evenly_spaced_rows
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.solver.class_cost import agreement, sharpness
from transclip_fast.solver.prior import Prior, log_prior_of
from transclip_fast.solver.problem import PRIOR_SAMPLE_ROWS
from transclip_fast.types import BLOCK_ROWS, Assignments

SHARPNESS_ENTRIES = 1 << 22  # of the rows that T is taken from: 4,096 rows of 1,000 classes,
SHARPNESS_ROWS = 1 << 13  # and at most so many: their features are held


def sharpness_rows(n_classes: int) -> int:
    """The most rows from which T is taken."""
    return max(PRIOR_SAMPLE_ROWS, min(SHARPNESS_ROWS, SHARPNESS_ENTRIES // n_classes))


def sharpness_of(prior: Prior, labels: torch.Tensor, features: Rows, graph: NeighborGraph) -> float:
    """T, from y_hat of some rows, the labels (N,), and the lists of own rows."""
    ids = evenly_spaced_rows(len(features), sharpness_rows(prior.n_classes), labels.device)
    shared = shared_labels(labels, ids, features, graph)
    return sharpness(log_prior_of(prior, ids, features), shared)


def shared_labels(
    labels: torch.Tensor, ids: torch.Tensor, features: Rows, graph: NeighborGraph
) -> float:
    """The share of neighbours of some rows (S,) that have their label, of `labels` (N,)."""
    lists = torch.from_numpy(np.require(graph.neighbors, requirements="W"))
    neighbors = features.pick(lists, ids.cpu()).to(ids.device)  # (S, k)
    theirs = features.pick(labels, neighbors.clamp_min(0).flatten()).view(neighbors.shape)
    return agreement(features.pick(labels, ids), theirs.where(neighbors >= 0, -1))


def sharpen(z: Assignments, power: float) -> Assignments:
    """
    z <- z^power in place, rows scaled to 1.

    What a list dropped counts as classes with its least z: no others have a larger z^power.
    """
    for start in range(0, len(z), BLOCK_ROWS):
        values = z.values[start : start + BLOCK_ROWS]
        used = values > 0
        # In logs, as powers of a soft row underflow.
        logs = values.log()
        dropped = (1 - values.sum(1)).clamp_min(0).log()
        number = (dropped - logs.masked_fill(~used, 0).amin(1)).clamp_min(0)  # of them, its log
        tail = power * (dropped - number) + number
        powers = torch.cat([power * logs, tail[:, None]], 1)
        values.copy_(torch.softmax(powers, 1)[:, :-1])
        # No entry in use may underflow: a list ends at its first 0.
        values.clamp_(min=torch.finfo(values.dtype).tiny).mul_(used)
    return z


def prior_counts(z: Assignments, features: Rows, prior: Prior, power: float) -> torch.Tensor:
    """Mass (K,) float64 of y_hat^power; z is y_hat, and sparse rows lack its smallest entries."""

    def leaf(own: slice) -> tuple[torch.Tensor, ...]:
        total = torch.zeros(z.n_classes, dtype=torch.float64, device=z.values.device)
        for start in range(own.start, own.stop, BLOCK_ROWS):
            some = z.take(slice(start, min(start + BLOCK_ROWS, own.stop)))
            total += sharpen(replace(some, values=some.values.clone()), power).counts()
        return (total,)

    (counts,) = features.total(leaf, [(z.n_classes,)])
    if z.classes is None:
        return counts
    # All entries of some rows tell among which classes the dropped mass is spread.
    ids = evenly_spaced_rows(len(features), PRIOR_SAMPLE_ROWS, z.values.device)
    log_prior = log_prior_of(prior, ids, features)
    whole = torch.softmax(power * log_prior, 1)
    values, classes = features.pick(z.values, ids), features.pick(z.classes, ids)
    kept = sharpen(replace(z, values=values, classes=classes), power).dense()
    dropped = (whole - kept).clamp_min(0).sum(0, dtype=torch.float64)
    share = dropped / dropped.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return counts + (len(features) - counts.sum()).clamp_min(0) * share
