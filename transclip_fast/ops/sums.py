"""
Compiled sums over the rows of features on a CPU, for `ops.numba`.

Rows are added four at a time in float32, less a centre that keeps their digits, and those sums in
float64: the variance is what is left when the squares of the means are taken off.
"""

from __future__ import annotations

import numpy as np

from transclip_fast.ops.loops import AHEAD, F, compiled, fetch

SUM_ROWS = 512  # whose features a core's cache holds


@compiled(
    "void(float32[:, ::1], int32[::1], float32[::1], float64[::1])", fastmath={"contract", "nsz"}
)
def add_rows(features, rows, weights, out):  # type: ignore[no-untyped-def]
    """Add rows (n,) of the features times their weights to `out` (d,)."""
    e = 0
    while e + 4 <= len(rows):
        f0, f1, f2, f3 = (
            features[rows[e]],
            features[rows[e + 1]],
            features[rows[e + 2]],
            features[rows[e + 3]],
        )
        w0, w1, w2, w3 = weights[e], weights[e + 1], weights[e + 2], weights[e + 3]
        for x in range(len(out)):
            first = w0 * f0[x] + w1 * f1[x]
            out[x] += np.float64(first + (w2 * f2[x] + w3 * f3[x]))
        e += 4
    while e < len(rows):
        f0, w0 = features[rows[e]], weights[e]
        for x in range(len(out)):
            out[x] += np.float64(w0 * f0[x])
        e += 1


@compiled(
    "void(int64, int64, float32[:, ::1], float32[::1], int64[::1], float32[:, ::1], int32[:, ::1],"
    "float64[:, ::1], float64[::1])"
)
def class_sums(low, high, features, centre, nodes, z, classes, sums, counts):  # type: ignore[no-untyped-def]
    """
    Add the sums, of features less the centre (d,), and masses of the classes from `low` to `high`.

    Rows are added in their order. The class after the last, of `sums` (K + 1, d), takes what they
    dropped. Entries of some rows at a time are sorted by class, so that a class's sum is read and
    written once for them.
    """
    dropped, width = high == len(sums), z.shape[1]
    ends = np.empty(high - low + 1, np.int32)
    rows = np.empty(SUM_ROWS * (width + 1), np.int32)
    weights = np.empty(len(rows), np.float32)
    centred = np.empty((SUM_ROWS, features.shape[1]), np.float32)
    for start in range(0, len(features), SUM_ROWS):
        n = min(SUM_ROWS, len(features) - start)
        ends[:] = 0
        for i in range(n):
            node = nodes[start + i]
            fetch(nodes[start + min(i + AHEAD, n - 1)], z, classes)
            wanted = dropped
            for r in range(width):
                if z[node, r] == 0:
                    break
                if low <= classes[node, r] < high:
                    ends[classes[node, r] - low + 1] += 1
                    wanted = True
            if wanted:
                for x in range(len(centre)):
                    centred[i, x] = features[start + i, x] - centre[x]
        if dropped:
            ends[high - low] = n
        for k in range(high - low):
            ends[k + 1] += ends[k]
        for i in range(n):
            node, rest = nodes[start + i], 1.0
            for r in range(width + 1):
                last = r == width or z[node, r] == 0
                if last and not dropped:
                    break
                k, weight = high - 1, F(rest)
                if not last:
                    k, weight = classes[node, r], z[node, r]
                    rest -= np.float64(weight)
                if low <= k < high:
                    rows[ends[k - low]], weights[ends[k - low]] = i, weight
                    ends[k - low] += 1
                if last:
                    break
        first = 0
        for k in range(low, high):
            last = ends[k - low]
            if first < last:
                add_rows(centred, rows[first:last], weights[first:last], sums[k])
                for e in range(first, last):
                    counts[k] += np.float64(weights[e])
            first = last


@compiled("void(float32[:, ::1], float64[::1])")
def add_squares(rows, out):  # type: ignore[no-untyped-def]
    """Add the squares of rows (n, d) to `out` (d,)."""
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            x = np.float64(rows[i, j])
            out[j] += x * x
