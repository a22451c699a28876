"""
One Jacobi sweep: z_i <- softmax_k( b_ik + sum_j A_ij z_jk ), in both forms of z.

Short form, for each row i with candidates c and the mass t of all other classes:

    l_c = b_c + (A z)_ic,   m = max(max_c l_c, log t),   s = sum_c e^(l_c - m) + e^(log t - m),
    z_c = e^(l_c - m) / s  where that is at least min(floor, the row's largest), at most R of them.

Shapes: b, candidates (N, C); z, its classes (N, R); affinity in CSR with E entries. A row of z is
written in the order of its candidates, its unused end is 0. `bound` (N,) is t (e^u - 1), u the
largest message of either sign to a class that is no candidate and t at least float32's rounding:
the mass that the sweep may have misplaced.

Full form: the plain softmax over K classes, one row a program.

A row reads its own C scores and, of each neighbour, the entries in use: bytes are the cost, see
`messages.py` for how they are kept in flight. Method: Zanella et al., NeurIPS 2024, equation 5, on
lists as `transclip_fast.types` has them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from transclip_fast.kernels.messages import (
    Launch,
    Segments,
    full_launch,
    hear_all,
    hear_segments,
    hear_segments_full,
    heard_full,
)

TINY = tl.constexpr(1.1754944e-38)  # the smallest normal float32
ROUNDING = tl.constexpr(2.0**-24)
MOST_HEARD = tl.constexpr(64.0)  # e^64 moves everything


@triton.jit
def expm1(x):
    """e^x - 1 for x >= 0, without cancellation where x is small."""
    return tl.where(x < 1e-2, x * (1 + x * (0.5 + x / 6)), tl.exp(x) - 1)


@triton.jit
def rank_of(mass, n_slots):
    """How many entries of its row (B, C) each one comes after; of equal ones the first is first."""
    c = tl.arange(0, mass.shape[1])[None, :]
    rank = tl.zeros(mass.shape, tl.int32)
    for slot in range(n_slots):
        other = tl.sum(tl.where(c == slot, mass, 0.0), 1)[:, None]
        rank += ((other > mass) | ((other == mass) & (c > slot))).to(tl.int32)
    return rank


@triton.jit
def sweep_kernel(
    scores, candidates, tails, n_slots, least,
    offsets, columns, weights, z, z_classes, width,
    segments, part, part_others, part_elsewhere, part_pooled,
    out, out_classes, bound, floor, n_rows, n_classes,
    CUT: tl.constexpr, B: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """B rows of the short form; CUT where z has room for fewer than all slots."""
    row = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = row < n_rows
    c = tl.arange(0, C)[None, :]
    place = row[:, None] * n_slots + c
    mask = inside[:, None] & (c < n_slots)
    base = tl.load(scores + place, mask, other=float("-inf"))  # (B, C)
    slots = tl.where(base > least, tl.load(candidates + place, mask, other=-1), -1)
    tail = tl.load(tails + row, inside, other=1.0)  # (B,)

    heard, _others, elsewhere, pooled = hear_all(
        row, inside, offsets, columns, weights, z, z_classes, width,
        segments, part, part_others, part_elsewhere, part_pooled, n_slots, slots, H,
    )  # fmt: skip

    logits = base + heard
    silent = tl.where(tail > 0, tl.log(tl.maximum(tail, TINY)), float("-inf"))
    pivot = tl.maximum(tl.max(logits, 1), silent)
    mass = tl.exp(logits - pivot[:, None])
    mass = mass / (tl.sum(mass, 1) + tl.exp(silent - pivot))[:, None]
    # A row's largest entry stays, even where all of it underflowed.
    first_best = tl.min(tl.where((mass == tl.max(mass, 1)[:, None]) & (slots >= 0), c, C), 1)
    mass = tl.where(c == first_best[:, None], tl.maximum(mass, TINY), mass)
    low = tl.minimum(tl.max(mass, 1), floor)
    kept = (mass >= low[:, None]) & (mass > 0) & inside[:, None]
    if CUT:
        kept = kept & (rank_of(mass, n_slots) < width)
    rank = tl.cumsum(kept.to(tl.int32), 1) - 1
    tl.store(out + row[:, None] * width + rank, mass, kept)
    tl.store(out_classes + row[:, None] * width + rank, slots, kept)
    unused = inside[:, None] & (c >= tl.sum(kept.to(tl.int32), 1)[:, None]) & (c < width)
    tl.store(out + row[:, None] * width + c, 0.0, unused)
    tl.store(out_classes + row[:, None] * width + c, 0, unused)
    unheard = tl.minimum(tl.maximum(tl.max(tl.abs(elsewhere), 1), pooled), MOST_HEARD)
    # Of a tail below rounding nothing is known but that.
    tail = tl.maximum(tail, n_classes * ROUNDING)
    tl.store(bound + row, tl.minimum(tail * expm1(unheard), 1.0), inside)


@triton.jit
def sweep_full_kernel(
    scores, offsets, columns, weights, z, segments, part, out, n_classes, B: tl.constexpr
):  # fmt: skip
    """One row of the full form: logits to `out` block by block, then their softmax."""
    row = tl.program_id(0).to(tl.int64)
    pivot, total = float("-inf"), 0.0
    for start in range(0, n_classes, B):
        k = start + tl.arange(0, B)
        logits = tl.load(scores + row * n_classes + k, k < n_classes, other=float("-inf"))
        logits += heard_full(row, offsets, columns, weights, z, segments, part, n_classes, k)
        tl.store(out + row * n_classes + k, logits, k < n_classes)
        largest = tl.maximum(pivot, tl.max(logits, 0))
        shift = tl.where(largest > float("-inf"), largest, 0.0)
        total = total * tl.exp(pivot - shift) + tl.sum(tl.exp(logits - shift), 0)
        pivot = largest
    tl.debug_barrier()  # a thread may read back what another wrote
    for start in range(0, n_classes, B):
        k = start + tl.arange(0, B)
        logits = tl.load(out + row * n_classes + k, k < n_classes, other=float("-inf"))
        tl.store(out + row * n_classes + k, tl.exp(logits - pivot) / total, k < n_classes)


def sweep(
    scores: torch.Tensor,
    candidates: torch.Tensor,
    tail: torch.Tensor,
    graph: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    segments: Segments,
    z: torch.Tensor,
    z_classes: torch.Tensor,
    floor: float,
    n_classes: int,
    *,
    out: torch.Tensor,
    out_classes: torch.Tensor,
    bound: torch.Tensor,
) -> None:
    """
    Sweep the short form.

    Parameters
    ----------
    scores, candidates : Tensor (N, C) float32, int32
        Base scores less the row's log-sum-exp, -inf where unused.
    tail : Tensor (N,) float32
        Mass of the other classes.
    graph : Tensor (N + 1,) int64, (E,) int64, (E,) float32
        Offsets, columns and weights of the affinity.
    z, z_classes : Tensor (N, R) float32, int32
    floor : float
        z below it is dropped, except a row's largest.
    n_classes : int
        K.
    out, out_classes, bound : Tensor (N, R), (N, R), (N,)
        Receive the result; not z itself.
    """
    (n_rows, n_slots), width = scores.shape, z.shape[1]
    if width > n_slots or out.shape != z.shape or out.data_ptr() == z.data_ptr():
        raise ValueError("z has at most C entries a row, and a sweep does not write where it reads")
    offsets, columns, weights = graph
    least = float("-inf")
    parts = hear_segments(segments, columns, weights, z, z_classes, scores, candidates, least)
    launch = Launch.of(n_slots)
    sweep_kernel[(triton.cdiv(n_rows, launch.rows),)](
        scores, candidates, tail, n_slots, least, offsets, columns, weights, z, z_classes, width,
        segments.offsets, *parts, out, out_classes, bound, floor, n_rows, n_classes,
        CUT=width < n_slots, B=launch.rows, C=launch.slots, H=parts[1].shape[1],
        num_warps=launch.warps,
    )  # fmt: skip


def sweep_full(
    scores: torch.Tensor,
    graph: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    segments: Segments,
    z: torch.Tensor,
    *,
    out: torch.Tensor,
) -> None:
    """Sweep the full form: `scores`, `z` and `out` (N, K) float32, `out` not z itself."""
    n_rows, n_classes = scores.shape
    if out.shape != z.shape or out.data_ptr() == z.data_ptr():
        raise ValueError("a sweep does not write where it reads")
    part = hear_segments_full(segments, *graph[1:], z)
    block, warps = full_launch(n_classes)
    sweep_full_kernel[(n_rows,)](
        scores, *graph, z, segments.offsets, part, out, n_classes, B=block, num_warps=warps
    )
