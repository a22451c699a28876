"""
Compiled loops of the sparse operations on a CPU; `torch_backend` defines what they compute.

The file has, in this order, tools, the cut of a list to its largest entries, messages, sweep and
energies, class sums, and means over neighbours. Entries in use of a list come first; the others are
-inf in scores and 0 in assignments. The loops have explicit types: numba compiles them at the first
import, which takes some seconds, and later ones load them from disk. Those with fastmath=True
have no NaN and no infinity, and sum in any order; one with "contract" only fuses products and sums.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from transclip_fast.compiled_loops import compiled
from transclip_fast.types import FLOAT32_ROUNDING, LARGEST_MESSAGE

CUT_HALVINGS = 24  # of the range in which a row is cut: as many as a float32 has bits
LINE_ENTRIES = 16  # of a cache line
AHEAD_ROWS = 8  # between a prefetch and its use: a read from memory takes as long as some rows
SUM_ROWS = 512  # whose features a core's cache holds

F = np.float32
LOG2E = F(1 / math.log(2))
TINY = np.finfo(F).tiny
LOWEST_SCORE = F(-1e30)  # stands for -inf, which fastmath excludes
# 2^-x for 0 <= x <= 1, to 3e-9.
_2X = np.polynomial.Chebyshev.interpolate(lambda x: 2.0**-x, 6, [0, 1])
C0, C1, C2, C3, C4, C5, C6 = _2X.convert(kind=np.polynomial.Polynomial).coef.astype(F)


@intrinsic
def prefetch(_, lists, row, entry):  # type: ignore[no-untyped-def]
    """
    Prefetch the cache line of an entry of `lists` (N, R), whether or not it exists.

    Neighbours' lists are scattered in memory: without prefetching a sweep waits for each.
    """

    def code(context, builder, signature, values):  # type: ignore[no-untyped-def]
        helpers: Any = cgutils
        kind = signature.args[0]
        array = context.make_array(kind)(context, builder, values[0])
        place = helpers.get_item_pointer(context, builder, kind, array, values[1:])
        byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        void = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        call = helpers.get_or_insert_function(builder.module, void, "llvm.prefetch.p0i8")
        to_read, keep, data = i32(0), i32(3), i32(1)
        builder.call(call, [builder.bitcast(place, byte), to_read, keep, data])
        return context.get_dummy_value()

    return types.void(lists, row, entry), code


@compiled("void(int64, float32[:, ::1], int32[:, ::1])")
def prefetch_list(i, values, classes):  # type: ignore[no-untyped-def]
    """Prefetch the first entries of a row's list: most lists have no more."""
    for entry in range(0, 2 * LINE_ENTRIES, LINE_ENTRIES):
        prefetch(values, i, entry)  # type: ignore[call-arg]
        prefetch(classes, i, entry)


@compiled("void(int64, int64[::1], int64[::1], float32[:, ::1], int32[:, ::1])")
def prefetch_neighbors(i, offsets, columns, values, classes):  # type: ignore[no-untyped-def]
    """Prefetch the lists of a row's neighbours, if there is such a row."""
    if i + 1 < len(offsets):
        for entry in range(offsets[i], offsets[i + 1]):
            prefetch_list(columns[entry], values, classes)


@compiled("float32(float32[::1])", fastmath=True)
def largest_of(row):  # type: ignore[no-untyped-def]
    """Largest entry of a row."""
    top = row[0]
    for j in range(len(row)):
        top = max(top, row[j])
    return top


@compiled("int64(float32[::1], float32)")
def count_at_least(row, low):  # type: ignore[no-untyped-def]
    """Entries of a row that are >= low."""
    above = 0
    for j in range(len(row)):
        above += row[j] >= low
    return above


@compiled("float32(float32[::1], float32, int32[::1], float32[::1])", fastmath=True)
def exponentials(row, largest, bits, out):  # type: ignore[no-untyped-def]
    """e^(row_k - largest), into `out`, and their sum; no call to exp, so that it is vectorised."""
    for j in range(len(row)):
        x = min((largest - row[j]) * LOG2E, F(120))
        whole = np.int32(x)
        bits[j] = (np.int32(127) - whole) << np.int32(23)  # 2^-whole
        out[j] = x - F(whole)
    power = bits.view(np.float32)
    total = F(0)
    for j in range(len(row)):
        x = out[j]
        out[j] = power[j] * (C0 + x * (C1 + x * (C2 + x * (C3 + x * (C4 + x * (C5 + x * C6))))))
        total += out[j]
    return total


@compiled("UniTuple(float32, 2)(float32[::1], float32, float32, int64)", fastmath=True)
def cut(values, low, high, limit):  # type: ignore[no-untyped-def]
    """
    Halve [low, high] until at most `limit` of `values` are >= high, but more than that >= low.

    The caller has found more than `limit` of them >= low.
    """
    for _ in range(CUT_HALVINGS):
        middle = F(0.5) * (low + high)
        if count_at_least(values, middle) > limit:
            low = middle
        else:
            high = middle
    return low, high


@compiled("int64(float32[::1], int32[::1], float32, float32, float32[::1], int32[::1], float32)")
def enter(values, classes, low, high, out, out_classes, unused):  # type: ignore[no-untyped-def]
    """
    Write the values in [low, high) to a list, the largest of them if there are too many.

    Returns their number; all entries after them become `unused`.
    """
    width, spare, count = len(out), 0, count_at_least(values, low)
    threshold = low
    if count > width:
        low, threshold = cut(values, max(low, values.min()), high, width)
        spare, count = width - count_at_least(values, threshold), width
    kept, c = 0, 0
    while kept < count:
        above, equal = values[c] >= threshold, values[c] >= low and spare > 0
        out[kept] = values[c]  # stays only where the list moves on: no branch
        out_classes[kept] = classes[c]
        spare -= equal and not above
        kept += above or equal
        c += 1
    while kept < width and out[kept] != unused:
        out[kept] = unused
        kept += 1
    return count


@compiled("UniTuple(uint32, 4)(int32[::1], int64)")
def four_classes(classes, r):  # type: ignore[no-untyped-def]
    """Four classes of a list; unsigned, they need no test for a negative index."""
    k0, k1 = np.uint32(classes[r]), np.uint32(classes[r + 1])
    return k0, k1, np.uint32(classes[r + 2]), np.uint32(classes[r + 3])


@compiled("void(float32, float32[::1], int32[::1], float32[::1])")
def accumulate_messages(weight, values, classes, messages):  # type: ignore[no-untyped-def]
    """Add a list (R,) of z, `weight` times, to `messages` (K,)."""
    r = 0
    # Four at a time, in one branch: unused entries add nothing.
    while r + 4 <= len(values) and values[r] != 0:
        k0, k1, k2, k3 = four_classes(classes, r)
        messages[k0] += weight * values[r]
        messages[k1] += weight * values[r + 1]
        messages[k2] += weight * values[r + 2]
        messages[k3] += weight * values[r + 3]
        r += 4
    while r < len(values) and values[r] != 0:
        messages[classes[r]] += weight * values[r]
        r += 1


@compiled("float32(float32[::1], int32[::1], float32[::1])")
def clear_entries(values, classes, messages):  # type: ignore[no-untyped-def]
    """Set `messages` (K,) to 0 at the classes of a list (R,); returns their largest magnitude."""
    largest, r = F(0), 0
    while r + 4 <= len(values) and values[r] != 0:
        k0, k1, k2, k3 = four_classes(classes, r)
        first = max(abs(messages[k0]), abs(messages[k1]))
        second = max(abs(messages[k2]), abs(messages[k3]))
        largest = max(largest, max(first, second))
        messages[k0] = messages[k1] = messages[k2] = messages[k3] = 0
        r += 4
    while r < len(values) and values[r] != 0:
        largest = max(largest, abs(messages[classes[r]]))
        messages[classes[r]] = 0
        r += 1
    return largest


@compiled(
    "void(int64, int64[::1], int64[::1], float32[::1], float32[:, ::1], int32[:, ::1],float32[::1])"
)
def gather_messages(i, offsets, columns, weights, values, classes, messages):  # type: ignore[no-untyped-def]
    """Add (A z)_i to `messages` (K,)."""
    for entry in range(offsets[i], offsets[i + 1]):
        j = columns[entry]
        accumulate_messages(weights[entry], values[j], classes[j], messages)


@compiled("float32(int64, int64[::1], int64[::1], float32[:, ::1], int32[:, ::1], float32[::1])")
def clear_messages(i, offsets, columns, values, classes, messages):  # type: ignore[no-untyped-def]
    """Set the entries that `gather_messages` wrote to 0; returns their largest magnitude."""
    largest = F(0)
    for entry in range(offsets[i], offsets[i + 1]):
        j = columns[entry]
        largest = max(largest, clear_entries(values[j], classes[j], messages))
    return largest


@compiled(
    "void(int64, int64, int64[::1], int64[::1], float32[::1], float32[:, ::1], int32[:, ::1],"
    "float32[::1], float32[:, ::1], int32[:, ::1], float32[:, ::1], int32[:, ::1], float32[::1],"
    "float32, int64)"
)
def sweep(  # type: ignore[no-untyped-def]
    start, stop, offsets, columns, weights, base, candidates, tail, z, z_classes,
    out, out_classes, bound, floor, n_classes,
):  # fmt: skip
    """One sweep over a block of nodes."""
    messages = np.zeros(n_classes, np.float32)
    logits = np.empty(base.shape[1] + 1, np.float32)
    mass = np.empty_like(logits)
    bits = np.empty(len(logits), np.int32)
    for i in range(start, stop):
        prefetch_neighbors(i + AHEAD_ROWS, offsets, columns, z, z_classes)
        prefetch_list(i + AHEAD_ROWS, base, candidates)
        prefetch_list(i + AHEAD_ROWS, out, out_classes)
        gather_messages(i, offsets, columns, weights, z, z_classes, messages)
        n = 0
        while n < base.shape[1] and base[i, n] > -np.inf:
            k = candidates[i, n]
            logits[n] = base[i, n] + messages[k]
            messages[k] = 0
            n += 1
        # Classes outside the candidates get no messages; together they are one extra entry.
        logits[n] = F(math.log(tail[i])) if tail[i] > 0 else LOWEST_SCORE
        total = exponentials(logits[: n + 1], largest_of(logits[: n + 1]), bits, mass)
        for c in range(n):
            mass[c] = max(mass[c] / total, TINY)
        top = largest_of(mass[:n])
        low, high = min(floor, top), F(2) * top
        enter(mass[:n], candidates[i], low, high, out[i], out_classes[i], F(0))
        outside_max = clear_messages(i, offsets, columns, z, z_classes, messages)
        # Below float32 rounding the tail mass is unknown; this is its upper bound.
        tail_bound = max(tail[i], n_classes * FLOAT32_ROUNDING)
        bound[i] = min(1.0, tail_bound * math.expm1(min(outside_max, F(LARGEST_MESSAGE))))


@compiled(
    "void(int64, int64, int64[::1], int64[::1], float32[::1], float32[:, ::1], int32[:, ::1],"
    "int64, float64[:, ::1])"
)
def energies(start, stop, offsets, columns, weights, z, classes, n_classes, out):  # type: ignore[no-untyped-def]
    """Pairwise and entropy terms (N, 2) of a block of nodes, to `out`."""
    messages = np.zeros(n_classes, np.float32)
    for i in range(start, stop):
        prefetch_neighbors(i + AHEAD_ROWS, offsets, columns, z, classes)
        gather_messages(i, offsets, columns, weights, z, classes, messages)
        pairwise, entropy = 0.0, 0.0
        for r in range(z.shape[1]):
            if z[i, r] == 0:
                break
            pairwise += z[i, r] * messages[classes[i, r]]
            entropy += z[i, r] * math.log(z[i, r])
        clear_messages(i, offsets, columns, z, classes, messages)
        out[i, 0], out[i, 1] = pairwise, entropy


@compiled("void(float32[:, ::1], int32[::1], float32[::1], float64[::1])", fastmath={"contract"})
def add_rows(features, rows, weights, out):  # type: ignore[no-untyped-def]
    """Add rows (n,) of the features times their weights to `out` (d,)."""
    e = 0
    while e + 4 <= len(rows):
        f0, f1 = features[rows[e]], features[rows[e + 1]]
        f2, f3 = features[rows[e + 2]], features[rows[e + 3]]
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

    Rows are added in their order. Entries of some rows at a time are sorted by class, so that a
    class's sum is read and written once for them.
    """
    width = z.shape[1]
    ends = np.empty(high - low + 1, np.int32)
    rows = np.empty(SUM_ROWS * width, np.int32)
    weights = np.empty(len(rows), np.float32)
    centred = np.empty((SUM_ROWS, features.shape[1]), np.float32)
    for start in range(0, len(features), SUM_ROWS):
        n = min(SUM_ROWS, len(features) - start)
        ends[:] = 0
        for i in range(n):
            node = nodes[start + i]
            prefetch_list(nodes[start + min(i + AHEAD_ROWS, n - 1)], z, classes)
            wanted = False
            for r in range(width):
                if z[node, r] == 0:
                    break
                if low <= classes[node, r] < high:
                    ends[classes[node, r] - low + 1] += 1
                    wanted = True
            if wanted:
                for x in range(len(centre)):
                    centred[i, x] = features[start + i, x] - centre[x]
        for k in range(high - low):
            ends[k + 1] += ends[k]
        for i in range(n):
            node = nodes[start + i]
            for r in range(width):
                if z[node, r] == 0:
                    break
                k = classes[node, r] - low
                if 0 <= k < high - low:
                    rows[ends[k]], weights[ends[k]] = i, z[node, r]
                    ends[k] += 1
        first = 0
        for k in range(low, high):
            last = ends[k - low]
            if first < last:
                add_rows(centred, rows[first:last], weights[first:last], sums[k])
                for e in range(first, last):
                    counts[k] += np.float64(weights[e])
            first = last


@compiled("void(float32[:, ::1], float64[:, ::1])")
def add_powers(rows, out):  # type: ignore[no-untyped-def]
    """Add rows (n, d) and their squares to `out` (2, d)."""
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            x = np.float64(rows[i, j])
            out[0, j] += x
            out[1, j] += x * x


@compiled(
    "void(float32[:, ::1], int32[:, ::1], int64[:, ::1], int32[:, ::1], int64, float32[:, ::1])"
)
def neighbor_means(z, classes, neighbors, wanted, n_classes, out):  # type: ignore[no-untyped-def]
    """Mean z of neighbours (n, k), nodes or -1, at the wanted classes (n, C), into `out` (n, C)."""
    total = np.zeros(n_classes, np.float32)
    for i in range(len(neighbors)):
        number = 0
        for node in neighbors[i]:
            if node >= 0:
                number += 1
                for r in range(z.shape[1]):
                    if z[node, r] == 0:
                        break
                    total[classes[node, r]] += z[node, r]
        for c in range(wanted.shape[1]):
            out[i, c] = total[wanted[i, c]] / max(number, 1)
        for node in neighbors[i]:
            if node >= 0:
                for r in range(z.shape[1]):
                    if z[node, r] == 0:
                        break
                    total[classes[node, r]] = 0
