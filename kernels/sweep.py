"""
One Jacobi sweep: z_i <- softmax_k( b_ik + sum_j A_ij z_jk ), at the candidates of each row.

For each row i with candidates c and the mass t of all other classes:

    l_c = b_c + (A z)_ic,   m = max(max_c l_c, log t),   s = sum_c e^(l_c - m) + e^(log t - m),
    z_c = e^(l_c - m) / s  where that is at least min(floor, the row's largest), at most R of them.

Shapes: b, candidates (N, C); z, its classes (N, R); affinity in CSR with E entries. A row of z is
written in the order of its candidates, its unused end is 0. If wanted, `bound` (N,) is t (e^u - 1),
u the largest message of either sign to a class that is no candidate and t at least K times
float32's rounding: the mass that the sweep may have misplaced, at most 1.

A row reads its own C scores and the used entries of each neighbour. Memory traffic is the cost;
`messages.py` describes how loads are kept in flight. Method: Zanella et al., NeurIPS 2024, equation
5, on lists as `transclip_fast.types` has them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from transclip_fast import types
from transclip_fast.kernels.messages import launch, row_messages, segment_messages
from transclip_fast.kernels.segments import SegmentedAffinity
from transclip_fast.types import Assignments, Scores

TINY = tl.constexpr(1.1754944e-38)  # the smallest normal float32
FLOAT32_ROUNDING = tl.constexpr(types.FLOAT32_ROUNDING)
LARGEST_MESSAGE = tl.constexpr(types.LARGEST_MESSAGE)


@triton.jit
def expm1(x):
    """e^x - 1 for x >= 0, without cancellation where x is small."""
    return tl.where(x < 1e-2, x * (1 + x * (0.5 + x / 6)), tl.exp(x) - 1)


@triton.jit
def rank_of(mass, n_slots):
    """Rank of each entry in its row (B, C), largest first; equal entries keep their order."""
    c = tl.arange(0, mass.shape[1])[None, :]
    rank = tl.zeros(mass.shape, tl.int32)
    for slot in range(n_slots):
        other = tl.sum(tl.where(c == slot, mass, 0.0), 1)[:, None]
        rank += ((other > mass) | ((other == mass) & (c > slot))).to(tl.int32)
    return rank


@triton.jit
def sweep_kernel(
    scores_ptr, candidates_ptr, tail_ptr, n_slots, unused,
    offsets_ptr, columns_ptr, weights_ptr, z_ptr, z_classes_ptr, width,
    segments_ptr, part_ptr, part_classes_ptr, part_sums_ptr, part_overflow_ptr,
    out_ptr, out_classes_ptr, bound_ptr, floor, n_rows, n_classes,
    CUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_OUTSIDE: tl.constexpr,
):  # fmt: skip
    """A block of rows; CUT if z has room for fewer entries than slots; bound if BLOCK_OUTSIDE."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < n_rows
    c = tl.arange(0, BLOCK_SLOTS)[None, :]
    place = row[:, None] * n_slots + c
    mask = inside[:, None] & (c < n_slots)
    base = tl.load(scores_ptr + place, mask, other=float("-inf"))  # (B, C)
    slots = tl.where(base > unused, tl.load(candidates_ptr + place, mask, other=-1), -1)
    tail = tl.load(tail_ptr + row, inside, other=1.0)  # (B,)

    sums = row_messages(
        row, inside, offsets_ptr, columns_ptr, weights_ptr, z_ptr, z_classes_ptr, width,
        segments_ptr, part_ptr, part_classes_ptr, part_sums_ptr, part_overflow_ptr, n_slots,
        slots, BLOCK_OUTSIDE,
    )  # fmt: skip

    # Classes outside the candidates get no messages; together they are one extra softmax entry.
    logits = base + sums[0]
    tail_logit = tl.where(tail > 0, tl.log(tl.maximum(tail, TINY)), float("-inf"))
    pivot = tl.maximum(tl.max(logits, 1), tail_logit)
    mass = tl.exp(logits - pivot[:, None])
    mass = mass / (tl.sum(mass, 1) + tl.exp(tail_logit - pivot))[:, None]
    # A row's largest entry stays, even where all of it underflowed.
    is_top = (mass == tl.max(mass, 1)[:, None]) & (slots >= 0)
    first_top = tl.min(tl.where(is_top, c, BLOCK_SLOTS), 1)
    mass = tl.where(c == first_top[:, None], tl.maximum(mass, TINY), mass)
    threshold = tl.minimum(tl.max(mass, 1), floor)
    kept = (mass >= threshold[:, None]) & (mass > 0) & inside[:, None]
    if CUT:
        kept = kept & (rank_of(mass, n_slots) < width)
    rank = tl.cumsum(kept.to(tl.int32), 1) - 1
    tl.store(out_ptr + row[:, None] * width + rank, mass, kept)
    tl.store(out_classes_ptr + row[:, None] * width + rank, slots, kept)
    free = inside[:, None] & (c >= tl.sum(kept.to(tl.int32), 1)[:, None]) & (c < width)
    tl.store(out_ptr + row[:, None] * width + c, 0.0, free)
    tl.store(out_classes_ptr + row[:, None] * width + c, 0, free)
    if BLOCK_OUTSIDE:
        outside_max = tl.maximum(tl.max(tl.abs(sums[2]), 1), sums[3])
        outside_max = tl.minimum(outside_max, LARGEST_MESSAGE)
        # Below float32 rounding the tail mass is unknown; n_classes * rounding is its upper bound.
        tail = tl.maximum(tail, n_classes * FLOAT32_ROUNDING)
        tl.store(bound_ptr + row, tl.minimum(tail * expm1(outside_max), 1.0), inside)


def sweep(
    base: Scores, graph: SegmentedAffinity, z: Assignments, *, out: Assignments, bounded: bool
) -> None:
    """
    Sweep all rows of sparse assignments once, into `out`; `bounded` computes its bound, too.

    Raises
    ------
    ValueError
        R above C, or `out` is z.
    """
    (n_rows, n_slots), width = base.values.shape, z.values.shape[1]
    same = out.values.data_ptr() == z.values.data_ptr()
    if width > n_slots or out.values.shape != (n_rows, width) or same:
        raise ValueError("z has at most C entries a row, and a sweep does not write where it reads")
    unused = float("-inf")
    parts = segment_messages(graph, z, base.values, base.classes, unused, outside=bounded)
    grid, options = launch(n_rows, n_slots, outside=bounded)
    sweep_kernel[grid](
        base.values, base.classes, base.tail, n_slots, unused,
        *graph.arrays, z.values, z.classes, width, graph.bounds, *parts,
        out.values, out.classes, out.bound, out.floor, n_rows, z.n_classes,
        CUT=width < n_slots, **options,
    )  # fmt: skip
