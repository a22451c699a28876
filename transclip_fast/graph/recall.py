"""How good approximate neighbours are: measured on a sample of rows against exact search."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from transclip_fast.data.feature_rows import Rows
from transclip_fast.graph.best import BestLists, decide
from transclip_fast.graph.exact import nearest

SAMPLE = 1000
SEED = 1
ONE_SIDED = 1.645  # standard errors
ROUNDING = 1e-9  # two sums of one product in float64


@dataclass(frozen=True)
class Sample:
    """
    Some rows with their exact neighbours.

    Parameters
    ----------
    ids : Tensor (S,) int64
    rows : Tensor (S, d)
    similarities : Tensor (S, k) float64
        Of the k most similar other rows, best first; k is cut to N - 1.
    """

    ids: torch.Tensor
    rows: torch.Tensor
    similarities: torch.Tensor

    @classmethod
    def draw(cls, rows: Rows, k: int) -> Sample:
        """At most 1000 random rows, searched exactly."""
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))
        ids = order[:SAMPLE].sort().values.to(rows.device)
        own = rows[ids]
        return cls(ids, own, nearest(own, rows, k, own=ids)[1])

    def meets(self, rows: Rows, best: BestLists, recall: float) -> bool:
        """Whether `best` has this recall of all rows, as surely as the sample can tell: 95 %."""
        found, _ = self.measure(rows, best)
        error = math.sqrt(found * (1 - found) / max(1, self.similarities.numel()))
        return found - ONE_SIDED * error >= recall

    def measure(self, rows: Rows, best: BestLists) -> tuple[float, float]:
        """
        Recall and weight error of what `best` holds of these rows.

        Recall is the share of the k exact neighbours that were found, where one as similar as the
        k-th is as good; weight error the mean by which the found similarities fall short.
        """
        k = self.similarities.shape[1]
        if k == 0:
            return 1.0, 0.0
        ids, found = decide(self.rows, rows, best.ids[self.ids], k)
        hits = (ids >= 0) & (found >= self.similarities[:, -1:] - ROUNDING)
        return float(hits.double().mean()), float((self.similarities - found).mean())
