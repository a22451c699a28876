"""Labelled support rows of the few-shot setting (paper, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from transclip_fast.data.feature_rows import UnitRows
from transclip_fast.graph.exact import nearest
from transclip_fast.solver.mixture import Moments
from transclip_fast.types import Assignments, Messages, NeighborGraph


@dataclass(frozen=True)
class Support:
    """
    What M labelled rows add: to the mixture their moments, to the graph their messages.

    Parameters
    ----------
    labels : Tensor (M,) int64
    moments : Moments
        Of the support rows with their one-hot labels.
    neighbors, similarities : Tensor (M, k + 1) int64, float64
        The most similar queries of each row, best first; fewer where there are no more.
    messages : Messages
        W_S^T Y / 2k: what each query hears about each class.
    """

    labels: torch.Tensor
    moments: Moments
    neighbors: torch.Tensor
    similarities: torch.Tensor
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
        ids, similarities = nearest(support, features, n_neighbors + 1)
        if clamp_similarity:
            similarities = similarities.clamp_min(0)
        kept = slice(n_neighbors)
        weights = similarities[:, kept] / (2 * n_neighbors)
        messages = _messages(ids[:, kept], weights, labels, (len(features), n_classes))
        return cls(labels, _moments(support, labels, n_classes), ids, similarities, messages)

    def __len__(self) -> int:
        return len(self.labels)

    def published(
        self, graph: NeighborGraph, *, clamp_similarity: bool = False
    ) -> tuple[NeighborGraph, Support]:
        """
        Graph and support with the two errors of the published code, for comparison only.

        A shot loses its most similar query, as if that were the shot itself; and neighbour lists
        are stacked W = [support; query], but what they weigh as [z; Y] = [query; support].
        """
        (n_queries, k), device = graph.neighbors.shape, self.labels.device
        ids, weights = self.neighbors[:, 1:].cpu().numpy(), self.similarities[:, 1:].cpu().numpy()
        fewer = ((0, 0), (0, k - ids.shape[1]))
        ids = np.concatenate([np.pad(ids, fewer, constant_values=-1), graph.neighbors])
        weights = np.concatenate([np.pad(weights, fewer), graph.similarities])
        if clamp_similarity:
            weights = weights.clip(0)
        # Query i hears row i of W^T [z; Y] + W z. In both terms the first N lists of W meet z, list
        # r that of query r: to the graph, the shots' lists are those of the first M queries, and
        # the list of query q is that of query q + M. The other M lists, as a rule those of the last
        # M queries, meet Y in the first term alone: whom they name hears a one-hot label.
        mixed = NeighborGraph(ids[:n_queries], weights[:n_queries], graph.info)
        messages = _messages(
            torch.from_numpy(ids[n_queries:]).to(device),
            torch.from_numpy(weights[n_queries:]).to(device) / (2 * k),
            self.labels,
            (n_queries, len(self.moments.counts)),
        )
        return mixed, replace(self, messages=messages)

    def received(self, z: Assignments, nodes: torch.Tensor | None) -> torch.Tensor:
        """sum_ik z_ik times the messages, float64 scalar; `nodes` (N,) are the rows of z."""
        rows = self.messages.rows()
        heard = z.at(rows if nodes is None else nodes[rows], self.messages.classes)
        return (heard.double() * self.messages.weights).sum()


def _messages(
    ids: torch.Tensor, weights: torch.Tensor, labels: torch.Tensor, shape: tuple[int, int]
) -> Messages:
    """What each of N queries hears about K classes from M lists (M, k) of labels (M,)."""
    n_queries, n_classes = shape
    cells = ids * n_classes + labels[:, None]
    present = ids >= 0
    # Summed here: a query may be the neighbour of many shots of one class.
    cells, cell_of = torch.unique(cells[present], return_inverse=True)
    totals = torch.bincount(cell_of, weights[present], len(cells))
    return Messages.of(cells // n_classes, cells % n_classes, totals.float(), n_queries)


def _moments(support: torch.Tensor, labels: torch.Tensor, n_classes: int) -> Moments:
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels, minlength=n_classes)
    rows = support[order].double()
    sums = torch.segment_reduce(rows, "sum", lengths=counts, axis=0)  # (K, d)
    return Moments(counts.double(), sums, rows.square().sum(0))
