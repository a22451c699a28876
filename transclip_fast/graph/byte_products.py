"""
Products of rows in 8 bits on a CPU, and in float32 of the pairs that may be neighbours.

A product in 8 bits takes a quarter of the time. By how much it may be off is known of every row,
|a.b - a'.b'| <= |a - a'| |b| + |a'| |b - b'|, so no pair is missed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from transclip_fast.data.feature_rows import Rows, evenly_spaced_rows
from transclip_fast.graph.best import BestLists, Finds, joined
from transclip_fast.ops.numba_loops import FAST, LOWEST_SCORE, F, compiled, enter
from transclip_fast.ops.numba_topk import CHUNK_ENTRIES, at_least, chunk_maxima, dot, to_int8
from transclip_fast.parallel import ThreadBuffer, parallel_map

SAMPLE = 512  # rows whose mean is taken off all
CELLS = 1 << 17  # of products that stay in a core's cache
EPSILON = np.finfo(np.float32).eps
ROOM = 4  # finds of a block, for each entry of its lists
STEP, ALONG, NORM, LOST = range(4)


class ByteProducts:
    """
    Finds among held rows, as `BestLists.find` and `BestLists.top` give them.

    Parameters
    ----------
    rows : Rows (N, d)
        Kept beside them: a byte for each entry.
    """

    def __init__(self, rows: Rows) -> None:
        centre = rows[evenly_spaced_rows(len(rows), SAMPLE)].mean(0).numpy()
        self._rows = rows[:].numpy()
        self._codes = torch.empty(rows.shape, dtype=torch.int8)
        # Of each row less the centre: its step, its norm, the norm of what the codes miss; and
        # row . centre - |centre|^2 / 2, which the products leave out.
        self._terms = np.empty((4, len(rows)), np.float32)
        self._buffer = ThreadBuffer(torch.int32)

        def part(block: slice) -> None:
            arrays = self._rows[block], centre, self._codes[block].numpy()
            steps, along, norms, lost = (term[block] for term in self._terms)
            to_int8(*arrays, steps, norms)
            measure(*arrays, steps, along, lost)

        parallel_map(part, rows.blocks())

    def find(self, ids: torch.Tensor, others: torch.Tensor, best: BestLists) -> Finds:
        """What the products of two blocks, or of one with itself, may add to the lists of both."""
        if ids is others:
            return self._top(ids, ids, best.size)
        finds, n = np.empty((ROOM * best.size * len(ids), 2), np.int64), 0
        values = np.empty(len(finds), np.float32)
        sides = *self._limited(ids, others, best), *self._limited(others, ids, best)
        for first, products in self._products(ids, others):
            n = enter_above(products, first, self._rows, *sides, n, finds, values)
            if n > len(finds):  # as with copies of one image: no more than can stay
                return joined(self._top(ids, others, best.size), self._top(others, ids, best.size))
        row, other = torch.from_numpy(finds[:n]).T
        offered = torch.from_numpy(values[:n])
        return joined((row, other, offered), (other, row, offered))

    def _limited(
        self, ids: torch.Tensor, others: torch.Tensor, best: BestLists
    ) -> tuple[np.ndarray, ...]:
        """Rows, their terms, what is above their lists, and what may be in 8 bits."""
        terms, limits = self._terms.take(ids.numpy(), 1), best.values[ids, -1].numpy()
        lows = np.maximum(limits - self._errors(terms, others), LOWEST_SCORE)
        return ids.numpy(), terms, limits, lows

    def _errors(self, terms: np.ndarray, others: torch.Tensor) -> np.ndarray:
        """By how much a product of each row with any of the others may be off, (n,)."""
        norm, lost = self._terms[NORM:].take(others.numpy(), 1).max(1)
        off = terms[LOST] * norm + (terms[NORM] + terms[LOST]) * lost
        errors: np.ndarray = off + F(self._rows.shape[1]) * EPSILON  # and of sums in float32
        return errors

    def _top(self, ids: torch.Tensor, others: torch.Tensor, size: int) -> Finds:
        """The largest products of each of some rows with others, as many as its list holds."""
        size = min(size, len(others))
        values = np.full((len(ids), size), -np.inf, np.float32)
        places = np.zeros(values.shape, np.int32)
        terms, other_terms = (self._terms.take(some.numpy(), 1) for some in (ids, others))
        margins = 2 * self._errors(terms, others)
        sides = ids.numpy(), terms, margins, others.numpy(), other_terms
        for first, products in self._products(ids, others):
            enter_largest(products, first, self._rows, *sides, ids is others, values, places)
        found = torch.from_numpy(values)
        rows, used = ids[:, None].expand(found.shape), found > -torch.inf
        return rows[used], others[torch.from_numpy(places).long()][used], found[used]

    def _products(
        self, ids: torch.Tensor, others: torch.Tensor
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Products in 8 bits of some of the rows at a time, the first of which is told."""
        codes, other_codes = (self._codes.index_select(0, some) for some in (ids, others))
        size = max(1, CELLS // len(others))
        for first in range(0, len(ids), size):
            some = codes[first : first + size]
            products = self._buffer.block(len(some), len(others))
            yield first, torch._int_mm(some, other_codes.T, out=products).numpy()


@compiled(
    "void(float32[:, ::1], float32[::1], int8[:, ::1], float32[::1], float32[::1], float32[::1])",
    fastmath=FAST,
)
def measure(rows, centre, codes, steps, along, lost):  # type: ignore[no-untyped-def]
    """Of rows (n, d): what the products leave out, and the norm of what the codes miss."""
    middle = dot(centre, centre) / F(2)
    for i in range(len(rows)):
        missed = F(0)
        for x in range(len(centre)):
            rest = rows[i, x] - centre[x] - steps[i] * F(codes[i, x])
            missed += rest * rest
        along[i], lost[i] = dot(rows[i], centre) - middle, np.sqrt(missed)


@compiled(
    "void(int32[::1], float32[:, ::1], int64, float32[:, ::1], float32, float32[::1],float32[::1])",
    fastmath=FAST,
)
def excess(products, terms, i, other_terms, low, lows, out):  # type: ignore[no-untyped-def]
    """What products (C,) in 8 bits say of those of row i, less the lower of two limits."""
    step, along = terms[STEP, i], terms[ALONG, i]
    steps, others_along = other_terms[STEP], other_terms[ALONG]
    for j in range(len(out)):
        product = step * steps[j] * F(products[j]) + along + others_along[j]
        out[j] = product - min(low, lows[j])


@compiled(
    "int64(int32[:, ::1], int64, float32[:, ::1],"
    "int64[::1], float32[:, ::1], float32[::1], float32[::1],"
    "int64[::1], float32[:, ::1], float32[::1], float32[::1],"
    "int64, int64[:, ::1], float32[::1])"
)
def enter_above(  # type: ignore[no-untyped-def]
    products,
    first,
    features,
    ids,
    terms,
    limits,
    lows,
    others,
    other_terms,
    other_limits,
    other_lows,
    n,
    finds,
    values,
):
    """
    Enter the pairs whose product is above the limit of either row after the n-th find.

    Their number then; more than there is room for where that ended the search.
    """
    row = np.empty(len(others), np.float32)
    maxima, where = (
        np.empty(-(-len(row) // CHUNK_ENTRIES), np.float32),
        np.empty(len(row) + 1, np.int32),
    )
    for r in range(len(products)):
        i = first + r
        excess(products[r], terms, i, other_terms, lows[i], other_lows, row)
        if chunk_maxima(row, maxima) < 0:
            continue
        for c in range(at_least(row, maxima, F(0), where)):
            j = where[c]
            exact = dot(features[ids[i]], features[others[j]])
            if exact > min(limits[i], other_limits[j]):
                if n == len(values):
                    return n + 1
                finds[n, 0], finds[n, 1], values[n] = ids[i], others[j], exact
                n += 1
    return n


@compiled(
    "void(int32[:, ::1], int64, float32[:, ::1],"
    "int64[::1], float32[:, ::1], float32[::1], int64[::1], float32[:, ::1],"
    "boolean, float32[:, ::1], int32[:, ::1])"
)
def enter_largest(  # type: ignore[no-untyped-def]
    products, first, features, ids, terms, margins, others, other_terms, same, values, places
):
    """Enter the largest products of each row into its list; `same` rows leave themselves out."""
    n, size = len(others), values.shape[1]
    row, found = np.empty(n, np.float32), np.empty(n, np.float32)
    maxima, best = np.empty(-(-n // CHUNK_ENTRIES), np.float32), np.empty(size, np.float32)
    where, lows = np.empty(n + 1, np.int32), np.zeros(n, np.float32)
    for r in range(len(products)):
        i = first + r
        excess(products[r], terms, i, other_terms, F(0), lows, row)
        if same:
            row[i] = LOWEST_SCORE
        chunk_maxima(row, maxima)
        # The size-th largest of all is at least that of the chunks' maxima.
        best[:] = LOWEST_SCORE
        for top in maxima:
            place = size
            while place > 0 and top > best[place - 1]:
                if place < size:
                    best[place] = best[place - 1]
                place -= 1
            if place < size:
                best[place] = top
        low = max(best[size - 1] - margins[i], LOWEST_SCORE / F(2))
        count = at_least(row, maxima, low, where)
        for c in range(count):
            found[c] = dot(features[ids[i]], features[others[where[c]]])
        enter(found[:count], where, LOWEST_SCORE, F(4), values[i], places[i], -F(np.inf))
