"""
Queries whose class is known: z stays at it, and they count more than others in the mixture.

They are not support rows: they remain queries, so lambda and the start are those of zero-shot, and
their neighbours receive their messages through the graph of the queries.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from transclip_fast.data.checks import POSITIONS, as_labels, as_tensor
from transclip_fast.data.feature_rows import Rows, Tensors
from transclip_fast.data.swapped import check_not_swapped
from transclip_fast.errors import user_level
from transclip_fast.solver.mixture import Moments
from transclip_fast.types import Assignments, Scores

# Rows that each counts as in means and variance: `bench.accuracy.known_labels`.
KNOWN_WEIGHT = 3.0
READ_ROWS = 1 << 14  # at a time, for their moments


@dataclass(frozen=True)
class KnownRows:
    """
    The queries of known class.

    Parameters
    ----------
    rows, labels : Tensor (m,) int64
        Their numbers among the queries of this process, and their classes.
    moments : Moments
        Of these rows, of all processes, with their one-hot labels.
    """

    rows: torch.Tensor
    labels: torch.Tensor
    moments: Moments

    @classmethod
    def of(cls, known: torch.Tensor, features: Rows, n_classes: int) -> KnownRows:
        """The rows of features with known >= 0, of `known` (n,) int64 of own rows."""
        own, dim = features.local(), features.shape[1]

        def leaf(part: slice) -> Tensors:
            moments = Moments.zero(n_classes, dim, known.device)
            for some in torch.split(part.start + (known[part] >= 0).nonzero()[:, 0], READ_ROWS):
                moments = moments + Moments.of(own[some], known[some], n_classes)
            return moments.counts, moments.sums, moments.squares

        sums = features.total(leaf, [(n_classes,), (n_classes, dim), (dim,)])
        rows = (known >= 0).nonzero()[:, 0]
        return cls(rows, known[rows], Moments(*sums))

    def of_classes(self, classes: torch.Tensor) -> KnownRows:
        """The same with the classes (K',), sorted, numbered anew; no other one is known."""
        labels = torch.searchsorted(classes, self.labels)
        return KnownRows(self.rows, labels, self.moments.take(classes))

    def clamp(self, entries: Assignments | Scores, nodes: torch.Tensor | None) -> None:
        """
        Make z of the known rows one-hot, or their scores so that no message makes z anything else.

        `nodes` (N,) are the rows of the entries, if they are not in the order of the features.
        """
        rows = self.rows if nodes is None else nodes[self.rows]
        sure, impossible = (1.0, 0.0) if isinstance(entries, Assignments) else (0.0, -torch.inf)
        entries.values[rows] = impossible
        if entries.classes is None:
            entries.values[rows, self.labels] = sure
        else:
            entries.values[rows, 0] = sure
            entries.classes[rows, 0] = self.labels.int()
        if isinstance(entries, Scores):
            entries.tail[rows] = 0


def known_classes(
    labels: Any, n_rows: int, n_classes: int, *, of_texts: bool
) -> torch.Tensor | None:
    """Classes (N,) int64 on the CPU, -1 where unknown; None if they all are."""
    if labels is None:
        return None
    labels = as_tensor(labels, "known_labels", POSITIONS)
    if of_texts and labels.ndim:
        check_not_swapped(n_rows, n_classes, {"known_labels": len(labels)}, {}, "X")
    known = as_labels(labels, "known_labels", rows=n_rows, n_classes=n_classes, lowest=-1).cpu()
    if (known >= 0).any():
        return known
    warnings.warn("known_labels: no row has one; they change nothing", stacklevel=user_level())
    return None
