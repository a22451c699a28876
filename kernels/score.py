"""
Base scores b = F P^T + c cut to each row's candidates, fused with the product: no N x K anywhere.

    x_k = s (F P^T)_k + c_k,   total = log sum_k e^(x_k),   b_k = x_k - total
    candidates: b_k >= min(log_threshold, max b), the C largest of them
    tail = sum of e^(b_k) of all others

A program owns a block of rows and computes F P^T a tile at a time on the matrix units: see
`products.py`. It appends to a row's list the scores that may still be candidates, those that
pass two bars, which only rise:

- min(log_threshold + log-sum-exp so far, largest so far), less a slack for the rounding of the sum;
- the C-th largest of G partial maxima, where maximum g is over the classes k = g modulo G: at least
  C scores reach it. A few halvings bracket it. A score must reach this bar as raised by its own
  block, and exceed the bar before its block, so that of equal scores the first classes are taken.

If scores come in random order, a list grows to C (1 + log(K / G)) entries or a few more, some 60 at
C = 16 and K = 1024. A list that might outgrow its room is cut to its C largest. A second kernel
cuts each list to the candidates and writes them in the order of their classes.

Shapes: F (N, d) float16 or float32, P (K, d), c (K,) float32; values, classes (N, C). Cost: that of
the products. Method: Zanella et al., NeurIPS 2024, equation 5.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from transclip_fast.kernels.products import HalfWeights, launch, tile
from transclip_fast.kernels.select import (
    raised,
    selected,
    thresholds_of,
    write_candidates,
)
from transclip_fast.types import Scores

MAX_CANDIDATES = 32  # C at most: with more, the partial maxima hardly bound the C-th largest score
CHUNK_ROWS = 1 << 16  # rows of a launch: their lists take 134 MB, of which little is touched
LIST_ENTRIES = 256  # room of a row's list: four times its usual length at C = 16
PARTIAL_MAXIMA = 64  # G, of a row
FINISH_WARPS = 1
TILE_PARTS = tl.constexpr(4)  # of a tile, appended one after the other
BAR_HALVINGS = tl.constexpr(4)  # bring the bar within 1/16 of the range of the partial maxima
SUM_SLACK = tl.constexpr(1e-3)  # nats: far above the rounding of a sum of exponentials


@triton.jit
def above(x):
    """The float32 after x."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x > 0, bits + 1, tl.where(x < 0, bits - 1, 1)).to(tl.float32, bitcast=True)


@triton.jit
def entry_of(x, k):
    """A score and its class in one integer."""
    return (x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | k


@triton.jit
def listed(entries_ptr, length, LIST_ENTRIES: tl.constexpr):
    """Scores (LIST_ENTRIES,) and classes of a list, -inf beyond its length."""
    place = tl.arange(0, LIST_ENTRIES)
    both = tl.load(entries_ptr + place, place < length, other=0)
    x = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where(place < length, x, float("-inf")), both.to(tl.int32)


@triton.jit
def cut(entries_ptr, length, width, pivot, unused_ptr, LIST_ENTRIES: tl.constexpr):
    """Cut a list in memory to its `width` largest; the smallest of them, and the others' mass."""
    x, k = listed(entries_ptr, length, LIST_ENTRIES)
    smallest = tl.min(tl.where(tl.arange(0, LIST_ENTRIES) < length, x, float("inf")), 0)
    low, high, taken = thresholds_of(x, unused_ptr, LIST_ENTRIES, smallest, tl.max(x, 0), width)
    own = selected(x, low, high, width - taken)
    tl.debug_barrier()  # every thread has read its entries before they are overwritten
    tl.store(entries_ptr + tl.cumsum(own.to(tl.int32), 0) - 1, entry_of(x, k), own)
    smallest = tl.min(tl.where(own, x, float("inf")), 0)
    return smallest, tl.sum(tl.where(own, 0.0, tl.exp(x - pivot)), 0)


@triton.jit
def cut_all(
    entries_ptr, width, largest, bar, unlisted, length, unused_ptr, LIST_ENTRIES: tl.constexpr
):
    """Cut the lists (M, LIST_ENTRIES) of more than `width` entries."""
    BLOCK_ROWS: tl.constexpr = length.shape[0]
    m = tl.arange(0, BLOCK_ROWS)
    tl.debug_barrier()  # a thread may read back what another wrote
    for i in range(BLOCK_ROWS):
        size = tl.sum(tl.where(m == i, length, 0), 0)
        if size > width:
            pivot = tl.max(tl.where(m == i, largest, float("-inf")), 0)
            own_ptr = entries_ptr + i * LIST_ENTRIES
            smallest, lost = cut(own_ptr, size, width, pivot, unused_ptr, LIST_ENTRIES)
            bar = tl.where(m == i, tl.maximum(bar, smallest), bar)
            unlisted += tl.where(m == i, lost, 0.0)
            length = tl.where(m == i, width, length)
    tl.debug_barrier()
    return bar, unlisted, length


@triton.jit
def append(
    x, start, entries_ptr, limit, largest, mass, unlisted, length, LIST_ENTRIES: tl.constexpr
):
    """List those scores (M, P), of the classes from `start` on, that are at least `limit` (M,)."""
    BLOCK_ROWS: tl.constexpr = x.shape[0]
    BLOCK_CLASSES: tl.constexpr = x.shape[1]
    p = tl.arange(0, BLOCK_CLASSES)
    passes, terms = x >= limit[:, None], tl.exp(x - largest[:, None])
    mass += tl.sum(terms, 1)
    unlisted += tl.sum(tl.where(passes, 0.0, terms), 1)
    if tl.max(passes.to(tl.int32)) > 0:
        # Places by a product with a triangle of ones: a scan would leave the tile's layout.
        rank = tl.dot(passes.to(tl.float16), (p[:, None] <= p[None, :]).to(tl.float16))
        place = (tl.arange(0, BLOCK_ROWS) * LIST_ENTRIES + length - 1)[:, None] + rank.to(tl.int32)
        tl.store(entries_ptr + place, entry_of(x, (p + start)[None, :]), passes)
        length += tl.max(rank, 1).to(tl.int32)
    return mass, unlisted, length


@triton.jit
def columns(x, part: tl.constexpr, PARTS: tl.constexpr):
    """One of PARTS blocks of the columns, by compile-time arithmetic on registers."""
    BLOCK_ROWS: tl.constexpr = x.shape[0]
    BLOCK_CLASSES: tl.constexpr = x.shape[1]
    bits = tl.reshape(x.to(tl.int32, bitcast=True), (BLOCK_ROWS, PARTS, BLOCK_CLASSES // PARTS))
    own = tl.arange(0, PARTS)[None, :, None] == part
    return tl.sum(tl.where(own, bits, 0), 1).to(tl.float32, bitcast=True)


@triton.jit
def score_kernel(
    features_ptr, weights_ptr, scale_ptr, offset_ptr, log_threshold_ptr, nodes_ptr,
    entries_ptr, lengths_ptr, totals_ptr, unlisted_ptr, first, stop, n_classes, d, width,
    SPLIT: tl.constexpr, PARTIAL_MAXIMA: tl.constexpr, LIST_ENTRIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr, BLOCK_DIMS: tl.constexpr,
):  # fmt: skip
    """A block of the rows `first` to `stop`: lists, log-sum-exps, and the mass not listed."""
    local = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = first + local < stop
    row = tl.minimum(first + local, stop - 1)
    # Rows beyond the last one copy it, and append nothing.
    lowest = tl.load(log_threshold_ptr + tl.load(nodes_ptr + row))
    lowest = tl.where(inside, lowest, float("inf"))
    entries_ptr += tl.program_id(0).to(tl.int64) * BLOCK_ROWS * LIST_ENTRIES
    factor = tl.load(scale_ptr)
    largest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    bar = tl.where(inside, float("-inf"), float("inf"))
    best = tl.full((BLOCK_ROWS, PARTIAL_MAXIMA), float("-inf"), tl.float32)
    unlisted = tl.zeros((BLOCK_ROWS,), tl.float32)
    mass = unlisted + 1.0  # a placeholder, which the first block scales to 0
    length = tl.zeros((BLOCK_ROWS,), tl.int32)
    for start in range(0, n_classes, BLOCK_CLASSES):
        if tl.max(length, 0) > LIST_ENTRIES - BLOCK_CLASSES:
            bar, unlisted, length = cut_all(
                entries_ptr, width, largest, bar, unlisted, length, log_threshold_ptr, LIST_ENTRIES
            )
        k = start + tl.arange(0, BLOCK_CLASSES)
        start_of_class = tl.minimum(k, n_classes - 1).to(tl.int64) * d
        low_part = tl.full((), n_classes, tl.int64) * d
        x = tile(
            features_ptr, row * d, weights_ptr, start_of_class, low_part, d, SPLIT, BLOCK_DIMS
        )  # fmt: skip
        x = x * factor + tl.load(offset_ptr + k, k < n_classes, other=float("-inf"))[None, :]
        before, largest = largest, tl.maximum(largest, tl.max(x, 1))
        total = tl.maximum(before + tl.log(mass), largest)  # no more than the sum's logarithm
        bound = tl.minimum(lowest + total - SUM_SLACK, largest)
        groups = tl.reshape(x, (BLOCK_ROWS, BLOCK_CLASSES // PARTIAL_MAXIMA, PARTIAL_MAXIMA))
        best = tl.maximum(best, tl.max(groups, 1))
        old, bar = bar, raised(best, bar, bound, largest, width, BAR_HALVINGS)
        limit = tl.maximum(bar, bound)
        limit = tl.where(limit > old, limit, above(old))
        shrink = tl.exp(before - largest)
        mass, unlisted = mass * shrink, unlisted * shrink
        for part in tl.static_range(TILE_PARTS):
            mass, unlisted, length = append(
                columns(x, part, TILE_PARTS), start + part * (BLOCK_CLASSES // TILE_PARTS),
                entries_ptr, limit, largest, mass, unlisted, length, LIST_ENTRIES,
            )  # fmt: skip
    tl.store(lengths_ptr + local, length, inside)
    tl.store(totals_ptr + local, largest + tl.log(mass), inside)
    tl.store(unlisted_ptr + local, unlisted / mass, inside)


@triton.jit
def finish_kernel(
    entries_ptr, lengths_ptr, totals_ptr, unlisted_ptr, log_threshold_ptr, nodes_ptr,
    values_ptr, classes_ptr, tail_ptr, first, width,
    LIST_ENTRIES: tl.constexpr,
):  # fmt: skip
    """The candidates of one row, from its list."""
    local = tl.program_id(0).to(tl.int64)
    node = tl.load(nodes_ptr + first + local)
    length = tl.load(lengths_ptr + local)
    x, k = listed(entries_ptr + local * LIST_ENTRIES, length, LIST_ENTRIES)
    total, largest = tl.load(totals_ptr + local), tl.max(x, 0)
    lowest = tl.minimum(tl.load(log_threshold_ptr + node) + total, largest)
    write_candidates(
        x, k, log_threshold_ptr, LIST_ENTRIES, total, lowest, largest,
        tl.load(unlisted_ptr + local), width,
        values_ptr + node * width, classes_ptr + node * width, tail_ptr + node,
    )  # fmt: skip


def score(
    features: torch.Tensor,
    weights: HalfWeights,
    offset: torch.Tensor,
    nodes: torch.Tensor,
    *,
    out: Scores,
) -> None:
    """
    Write the candidates of all rows to their nodes in sparse scores.

    Parameters
    ----------
    features : Tensor (N, d) float16 or float32
    weights : HalfWeights (K, d)
        For features of this type.
    offset : Tensor (K,) float32
    nodes : Tensor (N,) int64
        Row of `out` of each row of the features.

    Raises
    ------
    ValueError
        Features that are not contiguous, or C above MAX_CANDIDATES.
    """
    (n_rows, d), (n_classes, width) = features.shape, (len(offset), out.values.shape[1])
    if not features.is_contiguous() or width > MAX_CANDIDATES:
        raise ValueError(f"features must be contiguous, candidates at most {MAX_CANDIDATES}")
    chunk = min(n_rows, CHUNK_ROWS)
    entries = nodes.new_empty(chunk, LIST_ENTRIES)
    lengths = nodes.new_empty(chunk, dtype=torch.int32)
    totals, unlisted = out.tail.new_empty(chunk), out.tail.new_empty(chunk)
    blocks, options = launch(features.device, split=weights.split)
    for first in range(0, n_rows, chunk):
        stop = min(first + chunk, n_rows)
        score_kernel[(triton.cdiv(stop - first, blocks["BLOCK_ROWS"]),)](
            features, weights.parts, weights.scale, offset, out.log_threshold, nodes,
            entries, lengths, totals, unlisted, first, stop, n_classes, d, width,
            SPLIT=weights.split, PARTIAL_MAXIMA=PARTIAL_MAXIMA, LIST_ENTRIES=LIST_ENTRIES,
            **blocks, **options,
        )  # fmt: skip
        finish_kernel[(stop - first,)](
            entries, lengths, totals, unlisted, out.log_threshold, nodes,
            out.values, out.classes, out.tail, first, width,
            LIST_ENTRIES=LIST_ENTRIES, num_warps=FINISH_WARPS,
        )  # fmt: skip
