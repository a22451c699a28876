"""Candidate lists filled with float32 products, and the float64 decision among candidates."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.nn.functional import pad

from transclip_fast.callbacks import SavedState
from transclip_fast.data.feature_rows import Rows

SPARE_CANDIDATES = 4  # entries beyond the k neighbours, since float32 may misorder the last ones
MERGE_ROWS = 1 << 16  # lists that are rewritten at a time, to bound memory
RERANK_ROWS = 512  # rows whose candidates are gathered at a time, (512, C, d)
Finds = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # rows, candidates, products: (F,) each


class BestLists:
    """
    The `size` largest products of each row found so far, `values` (N, size) float32, largest
    first, and the other row of each, `ids` (N, size) int64; -inf and -1 for empty entries.
    """

    def __init__(self, n_rows: int, size: int, device: torch.device | str = "cpu") -> None:
        self.size = size
        self.values = torch.full((n_rows, size), -torch.inf, dtype=torch.float32, device=device)
        self.ids = torch.full((n_rows, size), -1, device=device)
        self._waiting: list[Finds] = []
        self._n_waiting = 0

    def find(
        self, products: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> list[Finds]:
        """
        Entries of products (R, C) that may enter the lists of `rows` (R,) or `columns` (C,).

        The lists do not change, so threads may share them.
        """
        limits = self.values[:, -1]
        wanted = products > limits[rows][:, None]
        wanted |= products > limits[columns]
        cells = wanted.view(-1).nonzero()[:, 0]
        if len(cells) > self.size * len(rows):  # many copies of one row: bound the finds
            return [self.top(products, rows, columns), self.top(products.T, columns, rows)]
        row = cells // products.shape[1]
        values = products.view(-1)[cells]
        row, column = rows[row], columns[cells - row * products.shape[1]]
        return [(row, column, values), (column, row, values)]

    def top(self, products: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> Finds:
        """The `size` largest of products (R, C) for each of `rows` (R,)."""
        values, places = products.topk(min(self.size, len(columns)), dim=1)
        owners = rows[:, None].expand_as(places)
        return owners.flatten(), columns[places].flatten(), values.flatten()

    def add(self, finds: list[Finds]) -> None:
        """Queue finds for the next merge; a pair may be added twice."""
        self._waiting += finds
        self._n_waiting += sum(len(rows) for rows, _, _ in finds)

    def merge(self, allowed: int = 0) -> None:
        """Merge the queued finds into the lists if there are more than `allowed` of them."""
        if self._n_waiting <= allowed:
            return
        rows, ids, values = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._n_waiting = [], 0
        better = values > self.values[rows, -1]
        rows, ids, values = rows[better], ids[better], values[better]
        order = values.argsort(descending=True, stable=True)
        order = order[rows[order].argsort(stable=True)]
        rows, ids, values = rows[order], ids[order], values[order]
        owners, counts = torch.unique_consecutive(rows, return_counts=True)
        line = torch.repeat_interleave(counts)  # index of each find's row in `owners`
        place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[line]
        for first in range(0, len(owners), MERGE_ROWS):
            stop = first + MERGE_ROWS
            part = slice(*torch.searchsorted(line, line.new_tensor([first, stop])).tolist())
            self._insert(
                owners[first:stop], line[part] - first, place[part], ids[part], values[part]
            )

    def _insert(
        self,
        owners: torch.Tensor,
        line: torch.Tensor,
        place: torch.Tensor,
        ids: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Insert finds into the lists of `owners`; each is the `place`-th best of its line."""
        room = 2 * self.size  # a pair that was added twice takes two places
        all_values = pad(self.values[owners], (0, room), value=-torch.inf)
        all_ids = pad(self.ids[owners], (0, room), value=-1)
        fits = place < room
        cell = line[fits], self.size + place[fits]
        all_values[cell], all_ids[cell] = values[fits], ids[fits]
        all_ids, order = all_ids.sort(dim=1)
        all_values = all_values.gather(1, order)
        all_values[:, 1:][all_ids[:, 1:] == all_ids[:, :-1]] = -torch.inf
        best, order = all_values.topk(self.size, dim=1)
        self.values[owners] = best
        self.ids[owners] = all_ids.gather(1, order).where(best > -torch.inf, -1)

    def ambiguous_rows(self, k: int, dim: int) -> torch.Tensor:
        """Rows (n,) int64 whose k best float32 may misorder: two products are nearly equal."""
        gaps = -self.values[:, : k + 1].diff(dim=1)
        rounding = dim * torch.finfo(torch.float32).eps  # of two sums of `dim` products
        return (~(gaps > rounding)).any(1).nonzero()[:, 0]  # the gap of two -inf is NaN

    def state(self, **more: ArrayLike) -> SavedState:
        """The lists as arrays for `restore`, and more arrays of the search beside them."""
        self.merge()
        arrays = {name: np.asarray(array) for name, array in more.items()}
        return arrays | {"values": self.values.cpu().numpy(), "ids": self.ids.cpu().numpy()}

    def restore(self, state: SavedState) -> None:
        """Take over the lists of an earlier `state`."""
        self.values.copy_(torch.from_numpy(state["values"]))
        self.ids.copy_(torch.from_numpy(state["ids"]))


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
