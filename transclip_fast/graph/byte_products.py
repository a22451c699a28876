"""
Products of rows in 8 bits on a CPU, and in float32 of the pairs that may be neighbours.

A product in 8 bits takes a quarter of the time. By how much it may be off is known of every row,
|a.b - a'.b'| <= |a - a'| |b| + |a'| |b - b'|, so no pair is missed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import torch

from transclip_fast.graph.best import BestLists, Finds, joined
from transclip_fast.ops.candidates import CHUNK, at_least, chunk_maxima, dot, to_bytes
from transclip_fast.ops.loops import FAST, LOWEST, F, compiled, enter
from transclip_fast.rows import Rows
from transclip_fast.threads import each

SAMPLE = 512  # rows whose mean is taken off all
CELLS = 1 << 17  # of products that stay in a core's cache
ROOM = 4  # finds of a block, for each entry of its lists
ROUNDING = 1e-5  # of float32, in all that is compared
STEP, ALONG, LENGTH, LOST = range(4)
LOW, LIMIT = LENGTH, LOST  # in place of those, once they have been used


class ByteProducts:
    """
    Finds among held rows, as `BestLists.find` and `BestLists.top` give them.

    Parameters
    ----------
    rows : Rows (N, d)
        Kept beside them: a byte for each entry.
    """

    def __init__(self, rows: Rows) -> None:
        n = min(SAMPLE, len(rows))
        centre = rows[torch.arange(n) * len(rows) // n].mean(0).numpy()
        self._rows = rows[:].numpy()
        self._codes = torch.empty(rows.shape, dtype=torch.int8)
        # Of each row less the centre: its step, its norm, the norm of what the codes miss; and
        # row . centre - |centre|^2 / 2, which is not in the products.
        self._terms = np.empty((4, len(rows)), np.float32)
        self._buffers = threading.local()

        def part(block: slice) -> None:
            arrays = self._rows[block], centre, self._codes[block].numpy()
            steps, along, length, lost = (term[block] for term in self._terms)
            to_bytes(*arrays, steps)
            measure(*arrays, steps, along, length, lost)

        each(part, rows.blocks())

    def find(self, ids: torch.Tensor, others: torch.Tensor, best: BestLists) -> Finds:
        """What the products of two blocks, or of one with itself, may add to the lists of both."""
        if ids is others:
            return self._top(ids, ids, best.size)
        terms, other_terms = self._limited(ids, others, best), self._limited(others, ids, best)
        finds, n = np.empty((ROOM * best.size * len(ids), 2), np.int64), 0
        values = np.empty(len(finds), np.float32)
        sides = self._rows, ids.numpy(), terms, others.numpy(), other_terms
        for first, products in self._products(ids, others):
            n = above(products, first, *sides, n, finds, values)
            if n > len(finds):  # as with copies of one image: no more than can stay
                return joined(self._top(ids, others, best.size), self._top(others, ids, best.size))
        row, other = torch.from_numpy(finds[:n]).T
        offered = torch.from_numpy(values[:n])
        return joined((row, other, offered), (other, row, offered))

    def _limited(self, ids: torch.Tensor, others: torch.Tensor, best: BestLists) -> np.ndarray:
        """Terms of rows (4, n), with what is above their lists, and may be in 8 bits."""
        terms = self._terms.take(ids.numpy(), 1)
        errors, limits = self._errors(terms, others), best.values[ids, -1].numpy()
        terms[LOW], terms[LIMIT] = limits - errors, limits
        return terms

    def _errors(self, terms: np.ndarray, others: torch.Tensor) -> np.ndarray:
        """By how much a product of each row with any of the others may be off, (n,)."""
        lengths, lost = self._terms[LENGTH:].take(others.numpy(), 1).max(1, initial=0)
        off = terms[LOST] * lengths + (terms[LENGTH] + terms[LOST]) * lost
        errors: np.ndarray = off + F(ROUNDING)
        return errors

    def _top(self, ids: torch.Tensor, others: torch.Tensor, size: int) -> Finds:
        """The largest products of each of some rows with others, as many as its list holds."""
        size = min(size, len(others))
        values = np.full((len(ids), size), -np.inf, np.float32)
        places = np.zeros(values.shape, np.int32)
        terms, other_terms = (self._terms.take(some.numpy(), 1) for some in (ids, others))
        terms[LOW] = 2 * self._errors(terms, others)
        sides = self._rows, ids.numpy(), terms, others.numpy(), other_terms
        for first, products in self._products(ids, others):
            largest(products, first, *sides, ids is others, values, places)
        found = torch.from_numpy(values)
        rows, used = ids[:, None].expand(found.shape), found > -torch.inf
        return rows[used], others[torch.from_numpy(places).long()][used], found[used]

    def _products(
        self, ids: torch.Tensor, others: torch.Tensor
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Products in 8 bits of some of the rows at a time, the first of which is told."""
        codes, other_codes = (self._codes.index_select(0, some) for some in (ids, others))
        size = max(1, CELLS // max(1, len(others)))
        if not hasattr(self._buffers, "products"):
            self._buffers.products = torch.empty(0, dtype=torch.int32)
        if self._buffers.products.numel() < size * len(others):
            self._buffers.products = torch.empty(size * len(others), dtype=torch.int32)
        for first in range(0, len(ids), size):
            some = codes[first : first + size]
            products = self._buffers.products[: len(some) * len(others)].view(len(some), -1)
            yield first, torch._int_mm(some, other_codes.T, out=products).numpy()


@compiled(
    "void(float32[:, ::1], float32[::1], int8[:, ::1], float32[::1], float32[::1], float32[::1],"
    "float32[::1])",
    fastmath=FAST,
)
def measure(rows, centre, codes, steps, along, lengths, lost):  # type: ignore[no-untyped-def]
    """The other terms of rows (n, d) in units of their steps."""
    middle = dot(centre, centre) / F(2)
    for i in range(len(rows)):
        a, length, missed = F(0), F(0), F(0)
        for x in range(len(centre)):
            left = rows[i, x] - centre[x]
            rest = left - steps[i] * F(codes[i, x])
            a += rows[i, x] * centre[x]
            length += left * left
            missed += rest * rest
        along[i], lengths[i], lost[i] = a - middle, np.sqrt(length), np.sqrt(missed)


@compiled(
    "void(int32[::1], float32, float32, float32[:, ::1], float32, float32[::1], float32[::1])",
    fastmath={"reassoc", "contract", "nsz"},
)
def less(products, step, along, other_terms, low, lows, out):  # type: ignore[no-untyped-def]
    """What products (C,) in 8 bits say of those of the rows, less the lower of two limits."""
    steps, others_along = other_terms[STEP], other_terms[ALONG]
    for j in range(len(out)):
        product = step * steps[j] * F(products[j]) + along + others_along[j]
        out[j] = product - min(low, lows[j])


@compiled(
    "int64(int32[:, ::1], int64, float32[:, ::1], int64[::1], float32[:, ::1], int64[::1],"
    "float32[:, ::1], int64, int64[:, ::1], float32[::1])"
)
def above(  # type: ignore[no-untyped-def]
    products, first, features, ids, terms, others, other_terms, n, finds, values
):
    """
    Enter the pairs whose product is above the limit of either row after the n-th find.

    Their number then; more than there is room for where that ended the search.
    """
    row = np.empty(len(others), np.float32)
    maxima, where = np.empty(-(-len(row) // CHUNK), np.float32), np.empty(len(row) + 1, np.int32)
    lows = other_terms[LOW]
    for r in range(len(products)):
        i = first + r
        less(products[r], terms[STEP, i], terms[ALONG, i], other_terms, terms[LOW, i], lows, row)
        if chunk_maxima(row, maxima) < 0:
            continue
        for c in range(at_least(row, maxima, F(0), where)):
            j = where[c]
            exact = dot(features[ids[i]], features[others[j]])
            if exact > min(terms[LIMIT, i], other_terms[LIMIT, j]):
                if n == len(values):
                    return n + 1
                finds[n, 0], finds[n, 1], values[n] = ids[i], others[j], exact
                n += 1
    return n


@compiled(
    "void(int32[:, ::1], int64, float32[:, ::1], int64[::1], float32[:, ::1], int64[::1],"
    "float32[:, ::1], boolean, float32[:, ::1], int32[:, ::1])"
)
def largest(  # type: ignore[no-untyped-def]
    products, first, features, ids, terms, others, other_terms, same, values, places
):
    """Enter the largest products of each row into its list; `same` rows leave themselves out."""
    n, size = len(others), values.shape[1]
    row, found = np.empty(n, np.float32), np.empty(n, np.float32)
    maxima, best = np.empty(-(-n // CHUNK), np.float32), np.empty(size, np.float32)
    where, lows = np.empty(n + 1, np.int32), np.zeros(n, np.float32)
    for r in range(len(products)):
        i = first + r
        less(products[r], terms[STEP, i], terms[ALONG, i], other_terms, F(0), lows, row)
        if same:
            row[i] = LOWEST
        chunk_maxima(row, maxima)
        # The size-th largest of all is at least that of the chunks' maxima.
        best[:] = LOWEST
        for top in maxima:
            place = size
            while place > 0 and top > best[place - 1]:
                if place < size:
                    best[place] = best[place - 1]
                place -= 1
            if place < size:
                best[place] = top
        low = max(best[size - 1] - terms[LOW, i], LOWEST / F(2))
        count = at_least(row, maxima, low, where)
        for c in range(count):
            found[c] = dot(features[ids[i]], features[others[where[c]]])
        enter(found[:count], where, LOWEST, F(4), values[i], places[i], -F(np.inf))
