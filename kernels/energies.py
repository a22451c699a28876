"""
Terms of the objective that need the graph: sum_ij A_ij z_i.z_j and sum_ik z_ik log z_ik.

Each row's two terms go to an (N, 2) float32 buffer, which torch sums in float64. In the short form
a row's slots are its own classes: what it hears there, times z, is the pairwise term of the mass
that was kept. Shapes as in `sweep.py`; bytes of one sweep without its scores.
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

TINY = tl.constexpr(1.1754944e-38)  # 0 log 0 = 0


@triton.jit
def energy_kernel(
    offsets, columns, weights, z, z_classes, width,
    segments, part, part_others, part_elsewhere, part_pooled, terms, n_rows,
    B: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """B rows of the short form."""
    row = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = row < n_rows
    c = tl.arange(0, C)[None, :]
    mask = inside[:, None] & (c < width)
    mass = tl.load(z + row[:, None] * width + c, mask, other=0.0)  # (B, C)
    slots = tl.load(z_classes + row[:, None] * width + c, mask, other=-1)
    slots = tl.where(mass > 0, slots, -1)
    heard, _others, _elsewhere, _pooled = hear_all(
        row, inside, offsets, columns, weights, z, z_classes, width,
        segments, part, part_others, part_elsewhere, part_pooled, width, slots, H,
    )  # fmt: skip
    tl.store(terms + 2 * row, tl.sum(mass * heard, 1), inside)
    tl.store(terms + 2 * row + 1, tl.sum(mass * tl.log(tl.maximum(mass, TINY)), 1), inside)


@triton.jit
def energy_full_kernel(
    offsets, columns, weights, z, segments, part, terms, n_classes, B: tl.constexpr
):
    """One row of the full form."""
    row = tl.program_id(0).to(tl.int64)
    pairwise, entropy = tl.zeros((B,), tl.float32), tl.zeros((B,), tl.float32)
    for start in range(0, n_classes, B):
        k = start + tl.arange(0, B)
        mass = tl.load(z + row * n_classes + k, k < n_classes, other=0.0)
        heard = heard_full(row, offsets, columns, weights, z, segments, part, n_classes, k)
        pairwise += mass * heard
        entropy += mass * tl.log(tl.maximum(mass, TINY))
    tl.store(terms + 2 * row, tl.sum(pairwise, 0))
    tl.store(terms + 2 * row + 1, tl.sum(entropy, 0))


def energies(
    graph: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    segments: Segments,
    z: torch.Tensor,
    z_classes: torch.Tensor,
) -> torch.Tensor:
    """Pairwise term and entropy, (2,) float64, of the short form z, z_classes (N, R)."""
    n_rows, width = z.shape
    terms = z.new_empty(n_rows, 2)
    parts = hear_segments(segments, *graph[1:], z, z_classes, z, z_classes, 0.0)
    launch = Launch.of(width)
    energy_kernel[(triton.cdiv(n_rows, launch.rows),)](
        *graph, z, z_classes, width, segments.offsets, *parts, terms, n_rows,
        B=launch.rows, C=launch.slots, H=parts[1].shape[1], num_warps=launch.warps,
    )  # fmt: skip
    return terms.sum(0, dtype=torch.float64)


def energies_full(
    graph: tuple[torch.Tensor, torch.Tensor, torch.Tensor], segments: Segments, z: torch.Tensor
) -> torch.Tensor:
    """Pairwise term and entropy, (2,) float64, of the full form z (N, K)."""
    n_rows, n_classes = z.shape
    terms = z.new_empty(n_rows, 2)
    part = hear_segments_full(segments, *graph[1:], z)
    block, warps = full_launch(n_classes)
    energy_full_kernel[(n_rows,)](
        *graph, z, segments.offsets, part, terms, n_classes, B=block, num_warps=warps
    )
    return terms.sum(0, dtype=torch.float64)
