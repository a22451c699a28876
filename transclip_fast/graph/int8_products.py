"""
The largest products of rows of norm 1 at most, from int8 products on a CPU.

With AVX512-VNNI an int8 product takes a quarter to a ninth of the time of a float32 one. Its error
is bounded, |a.b - a'.b'| <= |a - a'| |b| + |a'| |b - b'|, by terms known for every row. Pairs that
may be among the largest are multiplied again in float32, so none is missed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from transclip_fast.compiled_loops import compiled
from transclip_fast.data.feature_rows import Rows, evenly_spaced_rows
from transclip_fast.graph.candidates import Candidates, float32_rounding
from transclip_fast.ops.blocks import blocks
from transclip_fast.ops.numba_candidates import insert
from transclip_fast.ops.numba_loops import LOWEST_SCORE, F, enter
from transclip_fast.ops.numba_topk import CHUNK_ENTRIES, at_least, chunk_maxima, dot, to_int8
from transclip_fast.parallel import parallel_map

INT8_CENTRE_ROWS = 512  # sampled rows, whose mean is subtracted from all
# Rows of products, and columns: (256, 2048) int32 fit a core's cache.
BLOCK_ROWS, TILE_ROWS = 256, 2048
STEP, ALONG, NORM, LOST = range(4)  # terms of a row
BEYOND = F(4)  # any product of such rows, and its error


@dataclass(frozen=True)
class Int8Rows:
    """
    Rows (n, d) of norm 1 at most, and the same less a centre in int8.

    Parameters
    ----------
    rows : ndarray (n, d) float32
    centre : Tensor (d,) float32
    codes : Tensor (n, d) int8
        Each row less the centre, as multiples of its own step.
    terms : ndarray (4, n) float32
        Of each row less the centre STEP, NORM and LOST, the norm of the error of its codes; and
        ALONG, row . centre - |centre|^2 / 2, which completes its products.
    """

    rows: np.ndarray
    centre: torch.Tensor
    codes: torch.Tensor
    terms: np.ndarray

    @classmethod
    def of(cls, rows: torch.Tensor, centre: torch.Tensor) -> Int8Rows:
        """The rows (n, d) less the centre (d,)."""
        found = cls.empty(rows, centre)
        found.encode()
        return found

    @classmethod
    def empty(cls, rows: torch.Tensor, centre: torch.Tensor) -> Int8Rows:
        """The same, before `encode`."""
        codes, rows = torch.empty(rows.shape, dtype=torch.int8), rows.contiguous()
        return cls(rows.numpy(), centre, codes, np.empty((4, len(rows)), np.float32))

    def encode(self) -> None:
        """Set the codes and the terms."""
        arrays = self.rows, self.centre.numpy(), self.codes.numpy()
        to_int8(*arrays, self.terms[STEP], self.terms[NORM])
        rounding_terms(*arrays, self.terms[STEP], self.terms[ALONG], self.terms[LOST])

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, some: slice) -> Int8Rows:
        """Consecutive rows, in the same memory."""
        return Int8Rows(self.rows[some], self.centre, self.codes[some], self.terms[:, some])

    def errors(self, others: Int8Rows) -> np.ndarray:
        """Bound (n,) of the error of the int8 products with any of the others."""
        norm, lost = others.terms[NORM:].max(1)
        bounds = self.terms[LOST] * norm + (self.terms[NORM] + self.terms[LOST]) * lost
        errors: np.ndarray = bounds + F(float32_rounding(self.rows.shape[1]))
        return errors

    def enter(
        self,
        others: Int8Rows,
        ids: np.ndarray,
        other_ids: np.ndarray,
        lowest: np.ndarray,
        found: Candidates,
    ) -> int:
        """
        Enter the products with others (M, d) less the same centre into the candidates of these.

        Candidates are named `other_ids` (M,); of equal products those of lower names stay. Products
        below `lowest` (n,) may be left out, and that of a row with itself, by `ids` (n,), is.
        Returns how many were multiplied again.
        """
        products = torch._int_mm(self.codes, others.codes.T).numpy()
        terms = (self.terms[STEP], self.terms[ALONG], others.terms[STEP], others.terms[ALONG])
        lists = found.values.numpy(), found.ids.numpy()
        bounds = self.errors(others), lowest
        again: int = enter_largest(
            products, self.rows, others.rows, *terms, ids, other_ids, *bounds, *lists
        )
        return again

    def largest(self, others: Int8Rows, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `products.largest`, of the products with others (M, d) less the same centre."""
        found = Candidates.empty(len(self), min(size, len(others)))
        none, lowest = np.full(len(self), -1), np.full(len(self), -np.inf, np.float32)
        self.enter(others, none, np.arange(len(others)), lowest, found)
        return found.values, found.ids


class Int8Search:
    """Searches held rows, of which it makes a copy in int8."""

    def __init__(self, rows: Rows) -> None:
        centre = rows[evenly_spaced_rows(len(rows), INT8_CENTRE_ROWS)].mean(0)
        self._rows = Int8Rows.empty(rows[:], centre)
        parallel_map(lambda block: self._rows.part(block).encode(), rows.blocks())
        self._ids = np.arange(len(rows))

    def panel(self, panel: slice, found: Candidates) -> None:
        """Fill `found` for a panel of rows, from all their products."""
        for block in blocks(panel.stop, BLOCK_ROWS, panel.start):
            part = found.part(slice(block.start - panel.start, block.stop - panel.start))
            lowest = np.full(block.stop - block.start, -np.inf, np.float32)
            rows, ids = self._rows.part(block), self._ids[block]
            for tile in blocks(len(self._rows), TILE_ROWS):
                rows.enter(self._rows.part(tile), ids, self._ids[tile], lowest, part)


@compiled(
    "void(float32[:, ::1], float32[::1], int8[:, ::1], float32[::1], float32[::1], float32[::1])",
    fastmath=True,
)
def rounding_terms(rows, centre, codes, steps, along, lost):  # type: ignore[no-untyped-def]
    """Terms ALONG and LOST of rows (n, d), from their codes and steps."""
    middle = dot(centre, centre) / F(2)
    for i in range(len(rows)):
        squares = F(0)
        for x in range(len(centre)):
            rest = rows[i, x] - centre[x] - steps[i] * F(codes[i, x])
            squares += rest * rest
        along[i], lost[i] = dot(rows[i], centre) - middle, np.sqrt(squares)


@compiled(
    "void(int32[::1], float32, float32, float32[::1], float32[::1], float32[::1])", fastmath=True
)
def to_products(products, step, along, steps, others_along, out):  # type: ignore[no-untyped-def]
    """Products (C,) of a row with others from their int8 products."""
    for j in range(len(out)):
        out[j] = step * steps[j] * F(products[j]) + along + others_along[j]


@compiled(
    "int64(int32[:, ::1], float32[:, ::1], float32[:, ::1], float32[::1], float32[::1],"
    "float32[::1], float32[::1], int64[::1], int64[::1], float32[::1], float32[::1],"
    "float32[:, ::1], int64[:, ::1])"
)
def enter_largest(  # type: ignore[no-untyped-def]
    products, rows, others, steps, along, others_steps, others_along, ids, other_ids,
    errors, lowest, values, found_ids,
):  # fmt: skip
    """
    Enter int8 products (n, M) of rows (n, d) with others (M, d) into lists (n, size).

    Returns how many pairs were multiplied in float32.
    """
    n_columns, last = products.shape[1], values.shape[1] - 1
    row, where = np.empty(n_columns, np.float32), np.empty(n_columns + 1, np.int32)
    maxima = np.empty(-(-n_columns // CHUNK_ENTRIES), np.float32)
    # One more than the list takes: the row itself may be among them.
    tops, unused = np.full(last + 2, LOWEST_SCORE), np.empty(last + 2, np.int32)
    again = 0
    for r in range(len(products)):
        to_products(products[r], steps[r], along[r], others_steps, others_along, row)
        low = max(lowest[r], values[r, last])
        if chunk_maxima(row, maxima) < low - errors[r]:
            continue
        if low == -np.inf:
            # The last entry will be at least as large as the last of these, less its error.
            some = maxima if len(maxima) >= len(tops) else row
            enter(some, where, -BEYOND, BEYOND, tops, unused, LOWEST_SCORE)
            low = max(tops.min() - errors[r], -BEYOND)
        for c in range(at_least(row, maxima, low - errors[r], where)):
            j = where[c]
            # By id: copies of a row are its neighbours.
            if row[j] >= values[r, last] - errors[r] and other_ids[j] != ids[r]:
                again += 1
                insert(dot(rows[r], others[j]), other_ids[j], values[r], found_ids[r])
    return again
