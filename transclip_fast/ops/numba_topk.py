"""
Compiled loops that choose the candidates of a row from its scores, for `numba_backend`.

The scores are float32, or come from int8 products (see `int8_scores`): these suffice for the many
classes far behind, and the few that matter are rescored in float32.
"""

from __future__ import annotations

import math

import numpy as np

from transclip_fast.compiled_loops import compiled
from transclip_fast.ops.numba_loops import (
    AHEAD_ROWS,
    LOWEST_SCORE,
    F,
    enter,
    exponentials,
    largest_of,
    prefetch_list,
)

CHUNK_ENTRIES = 16  # of a row, with one maximum: chunks without candidates are skipped
LARGEST_INT8 = F(127)
SMALLEST_MAGNITUDE = F(1e-30)  # of a row: a step of 0 could not be divided by
STANDARD_ERRORS = F(4)  # assumed bound of an error: one product in 16,000 exceeds it
LARGEST_SCORE_ERROR = F(1)  # nats: a row with a larger one is scored in float32 throughout
SMALLEST_ERROR = F(1e-6)  # nats, float32 rounding: keeps its logarithm finite
MAGNITUDE_BITS = np.int32(0x7FFFFFFF)  # all bits of a float32 but its sign


@compiled("float32(float32[::1], float32[::1])", fastmath=True)
def chunk_maxima(row, out):  # type: ignore[no-untyped-def]
    """Largest entry of a row (K,); `out` receives that of each chunk."""
    largest = row[0]
    n_full = len(row) // CHUNK_ENTRIES
    for q in range(n_full):
        chunk_top = row[q * CHUNK_ENTRIES]
        for j in range(CHUNK_ENTRIES):
            chunk_top = max(chunk_top, row[q * CHUNK_ENTRIES + j])
        out[q] = chunk_top
        largest = max(largest, chunk_top)
    if n_full < len(out):
        chunk_top = row[n_full * CHUNK_ENTRIES]
        for j in range(n_full * CHUNK_ENTRIES, len(row)):
            chunk_top = max(chunk_top, row[j])
        out[n_full] = chunk_top
        largest = max(largest, chunk_top)
    return largest


@compiled("int64(float32[::1], float32[::1], float32, int32[::1])")
def at_least(row, maxima, low, classes):  # type: ignore[no-untyped-def]
    """Write the classes of a row (K,) whose entry is >= low to `classes`; their number."""
    count = 0
    for q in range(len(maxima)):
        if maxima[q] >= low:
            for j in range(q * CHUNK_ENTRIES, min(len(row), (q + 1) * CHUNK_ENTRIES)):
                classes[count] = j  # kept only where the count moves on: no branch
                count += row[j] >= low
    return count


@compiled(
    "UniTuple(float32, 2)(float32[::1], int32[::1], float32, float32, float32,"
    "float32[::1], int32[::1], int32[::1], float32[::1])"
)
def enter_row(  # type: ignore[no-untyped-def]
    found, found_classes, high, mass_sum, log_threshold, values, classes, bits, rest
):
    """
    Write the candidates of a row to its list (C,); its log-sum-exp, and the mass outside the list.

    `found` are scores that include all candidates, `mass_sum` is the sum of e^(score - high) over
    all classes.
    """
    total = high + F(math.log(mass_sum))
    largest = largest_of(found)
    low = max(min(total + log_threshold, largest), LOWEST_SCORE / F(2))
    kept = enter(found, found_classes, low, largest + F(1), values, classes, -F(np.inf))
    mass = exponentials(values[:kept], high, bits, rest)
    for c in range(kept):
        values[c] -= total
    return total, max(F(0), F(1) - mass / mass_sum)


@compiled("void(float32, int64, int64, float32[:, ::1], int64[:, ::1])")
def insert_top_row(x, i, k, values, rows):  # type: ignore[no-untyped-def]
    """Insert row i with the score x into the largest (8, K) of class k, in falling order."""
    place = len(values) - 1
    while place > 0 and x > values[place - 1, k]:
        values[place, k] = values[place - 1, k]
        rows[place, k] = rows[place - 1, k]
        place -= 1
    values[place, k] = x
    rows[place, k] = i


@compiled(
    "void(float32[:, ::1], int64, int64[::1], float32[::1], float32[:, ::1], int32[:, ::1],"
    "float32[::1], float32[::1], float32[:, ::1], int64[:, ::1])"
)
def select(  # type: ignore[no-untyped-def]
    scores, first, nodes, log_threshold, values, classes, tail, normaliser, top, top_rows
):
    """
    Write the candidates of a block of scores (n, K), of the rows `first` and on, to their lists.

    Lists are indexed by node, `normaliser` by row. The largest scores of each class, less their
    row's log-sum-exp, enter `top` (8, K) with their rows; nothing does if it is (0, K).
    """
    n_classes, last = scores.shape[1], len(top) - 1
    maxima = np.empty(-(-n_classes // CHUNK_ENTRIES), np.float32)
    bits, rest = np.empty(n_classes, np.int32), np.empty(n_classes, np.float32)
    found_classes, found = np.empty(n_classes + 1, np.int32), np.empty(n_classes, np.float32)
    for i in range(len(scores)):
        row, node = scores[i], nodes[first + i]
        prefetch_list(nodes[first + min(i + AHEAD_ROWS, len(scores) - 1)], values, classes)
        largest = chunk_maxima(row, maxima)
        mass_sum = exponentials(row, largest, bits, rest)
        low = min(largest + F(math.log(mass_sum)) + log_threshold[node], largest)
        low = max(low, LOWEST_SCORE / F(2))
        count = at_least(row, maxima, low, found_classes)
        for c in range(count):
            found[c] = row[found_classes[c]]
        own = values[node], classes[node]
        normaliser[first + i], tail[node] = enter_row(
            found[:count], found_classes, largest, mass_sum, log_threshold[node], *own, bits, rest
        )
        if last >= 0:
            for k in range(n_classes):
                x = row[k] - normaliser[first + i]
                if x > top[last, k]:
                    insert_top_row(x, first + i, k, top, top_rows)


@compiled("float32(float32[::1], float32[::1])", fastmath=True)
def dot(a, b):  # type: ignore[no-untyped-def]
    """a . b of (d,)."""
    total = F(0)
    for x in range(len(a)):
        total += a[x] * b[x]
    return total


@compiled("float32(float32[::1], float32[::1], float32[::1])", fastmath=True)
def subtract(row, centre, out):  # type: ignore[no-untyped-def]
    """A row (d,) less the centre, into `out`; returns the largest magnitude of the difference."""
    for x in range(len(out)):
        out[x] = row[x] - centre[x]
    bits, largest = out.view(np.int32), np.int32(0)
    for x in range(len(out)):  # a maximum of integers is vectorised
        largest = max(largest, bits[x] & MAGNITUDE_BITS)
    return np.int32(largest).view(np.float32)


@compiled(
    "void(float32[:, ::1], float32[::1], int8[:, ::1], float32[::1], float32[::1])", fastmath=True
)
def to_int8(rows, centre, codes, steps, norms):  # type: ignore[no-untyped-def]
    """Rows (n, d) less the centre (d,), each as multiples -127 to 127 of its own step."""
    rest = np.empty(len(centre), np.float32)
    for i in range(len(rows)):
        largest = max(subtract(rows[i], centre, rest), SMALLEST_MAGNITUDE)
        steps[i], scale = largest / LARGEST_INT8, LARGEST_INT8 / largest
        for x in range(len(rest)):  # whole numbers are cut off at the point: all are positive
            positive = np.int32(rest[x] * scale + (LARGEST_INT8 + F(0.5)))
            codes[i, x] = positive - np.int32(LARGEST_INT8)
        norms[i] = np.sqrt(dot(rest, rest))


@compiled("float32[::1](float32[::1], float32[::1], float32, float32)")
def score_errors(steps, norms, largest_norm, largest_step):  # type: ignore[no-untyped-def]
    """
    Errors in nats (n,), at STANDARD_ERRORS, of the scores of rows from int8 products.

    `steps`, `norms` (n,) are of the rows, the largest ones of the weights.
    """
    out = np.empty_like(steps)
    for i in range(len(steps)):
        # Entries are off by step / sqrt(12), the root mean square of a rounding.
        squares = (steps[i] * largest_norm) ** 2 + (norms[i] * largest_step) ** 2
        out[i] = max(STANDARD_ERRORS * F(math.sqrt(squares / F(12))), SMALLEST_ERROR)
    return out


@compiled("void(int32[::1], float32, float32[::1], float32[::1], float32[::1])", fastmath=True)
def to_scores(products, step, class_steps, offset, out):  # type: ignore[no-untyped-def]
    """Scores (K,) of a row from its int8 products (K,)."""
    for k in range(len(out)):
        out[k] = offset[k] + step * class_steps[k] * F(products[k])


@compiled(
    "void(int32[:, ::1], float32[::1], float32[::1], float32[::1], float32[::1],"
    "float32[:, ::1], float32[:, ::1], float32[::1],"
    "int64, int64[::1], float32[::1], float32[:, ::1], int32[:, ::1],"
    "float32[::1], float32[::1], float32[:, ::1], int64[:, ::1])"
)
def select_int8(  # type: ignore[no-untyped-def]
    products, steps, class_steps, centre_scores, row_errors, features, weights, offset,
    first, nodes, log_threshold, values, classes, tail, normaliser, top, top_rows,
):  # fmt: skip
    """
    As `select`, from int8 products (n, K) of features (n, d) and weights (K, d).

    A class whose mass times the row's error could reach the floor is rescored in float32.
    """
    n_classes, last = products.shape[1], len(top) - 1
    row, rest = np.empty(n_classes, np.float32), np.empty(n_classes, np.float32)
    maxima = np.empty(-(-n_classes // CHUNK_ENTRIES), np.float32)
    bits = np.empty(n_classes, np.int32)
    found_classes, found = np.empty(n_classes + 1, np.int32), np.empty(n_classes, np.float32)
    rescored, exact = np.empty(n_classes + 1, np.int32), np.empty(n_classes, np.float32)
    for i in range(len(products)):
        node, error = nodes[first + i], row_errors[i]
        prefetch_list(nodes[first + min(i + AHEAD_ROWS, len(products) - 1)], values, classes)
        to_scores(products[i], steps[i], class_steps, centre_scores, row)
        if error > LARGEST_SCORE_ERROR:  # a row unlike those of the estimate
            for k in range(n_classes):
                row[k] = offset[k] + dot(features[i], weights[k])
            error = SMALLEST_ERROR
        largest = chunk_maxima(row, maxima)
        high = largest + error  # a rescored class may be larger
        mass_sum = exponentials(row, high, bits, rest)
        low = min(high + F(math.log(mass_sum)) + log_threshold[node], largest)
        count = at_least(row, maxima, low, found_classes)
        low = min(low - F(math.log(error)), largest - error)
        n_rescored = 0
        for c in range(count):
            found[c] = row[found_classes[c]]
            rescored[n_rescored] = c  # stays only where the number moves on: no branch
            n_rescored += found[c] >= low
        for a in range(n_rescored):
            k = found_classes[rescored[a]]
            mass_sum -= rest[k]
            row[k] = exact[a] = found[rescored[a]] = offset[k] + dot(features[i], weights[k])
        mass_sum += exponentials(exact[:n_rescored], high, bits, rest)
        own = values[node], classes[node]
        normaliser[first + i], tail[node] = enter_row(
            found[:count], found_classes, high, mass_sum, log_threshold[node], *own, bits, rest
        )
        if last >= 0:
            for k in range(n_classes):
                if row[k] - normaliser[first + i] > top[last, k] - error:
                    x = offset[k] + dot(features[i], weights[k]) - normaliser[first + i]
                    if x > top[last, k]:
                        insert_top_row(x, first + i, k, top, top_rows)
