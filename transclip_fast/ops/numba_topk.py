"""
Compiled loops that choose the candidates of a row from its scores, for `ops.numba`.

The scores are float32's, or come from products in 8 bits, which take a quarter of the time. Those
say what is known of the many classes far behind; the few that matter are scored again in float32.
"""

from __future__ import annotations

import math

import numpy as np

from transclip_fast.ops.numba_loops import (
    AHEAD,
    FAST,
    LOWEST,
    F,
    compiled,
    enter,
    exponentials,
    fetch,
    largest_of,
)

CHUNK = 16  # classes whose maximum is kept, to look only where candidates are
LAST_BYTE = F(127)
LEAST_STEP = F(1e-30)
CERTAIN = F(4)  # standard errors that are allowed for
MOST_ERROR, LEAST_ERROR = F(1), F(1e-6)  # nats: beyond it a row is scored in float32 throughout
MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits of a float32 but its sign


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


@compiled("int64(float32[::1], float32[::1], float32, int32[::1])")
def at_least(row, maxima, low, classes):  # type: ignore[no-untyped-def]
    """Classes of a row (K,) whose entry is >= low, into `classes`; their number."""
    count = 0
    for q in range(len(maxima)):
        if maxima[q] >= low:
            for j in range(q * CHUNK, min(len(row), (q + 1) * CHUNK)):
                classes[count] = j  # kept only where the count moves on: no branch
                count += row[j] >= low
    return count


@compiled(
    "UniTuple(float32, 2)(float32[::1], int32[::1], float32, float32, float32,"
    "float32[::1], int32[::1], int32[::1], float32[::1])"
)
def enter_row(found, found_classes, high, everything, least, values, classes, bits, rest):  # type: ignore[no-untyped-def]
    """
    Enter the candidates of a row, found among its scores, into its list (C,).

    Given the sum of e^(score - high) over all classes, and where candidates begin; the row's
    log-sum-exp, and the mass of all that is not in the list.
    """
    total = high + F(math.log(everything))
    top = largest_of(found)
    low = max(min(total + least, top), LOWEST / F(2))
    kept = enter(found, found_classes, low, top + F(1), values, classes, -F(np.inf))
    mass = exponentials(values[:kept], high, bits, rest)
    for c in range(kept):
        values[c] -= total
    return total, max(F(0), F(1) - mass / everything)


@compiled("void(float32, int64, int64, float32[:, ::1], int64[:, ::1])")
def insert(x, i, k, values, rows):  # type: ignore[no-untyped-def]
    """Enter row i with the score x into the largest (8, K) of class k, in falling order."""
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
    scores, first, nodes, least, values, classes, tail, normaliser, best, best_rows
):
    """
    Candidates of a block of scores (n, K): its rows are `first` and on, their nodes differ.

    The largest scores of each class, less their row's log-sum-exp, enter `best` (8, K), or
    (0, K) where they are not asked for.
    """
    n_classes, last = scores.shape[1], len(best) - 1
    maxima = np.empty(-(-n_classes // CHUNK), np.float32)
    bits, rest = np.empty(n_classes, np.int32), np.empty(n_classes, np.float32)
    found_classes, found = np.empty(n_classes + 1, np.int32), np.empty(n_classes, np.float32)
    for i in range(len(scores)):
        row, node = scores[i], nodes[first + i]
        fetch(nodes[first + min(i + AHEAD, len(scores) - 1)], values, classes)
        largest = chunk_maxima(row, maxima)
        everything = exponentials(row, largest, bits, rest)
        low = max(min(largest + F(math.log(everything)) + least[node], largest), LOWEST / F(2))
        count = at_least(row, maxima, low, found_classes)
        for c in range(count):
            found[c] = row[found_classes[c]]
        own = values[node], classes[node]
        normaliser[first + i], tail[node] = enter_row(
            found[:count], found_classes, largest, everything, least[node], *own, bits, rest
        )
        if last >= 0:
            for k in range(n_classes):
                x = row[k] - normaliser[first + i]
                if x > best[last, k]:
                    insert(x, first + i, k, best, best_rows)


@compiled("float32(float32[::1], float32[::1])", fastmath=FAST)
def dot(a, b):  # type: ignore[no-untyped-def]
    """a . b of (d,)."""
    total = F(0)
    for x in range(len(a)):
        total += a[x] * b[x]
    return total


@compiled("float32(float32[::1], float32[::1], float32[::1])", fastmath=FAST)
def subtract(row, centre, out):  # type: ignore[no-untyped-def]
    """A row (d,) less the centre, into `out`; the largest magnitude of what is left."""
    for x in range(len(out)):
        out[x] = row[x] - centre[x]
    bits, largest = out.view(np.int32), np.int32(0)
    for x in range(len(out)):  # a maximum of integers is vectorised
        largest = max(largest, bits[x] & MAGNITUDE)
    return np.int32(largest).view(np.float32)


@compiled(
    "void(float32[:, ::1], float32[::1], int8[:, ::1], float32[::1], float32[::1])", fastmath=FAST
)
def to_bytes(rows, centre, codes, steps, norms):  # type: ignore[no-untyped-def]
    """Rows (n, d) less the centre (d,), each as multiples -127 to 127 of its own step."""
    rest = np.empty(len(centre), np.float32)
    for i in range(len(rows)):
        largest = max(subtract(rows[i], centre, rest), LEAST_STEP)
        steps[i], scale = largest / LAST_BYTE, LAST_BYTE / largest
        for x in range(len(rest)):  # whole numbers are cut off at the point: all are positive
            positive = np.int32(rest[x] * scale + (LAST_BYTE + F(0.5)))
            codes[i, x] = positive - np.int32(LAST_BYTE)
        norms[i] = np.sqrt(dot(rest, rest))


@compiled("float32[::1](float32[::1], float32[::1], float32, float32)")
def errors(steps, norms, largest_norm, largest_step):  # type: ignore[no-untyped-def]
    """
    By how many nats the scores of rows (n,) in 8 bits may be off: some standard errors.

    Given their steps and norms, and the largest of the weights.
    """
    out = np.empty_like(steps)
    for i in range(len(steps)):
        # Entries are off by step / sqrt(12), the root mean square of a rounding.
        squares = (steps[i] * largest_norm) ** 2 + (norms[i] * largest_step) ** 2
        out[i] = max(CERTAIN * F(math.sqrt(squares / F(12))), LEAST_ERROR)
    return out


@compiled("void(int32[::1], float32, float32[::1], float32[::1], float32[::1])", fastmath=FAST)
def to_scores(products, step, class_steps, offset, out):  # type: ignore[no-untyped-def]
    """What the products (K,) of a row in 8 bits say of its scores."""
    for k in range(len(out)):
        out[k] = offset[k] + step * class_steps[k] * F(products[k])


@compiled(
    "void(int32[:, ::1], float32[::1], float32[::1], float32[::1], float32[::1],"
    "float32[:, ::1], float32[:, ::1], float32[::1],"
    "int64, int64[::1], float32[::1], float32[:, ::1], int32[:, ::1],"
    "float32[::1], float32[::1], float32[:, ::1], int64[:, ::1])"
)
def select_scanned(  # type: ignore[no-untyped-def]
    products,
    steps,
    class_steps,
    centre_scores,
    row_errors,
    features,
    weights,
    offset,
    first,
    nodes,
    least,
    values,
    classes,
    tail,
    normaliser,
    best,
    best_rows,
):
    """
    As `select`, from products (n, K) in 8 bits of features (n, d) and weights (K, d).

    Classes are scored again where their mass times the row's error could reach the floor.
    """
    n_classes, last = products.shape[1], len(best) - 1
    row, rest = np.empty(n_classes, np.float32), np.empty(n_classes, np.float32)
    maxima = np.empty(-(-n_classes // CHUNK), np.float32)
    bits = np.empty(n_classes, np.int32)
    found_classes, found = np.empty(n_classes + 1, np.int32), np.empty(n_classes, np.float32)
    again, exact = np.empty(n_classes + 1, np.int32), np.empty(n_classes, np.float32)
    for i in range(len(products)):
        node, error = nodes[first + i], row_errors[i]
        fetch(nodes[first + min(i + AHEAD, len(products) - 1)], values, classes)
        to_scores(products[i], steps[i], class_steps, centre_scores, row)
        if error > MOST_ERROR:  # a row unlike those that were looked at
            for k in range(n_classes):
                row[k] = offset[k] + dot(features[i], weights[k])
            error = LEAST_ERROR
        largest = chunk_maxima(row, maxima)
        high = largest + error  # what is scored again may be larger
        everything = exponentials(row, high, bits, rest)
        low = min(high + F(math.log(everything)) + least[node], largest)
        count = at_least(row, maxima, low, found_classes)
        low = min(low - F(math.log(error)), largest - error)
        n_again = 0
        for c in range(count):
            found[c] = row[found_classes[c]]
            again[n_again] = c  # stays only where the number moves on: no branch
            n_again += found[c] >= low
        for a in range(n_again):
            k = found_classes[again[a]]
            everything -= rest[k]
            row[k] = exact[a] = found[again[a]] = offset[k] + dot(features[i], weights[k])
        everything += exponentials(exact[:n_again], high, bits, rest)
        own = values[node], classes[node]
        normaliser[first + i], tail[node] = enter_row(
            found[:count], found_classes, high, everything, least[node], *own, bits, rest
        )
        if last >= 0:
            for k in range(n_classes):
                if row[k] - normaliser[first + i] > best[last, k] - error:
                    x = offset[k] + dot(features[i], weights[k]) - normaliser[first + i]
                    if x > best[last, k]:
                        insert(x, first + i, k, best, best_rows)
