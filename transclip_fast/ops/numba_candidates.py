"""
Compiled loops that enter products into lists of candidates.

A list has the largest products, and of equal ones those with the lower rows: it is the same in
whatever order they come.
"""

from __future__ import annotations

import numpy as np

from transclip_fast.compiled_loops import compiled
from transclip_fast.ops.numba_topk import CHUNK_ENTRIES, at_least, chunk_maxima


@compiled("void(float32, int64, float32[::1], int64[::1])")
def insert(x, j, values, ids):  # type: ignore[no-untyped-def]
    """Insert the product x with row j into a list (C,), best first, if it is among the best."""
    place = len(values)
    while place > 0 and (x > values[place - 1] or (x == values[place - 1] and j < ids[place - 1])):
        place -= 1
    for c in range(len(values) - 1, place, -1):
        values[c], ids[c] = values[c - 1], ids[c - 1]
    if place < len(values):
        values[place], ids[place] = x, j


@compiled(
    "void(float32[:, ::1], int64[::1], int64[::1], float32[::1], float32[:, ::1], int64[:, ::1])"
)
def enter_products(products, others, rows, lowest, values, ids):  # type: ignore[no-untyped-def]
    """
    Enter products (n, M) of `rows` (n,) with `others` (M,) into lists (n, C).

    Products below `lowest` (n,) are left out, and those of a row with itself.
    """
    n_columns, last = products.shape[1], values.shape[1] - 1
    maxima = np.empty(-(-n_columns // CHUNK_ENTRIES), np.float32)
    where = np.empty(n_columns + 1, np.int32)
    for r in range(len(products)):
        row, low = products[r], max(lowest[r], values[r, last])
        if chunk_maxima(row, maxima) < low:
            continue
        for c in range(at_least(row, maxima, low, where)):
            j = where[c]
            if row[j] >= values[r, last] and others[j] != rows[r]:
                insert(row[j], others[j], values[r], ids[r])


@compiled("void(float32[:, ::1], int64[:, ::1], int64[::1], float32[:, ::1], int64[:, ::1])")
def merge(new_values, new_ids, rows, values, ids):  # type: ignore[no-untyped-def]
    """Enter lists (n, C) into those of `rows` (n,) among lists (N, C)."""
    last = values.shape[1] - 1
    for i in range(len(rows)):
        r = rows[i]
        for c in range(last + 1):
            if new_ids[i, c] < 0 or new_values[i, c] < values[r, last]:
                break
            insert(new_values[i, c], new_ids[i, c], values[r], ids[r])
