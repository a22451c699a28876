"""
Products of rows in int8 on a CPU, and in float32 of the pairs that may be neighbours.

An int8 product takes a quarter of the time of a float32 one. Its error is bounded,
|a.b - a'.b'| <= |a - a'| |b| + |a'| |b - b'|, by terms known for every row, so no pair is missed.
"""

from __future__ import annotations

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

CENTRE_ROWS = 512  # sampled rows, whose mean is subtracted from all
# Rows of products, and columns: (256, 2048) int32 fit a core's cache.
BLOCK_ROWS, TILE_ROWS = 256, 2048
STEP, ALONG, NORM, LOST = range(4)  # terms of a row


class Int8Products:
    """Searches held rows, of which it makes a copy in int8."""

    def __init__(self, rows: Rows) -> None:
        centre = rows[evenly_spaced_rows(len(rows), CENTRE_ROWS)].mean(0).numpy()
        self._rows = rows[:].numpy()
        self._codes = torch.empty(rows.shape, dtype=torch.int8)
        # Terms of each row less the centre: STEP of its codes, NORM, and LOST, the norm of their
        # error; and ALONG, row . centre - |centre|^2 / 2, which completes its products.
        self._terms = np.empty((4, len(rows)), np.float32)

        def encode(block: slice) -> None:
            arrays = self._rows[block], centre, self._codes[block].numpy()
            steps, along, norms, lost = (term[block] for term in self._terms)
            to_int8(*arrays, steps, norms)
            measure(*arrays, steps, along, lost)

        parallel_map(encode, rows.blocks())

    def search(self, panel: slice, found: Candidates) -> None:
        """Fill `found` for a panel of rows, from all their products."""
        for block in blocks(panel.stop, BLOCK_ROWS, panel.start):
            part = found.part(slice(block.start - panel.start, block.stop - panel.start))
            lists = part.values.numpy(), part.ids.numpy()
            lists[0][:] = LOWEST_SCORE
            for tile in blocks(len(self._rows), TILE_ROWS):
                products = torch._int_mm(self._codes[block], self._codes[tile].T).numpy()
                errors = self.errors(block, tile)
                enter_largest(
                    products, block.start, tile.start, self._rows, self._terms, errors, *lists
                )
            lists[0][lists[1] < 0] = -np.inf

    def errors(self, block: slice, others: slice) -> np.ndarray:
        """Bound (n,) of the error of the products of some rows with any of the others."""
        norm, lost = self._terms[NORM:, others].max(1)
        terms = self._terms[:, block]
        bounds = terms[LOST] * norm + (terms[NORM] + terms[LOST]) * lost
        errors: np.ndarray = bounds + F(float32_rounding(self._rows.shape[1]))
        return errors


@compiled(
    "void(float32[:, ::1], float32[::1], int8[:, ::1], float32[::1], float32[::1], float32[::1])",
    fastmath=True,
)
def measure(rows, centre, codes, steps, along, lost):  # type: ignore[no-untyped-def]
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
    "void(int32[:, ::1], int64, int64, float32[:, ::1], float32[:, ::1], float32[::1],"
    "float32[:, ::1], int64[:, ::1])"
)
def enter_largest(  # type: ignore[no-untyped-def]
    products, first_row, first, features, terms, errors, values, ids
):
    """
    Enter int8 products (n, C) into the lists (n, size) of the rows `first_row` and on.

    Their columns are the rows `first` and on, in rising order: of equal products, the first stays.
    """
    n_columns, size = products.shape[1], values.shape[1]
    row, where = np.empty(n_columns, np.float32), np.empty(n_columns + 1, np.int32)
    maxima = np.empty(-(-n_columns // CHUNK_ENTRIES), np.float32)
    tops, unused = np.full(size, LOWEST_SCORE), np.empty(size, np.int32)
    columns = slice(first, first + n_columns)
    steps, along = terms[STEP, columns], terms[ALONG, columns]
    for r in range(len(products)):
        i = first_row + r
        to_products(products[r], terms[STEP, i], terms[ALONG, i], steps, along, row)
        if first <= i < first + n_columns:
            row[i - first] = LOWEST_SCORE  # by id: copies of a row are its neighbours
        largest = chunk_maxima(row, maxima)
        low = values[r, size - 1] - errors[r]
        if largest < low:
            continue
        if ids[r, size - 1] < 0:
            # The size-th largest product is at least the size-th largest of the chunks' maxima.
            enter(maxima, where, LOWEST_SCORE / F(2), F(4), tops, unused, LOWEST_SCORE)
            low = max(low, tops.min() - F(2) * errors[r])
        low = max(low, LOWEST_SCORE / F(2))
        for c in range(at_least(row, maxima, low, where)):
            j = where[c]
            if row[j] >= values[r, size - 1] - errors[r]:
                exact = dot(features[i], features[first + j])
                insert(exact, first + j, values[r], ids[r])
