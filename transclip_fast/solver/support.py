"""Labelled support rows of the few-shot setting (paper, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from transclip_fast.data.feature_rows import Rows
from transclip_fast.graph.exact import nearest_of_all
from transclip_fast.solver.mixture import Moments
from transclip_fast.types import Messages

# Shots of every class: with fewer of some class than of another, `bench.accuracy.known_labels`
# measures that the few-shot form can be worse than no shots.
ENOUGH_SHOTS = 4
# The likelihood term of M shots weighs 50 gamma N / M times that of N queries.
SUPPORT_SCALE = 50.0
# Of the queries of a class, what a shot weighs by default: `bench.accuracy.default_gamma`.
SHOT_SHARE = 1 / 16


def enough(labels: torch.Tensor, n_classes: int) -> bool:
    """Whether shots (M,) make up a few-shot problem: equally many of each class, or enough."""
    counts = torch.bincount(labels, minlength=n_classes)
    return int(counts.min()) >= min(ENOUGH_SHOTS, int(counts.max()))


def default_gamma(n_shots: int, n_classes: int) -> float:
    """The gamma with which a shot weighs 1/16 of N / K queries."""
    return SHOT_SHARE * n_shots / (SUPPORT_SCALE * n_classes)


@dataclass(frozen=True)
class Support:
    """
    M labelled rows: their moments join the mixture, their messages the graph.

    Parameters
    ----------
    moments : Moments
        Of the support rows with their one-hot labels.
    nearest : Tensor (M,) int64
        The most similar query of each row.
    messages : Messages
        W_S^T Y / 2k: messages to the queries of this process about each class.
    """

    moments: Moments
    nearest: torch.Tensor
    messages: Messages

    @classmethod
    def build(
        cls,
        support: torch.Tensor,
        labels: torch.Tensor,
        features: Rows,
        *,
        n_classes: int,
        n_neighbors: int,
        clamp_similarity: bool = False,
    ) -> Support:
        """Support rows (M, d) with labels (M,), each joined to its k most similar queries."""
        ids, similarities = nearest_of_all(support, features, n_neighbors)
        if clamp_similarity:
            similarities = similarities.clamp_min(0)
        weights = similarities / (2 * n_neighbors)
        own = features.own
        shape = (own.stop - own.start, n_classes)
        here = (ids >= own.start) & (ids < own.stop)
        messages = support_messages((ids - own.start).where(here, -1), weights, labels, shape)
        return cls(Moments.of(support, labels, n_classes), ids[:, 0], messages)

    def __len__(self) -> int:
        return len(self.nearest)


def support_messages(
    ids: torch.Tensor, weights: torch.Tensor, labels: torch.Tensor, shape: tuple[int, int]
) -> Messages:
    """Messages to N queries about K classes from M lists (M, k) of labels (M,); `shape` (N, K)."""
    n_queries, n_classes = shape
    cells = ids * n_classes + labels[:, None]
    present = ids >= 0
    # A query may be the neighbour of many shots of one class: sum their messages, in the order of
    # the shots, as sums by atomic additions would differ from run to run on a GPU.
    cells, order = cells[present].sort(stable=True)
    cells, lengths = torch.unique_consecutive(cells, return_counts=True)
    totals = torch.segment_reduce(weights[present][order], "sum", lengths=lengths, unsafe=True)
    return Messages.of(cells // n_classes, cells % n_classes, totals.float(), n_queries)
