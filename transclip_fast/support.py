"""Labelled support rows of the few-shot setting (paper, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from transclip_fast.assignments import Assignments
from transclip_fast.graph import nearest
from transclip_fast.mixture import Moments
from transclip_fast.ops import Messages
from transclip_fast.rows import UnitRows


@dataclass(frozen=True)
class Support:
    """
    What M labelled rows add: to the mixture their moments, to the graph their messages.

    Parameters
    ----------
    n_rows : int
        M.
    moments : Moments
        Of the support rows with their one-hot labels.
    messages : Messages
        W_S^T Y / 2k: what each query hears about each class.
    """

    n_rows: int
    moments: Moments
    messages: Messages

    @classmethod
    def build(
        cls,
        support: torch.Tensor,
        labels: torch.Tensor,
        features: UnitRows,
        *,
        n_classes: int,
        n_neighbors: int,
        clamp_similarity: bool = False,
    ) -> Support:
        """Support rows (M, d) with labels (M,), each joined to its k most similar queries."""
        ids, similarities = nearest(support, features, n_neighbors)  # (M, k)
        weights = similarities.clamp_min(0) if clamp_similarity else similarities
        cells = ids * n_classes + labels[:, None]
        # Summed here: a query may be the neighbour of many shots of one class.
        cells, cell_of = torch.unique(cells, return_inverse=True)
        totals = torch.bincount(
            cell_of.flatten(), weights.flatten() / (2 * n_neighbors), len(cells)
        )
        messages = Messages.of(cells // n_classes, cells % n_classes, totals.float(), len(features))
        return cls(len(support), _moments(support, labels, n_classes), messages)

    def received(self, z: Assignments, nodes: torch.Tensor | None) -> torch.Tensor:
        """sum_ik z_ik times the messages, float64 scalar; `nodes` (N,) are the rows of z."""
        rows = self.messages.rows()
        heard = z.at(rows if nodes is None else nodes[rows], self.messages.classes)
        return (heard.double() * self.messages.weights).sum()


def _moments(support: torch.Tensor, labels: torch.Tensor, n_classes: int) -> Moments:
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels, minlength=n_classes)
    rows = support[order].double()
    sums = torch.segment_reduce(rows, "sum", lengths=counts, axis=0)  # (K, d)
    return Moments(counts.double(), sums, rows.square().sum(0))
