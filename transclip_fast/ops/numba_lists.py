"""Compiled loops on lists; `packed_lists` and `Assignments.best` define what they compute."""

from __future__ import annotations

import numpy as np

from transclip_fast.compiled_loops import compiled
from transclip_fast.ops.numba_loops import AHEAD_ROWS, prefetch_list
from transclip_fast.ops.packed_lists import CLASSES, SAME


@compiled(
    "int64(int64[::1], float32[:, ::1], int32[:, ::1], float32[:, ::1], int32[:, ::1],"
    "int32[::1], int32[::1], float32[::1])"
)
def pack(rows, z, classes, sent, sent_classes, heads, rest, rest_values):  # type: ignore[no-untyped-def]
    """
    Pack lists of z, where `sent` were sent, or none; returns the length of the rest.

    `rest` and `rest_values` are the same memory, with room for 2 n R entries.
    """
    e = 0
    for n in range(len(rows)):
        ahead = rows[min(n + AHEAD_ROWS, len(rows) - 1)]
        prefetch_list(ahead, z, classes)
        row = rows[n]
        r, same, equal = 0, len(sent) > 0, True
        if same:
            prefetch_list(ahead, sent, sent_classes)
        while r == 0 or (r < z.shape[1] and z[row, r] != 0):
            if same:
                same = classes[row, r] == sent_classes[row, r] and (r == 0 or sent[row, r] != 0)
                equal = equal and z[row, r] == sent[row, r]
            r += 1
        same = same and (r == z.shape[1] or sent[row, r] == 0)
        heads[n] = SAME if same and equal else CLASSES if same else -r
        if not same:
            rest[e : e + r] = classes[row, :r]
            e += r
        if not (same and equal):
            rest_values[e : e + r] = z[row, :r]
            e += r
    return e


@compiled(
    "boolean(int32[::1], int32[::1], float32[::1], float32[:, ::1], int32[:, ::1],"
    "float32[:, ::1], int32[:, ::1], int64)"
)
def unpack(heads, rest, values, z, classes, sent, sent_classes, n_classes):  # type: ignore[no-untyped-def]
    """
    Set lists of z to packed ones; False where these are others than were asked for.

    `rest` and `values` are the same memory; `sent` are the lists that were sent before, or none.
    """
    e, width = 0, z.shape[1]
    for row in range(len(z)):
        head, n = np.int64(heads[row]), 0
        if head >= 0:
            if head > CLASSES or len(sent) == 0:
                return False
            while n == 0 or (n < width and sent[row, n] != 0):
                classes[row, n], z[row, n] = sent_classes[row, n], sent[row, n]
                n += 1
        else:
            n = -head
            if n > width or e + n > len(rest):
                return False
            for r in range(n):
                if not 0 <= rest[e + r] < n_classes:
                    return False
                classes[row, r] = rest[e + r]
            e += n
        if head != SAME:
            if e + n > len(rest):
                return False
            z[row, :n] = values[e : e + n]
            e += n
        while n < width and z[row, n] != 0:
            z[row, n] = np.float32(0)
            n += 1
    return e == len(rest)


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
