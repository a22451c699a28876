"""Compiled loops on lists; `packed_lists` and `Assignments.best` define what they compute."""

from __future__ import annotations

import numpy as np

from transclip_fast.compiled_loops import compiled
from transclip_fast.ops.numba_loops import AHEAD_ROWS, prefetch_list


@compiled(
    "int64(int64[::1], float32[:, ::1], int32[:, ::1], int32[:, ::1], float32[:, ::1], int64[::1])"
)
def pack(rows, z, classes, out, out_values, ends):  # type: ignore[no-untyped-def]
    """
    Pack lists of z; returns how many entries there are.

    `out` (E, 2) and `out_values` are the same memory, with room for n R entries.
    """
    e = 0
    for n in range(len(rows)):
        prefetch_list(rows[min(n + AHEAD_ROWS, len(rows) - 1)], z, classes)
        row, r = rows[n], 0
        while r == 0 or (r < z.shape[1] and z[row, r] != 0):
            out[e, 0], out_values[e, 1] = classes[row, r], z[row, r]
            r += 1
            e += 1
        out[e - 1, 0] = ~out[e - 1, 0]
        ends[n] = e
    return e


@compiled("boolean(int32[:, ::1], float32[:, ::1], float32[:, ::1], int32[:, ::1], int64)")
def unpack(entries, values, z, classes, n_classes):  # type: ignore[no-untyped-def]
    """
    Set lists of z to packed ones; False where these are others than were asked for.

    `entries` (E, 2) and `values` are the same memory.
    """
    row, r, width = 0, 0, z.shape[1]
    for e in range(len(entries)):
        k = entries[e, 0]
        last = k < 0
        if last:
            k = ~k
        if row == len(z) or r == width or k >= n_classes:
            return False
        z[row, r], classes[row, r] = values[e, 1], k
        r += 1
        if last:
            while r < width and z[row, r] != 0:
                z[row, r] = np.float32(0)
                r += 1
            row, r = row + 1, 0
    return row == len(z) and r == 0


@compiled("void(float32[:, ::1], int32[:, ::1], int64[::1], float32[::1])")
def best(z, classes, labels, values):  # type: ignore[no-untyped-def]
    """Class of the largest entry of each row, the lowest of equal ones, and the entry."""
    for i in range(len(z)):
        label, value = classes[i, 0], z[i, 0]
        for r in range(1, z.shape[1]):
            if z[i, r] == 0:
                break
            if z[i, r] > value or (z[i, r] == value and classes[i, r] < label):
                label, value = classes[i, r], z[i, r]
        labels[i], values[i] = label, value
