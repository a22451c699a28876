"""The most similar rows found so far, while products arrive block by block, and the last word."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from transclip_fast.data.feature_rows import Rows

SPARE = 4  # candidates beyond those asked for, which float32 may have misplaced
MERGE_ROWS = 1 << 16
DECIDE_ROWS = 512
Finds = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # rows, candidates, products (F,)


class BestLists:
    """
    Of each row the `size` largest products found so far, in float32.

    Parameters
    ----------
    n_rows, size : int

    Attributes
    ----------
    values : Tensor (n_rows, size) float32
        Best first; -inf where there are fewer.
    ids : Tensor (n_rows, size) int64
        Of which row they are; -1 where there are fewer.
    """

    def __init__(self, n_rows: int, size: int, device: torch.device | str = "cpu") -> None:
        self.size = size
        self.values = torch.full((n_rows, size), -torch.inf, dtype=torch.float32, device=device)
        self.ids = torch.full((n_rows, size), -1, device=device)
        self._waiting: list[Finds] = []
        self._n_waiting = 0

    def find(self, products: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> Finds:
        """
        What products (R, C) may add to the lists of `rows` (R,) and of `columns` (C,).

        Changes nothing, so that threads may share it.
        """
        limits = self.values[:, -1]
        wanted = products > limits[rows][:, None]
        wanted |= products > limits[columns]
        cells = wanted.view(-1).nonzero()[:, 0]
        if len(cells) > self.size * len(rows):  # as with copies of one image: no more than can stay
            return joined(self.top(products, rows, columns), self.top(products.T, columns, rows))
        row = cells // products.shape[1]
        found = rows[row], columns[cells - row * products.shape[1]], products.view(-1)[cells]
        return joined(found, (found[1], found[0], found[2]))

    def top(self, products: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> Finds:
        """The largest of products (R, C) for each of `rows` (R,), as many as its list holds."""
        values, places = products.topk(min(self.size, len(columns)), dim=1)
        return (
            rows[:, None].expand_as(places).flatten(),
            columns[places].flatten(),
            values.flatten(),
        )

    def add(self, found: Finds) -> None:
        """Take what was found; a pair may come twice. It waits to be merged."""
        self._waiting.append(found)
        self._n_waiting += len(found[0])

    def merge(self, waiting: int = 0) -> None:
        """Bring what was added into `values` and `ids`, once more than `waiting` finds wait."""
        if self._n_waiting <= waiting:
            return
        rows, ids, values = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._n_waiting = [], 0
        better = values > self.values[rows, -1]
        if not better.any():
            return
        rows, ids, values = rows[better], ids[better], values[better]
        order = values.argsort(descending=True, stable=True)
        order = order[rows[order].argsort(stable=True)]
        rows, ids, values = rows[order], ids[order], values[order]
        takers, counts = torch.unique_consecutive(rows, return_counts=True)
        stops = counts.cumsum(0)
        place = torch.arange(len(rows), device=rows.device)
        place -= (stops - counts).repeat_interleave(counts)
        start = 0
        for some, last in zip(
            torch.split(takers, MERGE_ROWS), torch.split(stops, MERGE_ROWS), strict=True
        ):
            part = slice(start, int(last[-1]))
            line = torch.searchsorted(some, rows[part])
            self._insert(some, line, place[part], ids[part], values[part])
            start = part.stop

    def _insert(
        self,
        takers: torch.Tensor,
        line: torch.Tensor,
        place: torch.Tensor,
        ids: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Finds of `takers` (T,), each the `place`-th best of its line, into their lists."""
        room = 2 * self.size  # a pair offered twice takes two places
        fits = place < room
        cell = line[fits], self.size + place[fits]
        shape = (len(takers), self.size + room)
        all_values = values.new_full(shape, -torch.inf)
        all_ids = ids.new_full(shape, -1)
        all_values[:, : self.size], all_ids[:, : self.size] = self.values[takers], self.ids[takers]
        all_values[cell], all_ids[cell] = values[fits], ids[fits]
        all_ids, order = all_ids.sort(dim=1)
        all_values = all_values.gather(1, order)
        all_values[:, 1:][all_ids[:, 1:] == all_ids[:, :-1]] = -torch.inf
        best, order = all_values.topk(self.size, dim=1)
        self.values[takers] = best
        self.ids[takers] = all_ids.gather(1, order).where(best > -torch.inf, -1)

    def doubtful(self, k: int, dim: int) -> torch.Tensor:
        """Rows (n,) int64 whose k best float32 may have misplaced: two are nearly equal."""
        gaps = -self.values[:, : k + 1].diff(dim=1)
        rounding = dim * torch.finfo(torch.float32).eps  # of two sums of `dim` products
        return (~(gaps > rounding)).any(1).nonzero()[:, 0]  # where both are -inf, the gap is NaN

    def state(self) -> dict[str, np.ndarray]:
        """What `restore` needs to go on from here."""
        self.merge()
        return {"values": self.values.cpu().numpy(), "ids": self.ids.cpu().numpy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from an earlier `state`."""
        self.values.copy_(torch.from_numpy(state["values"]))
        self.ids.copy_(torch.from_numpy(state["ids"]))


def joined(first: Finds, second: Finds) -> Finds:
    """Both."""
    rows, candidates, products = (torch.cat(parts) for parts in zip(first, second, strict=True))
    return rows, candidates, products


def decide(
    rows: torch.Tensor, queries: Rows | torch.Tensor, candidates: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The k best of each row's candidates in float64, equal ones by the lower id.

    Parameters
    ----------
    rows : Tensor (B, d)
    queries : (N, d)
        What the candidates are rows of.
    candidates : Tensor (B, C) int64
        In any order, -1 where there is none.

    Returns
    -------
    ids : Tensor (B, k) int64
        Best first, -1 where there is none.
    similarities : Tensor (B, k) float64
        0 where there is none.
    """
    ids = candidates.sort(dim=1).values
    similarity = products(rows, queries, ids)
    similarity[ids < 0] = -torch.inf
    order = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]
    ids, similarity = ids.gather(1, order), similarity.gather(1, order)
    return ids, similarity.where(ids >= 0, 0.0)


def products(rows: torch.Tensor, queries: Rows | torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Products (B, C) float64 of rows (B, d) with the queries `ids` (B, C); any where id is -1."""
    parts = [
        (queries[some.clamp_min(0)].double() @ block.double()[:, :, None])[:, :, 0]
        for some, block in zip(
            torch.split(ids, DECIDE_ROWS), torch.split(rows, DECIDE_ROWS), strict=True
        )
    ]
    return torch.cat(parts)
