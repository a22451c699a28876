"""The recall of a search, measured on random rows with exact neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from transclip_fast.data.feature_rows import Rows
from transclip_fast.graph.candidates import rerank_float64
from transclip_fast.graph.exact import nearest
from transclip_fast.ops.exchange import Exchange

RECALL_SAMPLE_ROWS, SAMPLE_SEED = 1000, 1
CONFIDENCE_STANDARD_ERRORS = 1.645  # one-sided 95 %
FLOAT64_ROUNDING = 1e-9  # a generous bound, for two sums of one product of unit rows


@dataclass(frozen=True)
class RecallSample:
    """Random rows with their exact neighbours, on which the recall of a search is measured."""

    ids: torch.Tensor  # (S,) int64
    rows: torch.Tensor  # (S, d)
    neighbors: torch.Tensor  # (S, k) int64, the nearest other rows; k is cut to N - 1
    similarities: torch.Tensor  # (S, k) float64

    @classmethod
    def draw(cls, rows: Rows, k: int, exchange: Exchange | None = None) -> RecallSample:
        """At most 1,000 random rows, searched exactly; by all processes of an exchange together."""
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SAMPLE_SEED))
        ids = order[:RECALL_SAMPLE_ROWS].sort().values.to(rows.device)
        own = rows[ids]
        return cls(ids, own, *nearest(own, rows, k, own=ids, exchange=exchange))

    def measure(self, rows: Rows, candidates: torch.Tensor) -> tuple[torch.Tensor, float]:
        """
        Recall (S,) and weight error of candidates (S, C) of the sampled rows, -1 for none.

        Recall is the share of a row's k exact neighbours that are found; a row as similar as the
        k-th counts as one. Weight error is the mean shortfall of the found similarities.
        """
        k = self.similarities.shape[1]
        if k == 0:
            return torch.ones(len(self.ids), dtype=torch.float64), 0.0
        ids, found = rerank_float64(self.rows, rows, candidates, k)
        hits = (ids >= 0) & (found >= self.similarities[:, -1:] - FLOAT64_ROUNDING)
        return hits.double().mean(1), float((self.similarities - found).mean())

    def probes(self, centres: torch.Tensor, lists: torch.Tensor, recall: float) -> int:
        """
        The fewest lists that a row probes for this recall, with 95 % confidence.

        `centres` (L, d) are of the lists, and `lists` (S, k) those of the exact neighbours: a
        neighbour is found if its list is among the row's nearest ones.
        """
        products = self.rows.double() @ centres.double().T  # (S, L)
        # Equal centres count as nearer ones.
        nearer = [
            (products >= products.gather(1, own[:, None]) - FLOAT64_ROUNDING).sum(1)
            for own in lists.long().T
        ]
        needed = torch.stack(nearer, 1) if nearer else torch.ones(len(self.ids), 1)  # (S, k)
        for probes in range(1, len(centres)):
            if confirms((needed <= probes).double().mean(1), recall):
                return probes
        return len(centres)


def confirms(found: torch.Tensor, recall: float) -> bool:
    """
    Whether the recalls (S,) of random rows mean at least this one, with 95 % confidence.

    The neighbours of one row are often found or missed together: a row is one observation.
    """
    error = found.std(correction=0) / math.sqrt(max(1, len(found)))
    return bool(found.mean() - CONFIDENCE_STANDARD_ERRORS * error >= recall)
