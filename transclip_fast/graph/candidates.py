"""Candidates for the neighbours of every row, and the float64 decision among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from transclip_fast.callbacks import SavedState
from transclip_fast.data.feature_rows import Rows

SPARE_CANDIDATES = 4  # beyond the k neighbours, since float32 may misorder the last ones
RERANK_ROWS = 512  # rows whose candidates are gathered at a time, (512, C, d)


@dataclass
class Candidates:
    """
    The most similar other rows found of each row, best first.

    `ids` (N, C) int64, and `values` (N, C) float32, their products; -1 and -inf for none.
    """

    ids: torch.Tensor
    values: torch.Tensor

    @classmethod
    def empty(cls, n_rows: int, size: int, device: torch.device | str = "cpu") -> Candidates:
        """`size` entries a row."""
        values = torch.full((n_rows, size), -torch.inf, dtype=torch.float32, device=device)
        return cls(torch.full((n_rows, size), -1, device=device), values)

    @property
    def size(self) -> int:
        """C."""
        return self.ids.shape[1]

    def part(self, rows: slice) -> Candidates:
        """Those of consecutive rows, in the same memory."""
        return Candidates(self.ids[rows], self.values[rows])

    def clear(self) -> None:
        """Leave no candidates."""
        self.ids.fill_(-1)
        self.values.fill_(-torch.inf)

    def ambiguous_rows(self, k: int, rounding: float) -> torch.Tensor:
        """Rows (n,) int64 whose k best may be misordered: two products differ by that rounding."""
        gaps = -self.values[:, : k + 1].diff(dim=1)
        return (~(gaps > rounding)).any(1).nonzero()[:, 0]  # the gap of two -inf is NaN

    def state(self, **more: ArrayLike) -> SavedState:
        """The candidates as arrays for `restore`, and more arrays of the search beside them."""
        arrays = {name: np.asarray(array) for name, array in more.items()}
        return arrays | {"values": self.values.cpu().numpy(), "ids": self.ids.cpu().numpy()}

    def restore(self, state: SavedState) -> None:
        """Take over the candidates of an earlier `state`."""
        self.values.copy_(torch.from_numpy(state["values"]))
        self.ids.copy_(torch.from_numpy(state["ids"]))


def float32_rounding(dim: int) -> float:
    """Bound of the error of a difference of two float32 products of unit rows."""
    return dim * float(torch.finfo(torch.float32).eps)


def without_self(
    ids: torch.Tensor, values: torch.Tensor, own: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates (B, C + 1) of the rows `own` (B,), sorted, less the row itself; ids first."""
    values = values.masked_fill((ids == own[:, None]) | (ids < 0), -torch.inf)
    values, order = values.topk(ids.shape[1] - 1, dim=1)
    return ids.gather(1, order).masked_fill_(values == -torch.inf, -1), values


def best(found: Sequence[torch.Tensor], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `size` largest of values (B, C) with ids (B, C); of equal ones those of the lower ids."""
    values, ids = found
    order = ids.argsort(dim=1)
    values, ids = values.gather(1, order), ids.gather(1, order)
    order = values.argsort(dim=1, descending=True, stable=True)[:, :size]
    return values.gather(1, order), ids.gather(1, order)


def rerank_float64(
    rows: torch.Tensor, queries: Rows | torch.Tensor, candidates: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The k best candidates of each row by float64 products, best first; of equal ones the lower ids.

    `candidates` (B, C) int64 are ids of queries (N, d) for each of rows (B, d), in any order, -1
    for none. Returns ids (B, k) int64, -1 for none, and similarities (B, k) float64, 0 for none.
    """
    ids = candidates.sort(dim=1).values
    similarity = products_float64(rows, queries, ids)
    similarity[ids < 0] = -torch.inf
    order = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]
    ids, similarity = ids.gather(1, order), similarity.gather(1, order)
    return ids, similarity.where(ids >= 0, 0.0)


def products_float64(
    rows: torch.Tensor, queries: Rows | torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Products (B, C) float64 of rows (B, d) with queries[ids], ids (B, C); undefined for id -1."""
    blocks = zip(torch.split(rows, RERANK_ROWS), torch.split(ids, RERANK_ROWS), strict=True)
    return torch.cat([_products(block, queries[some.clamp_min(0)]) for block, some in blocks])


def _products(rows: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Products (n, C) float64 of rows (n, d) with candidates (n, C, d)."""
    if rows.is_cuda:
        return (candidates.double() @ rows.double()[:, :, None])[:, :, 0]
    # On a CPU einsum converts its operands piece by piece, in cache.
    operands = candidates.numpy(), rows.numpy()
    return torch.from_numpy(np.einsum("ncd,nd->nc", *operands, dtype=np.float64))
