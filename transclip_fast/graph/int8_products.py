"""
Products of rows in int8 on a CPU, and in float32 of the pairs that may be neighbours.

An int8 product takes a quarter of the time of a float32 one. Its error is bounded,
|a.b - a'.b'| <= |a - a'| |b| + |a'| |b - b'|, by terms known for every row, so no pair is missed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from transclip_fast.data.feature_rows import Rows, evenly_spaced_rows
from transclip_fast.graph.rerank import BestLists, Finds
from transclip_fast.ops.numba_loops import FAST, LOWEST_SCORE, F, compiled, enter
from transclip_fast.ops.numba_topk import CHUNK_ENTRIES, at_least, chunk_maxima, dot, to_int8
from transclip_fast.parallel import parallel_map

CENTRE_ROWS = 512  # sampled rows, whose mean is subtracted from all
CACHED_PRODUCTS = 1 << 17  # int32, at a time: they fit a core's cache
FINDS_PER_ENTRY = (
    4  # of a block, at most, for each entry of its lists; only copies of one row have more
)
EPSILON = np.finfo(np.float32).eps
STEP, ALONG, NORM, LOST = range(4)  # terms of a row
SIDE = "Tuple((int64[::1], float32[:, ::1], float32[::1], float32[::1]))"


class Int8Products:
    """Finds among held rows, of which it makes a copy in int8, as those of `BestLists.find`."""

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

    def find(self, ids: torch.Tensor, others: torch.Tensor, best: BestLists) -> list[Finds]:
        """Products of two blocks, or of one with itself, that may enter the lists of both."""
        if ids is others:
            return [self._top(ids, ids, best.size)]
        pairs, n = np.empty((FINDS_PER_ENTRY * best.size * len(ids), 2), np.int64), 0
        values = np.empty(len(pairs), np.float32)
        sides = self._side(ids, others, best), self._side(others, ids, best)
        for first, products in self._products(ids, others):
            n = enter_above(products, first, self._rows, *sides, n, pairs, values)
            if n > len(pairs):
                return [self._top(ids, others, best.size), self._top(others, ids, best.size)]
        row, other = torch.from_numpy(pairs[:n]).T
        found = torch.from_numpy(values[:n])
        return [(row, other, found), (other, row, found)]

    def _side(
        self, ids: torch.Tensor, others: torch.Tensor, best: BestLists
    ) -> tuple[np.ndarray, ...]:
        """Of some rows: ids, terms, the least product for their lists in float32, and in int8."""
        terms, limits = self._terms.take(ids.numpy(), 1), best.values[ids, -1].numpy()
        int8_limits = np.maximum(limits - self._errors(terms, others), LOWEST_SCORE)
        return ids.numpy(), terms, limits, int8_limits

    def _errors(self, terms: np.ndarray, others: torch.Tensor) -> np.ndarray:
        """Bound (n,) of the error of each row's products with any of the others."""
        norm, lost = self._terms[NORM:].take(others.numpy(), 1).max(1)
        bounds = terms[LOST] * norm + (terms[NORM] + terms[LOST]) * lost
        errors: np.ndarray = bounds + F(self._rows.shape[1]) * EPSILON  # float32 sums
        return errors

    def _top(self, ids: torch.Tensor, others: torch.Tensor, size: int) -> Finds:
        """The `size` largest products of each of some rows with others."""
        size = min(size, len(others))
        values = np.full((len(ids), size), -np.inf, np.float32)
        places = np.zeros(values.shape, np.int32)
        terms, other_terms = (self._terms.take(some.numpy(), 1) for some in (ids, others))
        side = ids.numpy(), terms, 2 * self._errors(terms, others)
        for first, products in self._products(ids, others):
            enter_largest(
                products, first, self._rows, *side, others.numpy(), other_terms, ids is others,
                values, places,
            )  # fmt: skip
        found = torch.from_numpy(values)
        rows, used = ids[:, None].expand(found.shape), found > -torch.inf
        return rows[used], others[torch.from_numpy(places).long()][used], found[used]

    def _products(
        self, ids: torch.Tensor, others: torch.Tensor
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the start of each part of the rows `ids`, and its int8 products (n, C)."""
        codes, other_codes = (self._codes.index_select(0, some) for some in (ids, others))
        size = max(1, CACHED_PRODUCTS // len(others))
        buffer = torch.empty(min(size, len(ids)), len(others), dtype=torch.int32)
        for first in range(0, len(ids), size):
            part = codes[first : first + size]
            yield first, torch._int_mm(part, other_codes.T, out=buffer[: len(part)]).numpy()


@compiled(
    "void(float32[:, ::1], float32[::1], int8[:, ::1], float32[::1], float32[::1], float32[::1])",
    fastmath=FAST,
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
    "void(int32[::1], float32[:, ::1], int64, float32[:, ::1], float32, float32[::1],float32[::1])",
    fastmath=FAST,
)
def excess(products, terms, i, other_terms, low, lows, out):  # type: ignore[no-untyped-def]
    """Int8 products (C,) of row i less the lower of the two rows' limits."""
    step, along = terms[STEP, i], terms[ALONG, i]
    steps, others_along = other_terms[STEP], other_terms[ALONG]
    for j in range(len(out)):
        product = step * steps[j] * F(products[j]) + along + others_along[j]
        out[j] = product - min(low, lows[j])


@compiled(
    f"int64(int32[:, ::1], int64, float32[:, ::1], {SIDE}, {SIDE}, int64, int64[:, ::1],"
    "float32[::1])"
)
def enter_above(products, first, features, side, other_side, n, pairs, values):  # type: ignore[no-untyped-def]
    """
    Write the pairs whose product exceeds the limit of either row, from the n-th find on.

    Returns the number of finds; one more than there is room for if the room was too small.
    """
    ids, terms, limits, lows = side
    others, other_terms, other_limits, other_lows = other_side
    row = np.empty(len(others), np.float32)
    maxima = np.empty(-(-len(row) // CHUNK_ENTRIES), np.float32)
    where = np.empty(len(row) + 1, np.int32)
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
                pairs[n, 0], pairs[n, 1], values[n] = ids[i], others[j], exact
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
    """Write the largest products of each row into its list; if `same`, without itself."""
    n, size = len(others), values.shape[1]
    row, found = np.empty(n, np.float32), np.empty(n, np.float32)
    maxima = np.empty(-(-n // CHUNK_ENTRIES), np.float32)
    largest, unused = np.full(size, -F(np.inf)), np.empty(size, np.int32)
    where, no_limits = np.empty(n + 1, np.int32), np.zeros(n, np.float32)
    for r in range(len(products)):
        i = first + r
        excess(products[r], terms, i, other_terms, F(0), no_limits, row)
        if same:
            row[i] = LOWEST_SCORE
        chunk_maxima(row, maxima)
        # The size-th largest product is at least the size-th largest of the chunks' maxima.
        enter(maxima, where, LOWEST_SCORE, F(4), largest, unused, -F(np.inf))
        low = max(largest.min() - margins[i], LOWEST_SCORE / F(2))
        count = at_least(row, maxima, low, where)
        for c in range(count):
            found[c] = dot(features[ids[i]], features[others[where[c]]])
        enter(found[:count], where, LOWEST_SCORE, F(4), values[i], places[i], -F(np.inf))
