"""
The compiled loops of the short form on a CPU (`ops.numba` calls them, `ops.torch` is the formula).

Lists end at their first unused entry, -inf in scores and 0 in assignments, and all after it is
unused as well. Types are spelled out, so that numba compiles when this is first imported, some
seconds, and from then on loads its cache.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

CHUNK = 16  # classes whose maximum is kept, to look only where candidates are
HALVINGS = 24  # of the range in which a row is cut to its largest entries

F = np.float32
LOG2E = F(1 / math.log(2))
TINY = np.finfo(F).tiny
ROUNDING = 2.0**-24
MOST_HEARD = F(64)  # e^64 moves everything
LOWEST = F(-1e30)  # for -inf, which the loops must not meet
# 2^-x for 0 <= x <= 1, to 3e-9.
_2X = np.polynomial.Chebyshev.interpolate(lambda x: 2.0**-x, 6, [0, 1])
C0, C1, C2, C3, C4, C5, C6 = _2X.convert(kind=np.polynomial.Polynomial).coef.astype(F)
FAST = {"reassoc", "contract", "nsz", "arcp", "nnan", "ninf"}


def compiled(signature: str, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a loop for these types, or load it from numba's cache."""

    def decorate(loop: Callable[..., Any]) -> Any:
        try:
            return numba.njit(signature, nogil=True, cache=True, **options)(loop)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            warnings.warn(
                "no folder for compiled code can be written, so it is compiled in every process; "
                "name one with NUMBA_CACHE_DIR",
                stacklevel=2,
            )
            return numba.njit(signature, nogil=True, **options)(loop)

    return decorate


@compiled("float32(float32[::1], float32[::1])", fastmath=FAST)
def chunk_maxima(row, out):  # type: ignore[no-untyped-def]
    """Largest entry of a row (K,); `out` receives that of each chunk."""
    largest = row[0]
    n_full = len(row) // CHUNK
    for q in range(n_full):
        top = row[q * CHUNK]
        for j in range(CHUNK):
            top = max(top, row[q * CHUNK + j])
        out[q] = top
        largest = max(largest, top)
    if n_full < len(out):
        top = row[n_full * CHUNK]
        for j in range(n_full * CHUNK, len(row)):
            top = max(top, row[j])
        out[n_full] = top
        largest = max(largest, top)
    return largest


@compiled("float32(float32[::1], float32, int32[::1], float32[::1])", fastmath=FAST)
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


@compiled("UniTuple(float32, 2)(float32[::1], float32, float32, int64)", fastmath=FAST)
def cut(values, low, high, limit):  # type: ignore[no-untyped-def]
    """
    Halve [low, high] until at most `limit` of `values` are >= high, but more than that >= low.

    Only used where more than `limit` are >= low.
    """
    for _ in range(HALVINGS):
        middle = F(0.5) * (low + high)
        above = 0
        for j in range(len(values)):
            above += values[j] >= middle
        if above > limit:
            low = middle
        else:
            high = middle
    return low, high


@compiled("int64(float32[::1], float32[::1], float32, int32[::1])")
def at_least(row, maxima, low, places):  # type: ignore[no-untyped-def]
    """Classes of a row (K,) whose entry is >= low, into `places`; their number."""
    count = 0
    for q in range(len(maxima)):
        if maxima[q] >= low:
            for j in range(q * CHUNK, min(len(row), (q + 1) * CHUNK)):
                places[count] = j  # kept only where the count moves on: no branch
                count += row[j] >= low
    return count


@compiled(
    "void(float32[:, ::1], int64, int64[::1], float32[::1], float32[:, ::1], int32[:, ::1],"
    "float32[::1], float32[::1])"
)
def select(scores, first, nodes, least, values, classes, tail, normaliser):  # type: ignore[no-untyped-def]
    """Candidates of a block of scores (n, K): its rows are `first` and on, their nodes differ."""
    n_classes, width = scores.shape[1], values.shape[1]
    maxima = np.empty(-(-n_classes // CHUNK), np.float32)
    bits, rest = np.empty(n_classes, np.int32), np.empty(n_classes, np.float32)
    places = np.empty(n_classes + 1, np.int32)
    found = np.empty(n_classes, np.float32)
    for i in range(len(scores)):
        row, node = scores[i], nodes[first + i]
        largest = chunk_maxima(row, maxima)
        everything = exponentials(row, largest, bits, rest)
        total = largest + F(math.log(everything))
        normaliser[first + i] = total
        low = max(min(total + least[node], largest), LOWEST / F(2))
        count = at_least(row, maxima, low, places)
        for c in range(count):
            found[c] = row[places[c]]
        high, spare = low, 0
        if count > width:
            low, high = cut(found[:count], found[:count].min(), largest + F(1), width)
            spare = width
            for c in range(count):
                spare -= found[c] >= high
        kept = 0
        for c in range(count):
            if found[c] >= high or (found[c] >= low and spare > 0):
                spare -= found[c] < high
                classes[node, kept] = places[c]
                values[node, kept] = found[c] - total
                found[kept] = found[c]
                kept += 1
        tail[node] = max(F(0), F(1) - exponentials(found[:kept], largest, bits, rest) / everything)
        while kept < width and values[node, kept] > -np.inf:
            values[node, kept] = -np.inf
            kept += 1


@compiled("void(float32[:, ::1], int64, float32[::1], float32[:, ::1], int64[:, ::1])")
def most_confident(scores, first, normaliser, values, rows):  # type: ignore[no-untyped-def]
    """Enter a block of scores (n, K) into the largest (8, K) of each class, in falling order."""
    last = len(values) - 1
    for i in range(len(scores)):
        for k in range(scores.shape[1]):
            x = scores[i, k] - normaliser[first + i]
            if x > values[last, k]:
                place = last
                while place > 0 and x > values[place - 1, k]:
                    values[place, k] = values[place - 1, k]
                    rows[place, k] = rows[place - 1, k]
                    place -= 1
                values[place, k] = x
                rows[place, k] = first + i


@compiled(
    "void(int64, int64[::1], int64[::1], float32[::1], float32[:, ::1], int32[:, ::1],float32[::1])"
)
def listen(i, offsets, columns, weights, values, classes, heard):  # type: ignore[no-untyped-def]
    """Add (A z)_i to `heard` (K,)."""
    for entry in range(offsets[i], offsets[i + 1]):
        j = columns[entry]
        for r in range(values.shape[1]):
            if values[j, r] == 0:
                break
            heard[classes[j, r]] += weights[entry] * values[j, r]


@compiled("float32(int64, int64[::1], int64[::1], float32[:, ::1], int32[:, ::1], float32[::1])")
def forget(i, offsets, columns, values, classes, heard):  # type: ignore[no-untyped-def]
    """Clear what `listen` wrote; its largest entry, of either sign."""
    largest = F(0)
    for entry in range(offsets[i], offsets[i + 1]):
        j = columns[entry]
        for r in range(values.shape[1]):
            if values[j, r] == 0:
                break
            largest = max(largest, abs(heard[classes[j, r]]))
            heard[classes[j, r]] = 0
    return largest


@compiled(
    "void(int64, int64, int64[::1], int64[::1], float32[::1], float32[:, ::1], int32[:, ::1],"
    "float32[::1], float32[:, ::1], int32[:, ::1], float32[:, ::1], int32[:, ::1], float32[::1],"
    "float32, int64)"
)
def sweep(  # type: ignore[no-untyped-def]
    start,
    stop,
    offsets,
    columns,
    weights,
    base,
    candidates,
    tail,
    z,
    z_classes,
    out,
    out_classes,
    bound,
    floor,
    n_classes,
):
    """One sweep over a block of nodes."""
    width = out.shape[1]
    heard = np.zeros(n_classes, np.float32)
    logits = np.empty(base.shape[1], np.float32)
    mass = np.empty(base.shape[1], np.float32)
    bits = np.empty(base.shape[1], np.int32)
    for i in range(start, stop):
        listen(i, offsets, columns, weights, z, z_classes, heard)
        largest = F(math.log(tail[i])) if tail[i] > 0 else F(-np.inf)
        rest = largest
        n = 0
        while n < base.shape[1] and base[i, n] > -np.inf:
            logits[n] = base[i, n] + heard[candidates[i, n]]
            largest = max(largest, logits[n])
            heard[candidates[i, n]] = 0
            n += 1
        total = exponentials(logits[:n], largest, bits, mass) + F(math.exp(rest - largest))
        scale, top, count = F(1) / total, F(0), 0
        for c in range(n):
            mass[c] *= scale
            top = max(top, mass[c])
        low = min(floor, top)
        for c in range(n):
            count += mass[c] >= low
        high, spare = low, 0
        if count > width:
            low, high = cut(mass[:n], low, F(2) * top, width)
            spare = width
            for c in range(n):
                spare -= mass[c] >= high
        kept = 0
        for c in range(n):
            if mass[c] >= high or (mass[c] >= low and spare > 0):
                spare -= mass[c] < high
                out[i, kept] = max(mass[c], TINY)
                out_classes[i, kept] = candidates[i, c]
                kept += 1
        while kept < width and out[i, kept] > 0:
            out[i, kept] = 0
            kept += 1
        unheard = forget(i, offsets, columns, z, z_classes, heard)
        # Of a tail below rounding nothing is known but that.
        known = max(tail[i], n_classes * ROUNDING)
        bound[i] = min(1.0, known * math.expm1(min(unheard, MOST_HEARD)))


@compiled(
    "void(int64, int64, int64[::1], int64[::1], float32[::1], float32[:, ::1], int32[:, ::1],"
    "int64, float64[::1])"
)
def energies(start, stop, offsets, columns, weights, z, classes, n_classes, out):  # type: ignore[no-untyped-def]
    """Pairwise and entropy terms of a block of nodes."""
    heard = np.zeros(n_classes, np.float32)
    pairwise, entropy = 0.0, 0.0
    for i in range(start, stop):
        listen(i, offsets, columns, weights, z, classes, heard)
        for r in range(z.shape[1]):
            if z[i, r] == 0:
                break
            pairwise += z[i, r] * heard[classes[i, r]]
            entropy += z[i, r] * math.log(z[i, r])
        forget(i, offsets, columns, z, classes, heard)
    out[0], out[1] = pairwise, entropy


@compiled(
    "void(int64, int64, float32[:, ::1], int64[::1], float32[:, ::1], int32[:, ::1],"
    "float64[:, ::1], float64[::1])",
    fastmath={"contract"},
)
def class_sums(low, high, features, nodes, z, classes, sums, counts):  # type: ignore[no-untyped-def]
    """
    Add the sums and masses of the classes from `low` to `high`, rows in their order.

    The class after the last, of `sums` (K + 1, d), takes what the rows dropped.
    """
    dropped = high == len(sums)
    for i in range(len(features)):
        node = nodes[i]
        rest = 1.0
        for r in range(z.shape[1] + 1):
            last = r == z.shape[1] or z[node, r] == 0
            if last and not dropped:
                break
            k, weight = len(sums) - 1, rest
            if not last:
                k, weight = classes[node, r], np.float64(z[node, r])
                rest -= weight
            if low <= k < high:
                counts[k] += weight
                for x in range(features.shape[1]):
                    sums[k, x] += weight * features[i, x]
            if last:
                break


@compiled("void(float32[:, ::1], float64[::1])")
def add_squares(rows, out):  # type: ignore[no-untyped-def]
    """Add the squares of rows (n, d) to `out` (d,)."""
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            x = np.float64(rows[i, j])
            out[j] += x * x
