"""
Terms of the objective that need the graph: sum_ij A_ij z_i.z_j and sum_ik z_ik log z_ik.

The slots of a row are the classes of its own z. The messages to them, times z, sum to the pairwise
term of the kept mass. A row writes its two terms to an (N, 2) float32 buffer, which torch sums in
float64.

Shapes: z and its classes (N, R); affinity in CSR with E entries. Bytes: those of one sweep without
its scores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from transclip_fast.kernels.messages import launch, row_messages, segment_messages
from transclip_fast.kernels.segments import SegmentedAffinity
from transclip_fast.types import Assignments

TINY = tl.constexpr(1.1754944e-38)  # the smallest normal float32: 0 log 0 = 0


@triton.jit
def energy_kernel(
    offsets_ptr, columns_ptr, weights_ptr, z_ptr, z_classes_ptr, width,
    segments_ptr, part_ptr, part_classes_ptr, part_sums_ptr, part_overflow_ptr,
    terms_ptr, n_rows,
    BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_OUTSIDE: tl.constexpr,
):  # fmt: skip
    """A block of rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < n_rows
    c = tl.arange(0, BLOCK_SLOTS)[None, :]
    mask = inside[:, None] & (c < width)
    mass = tl.load(z_ptr + row[:, None] * width + c, mask, other=0.0)  # (B, C)
    slots = tl.load(z_classes_ptr + row[:, None] * width + c, mask, other=-1)
    slots = tl.where(mass > 0, slots, -1)
    sums = row_messages(
        row, inside, offsets_ptr, columns_ptr, weights_ptr, z_ptr, z_classes_ptr, width,
        segments_ptr, part_ptr, part_classes_ptr, part_sums_ptr, part_overflow_ptr, width,
        slots, BLOCK_OUTSIDE,
    )  # fmt: skip
    tl.store(terms_ptr + 2 * row, tl.sum(mass * sums[0], 1), inside)
    entropy = tl.sum(mass * tl.log(tl.maximum(mass, TINY)), 1)
    tl.store(terms_ptr + 2 * row + 1, entropy, inside)


def energies(graph: SegmentedAffinity, z: Assignments) -> torch.Tensor:
    """Pairwise term and entropy of each row (N, 2) float32 of sparse assignments."""
    n_rows, width = len(graph.bounds), z.values.shape[1]
    terms = z.values.new_empty(n_rows, 2)
    parts = segment_messages(graph, z, z.values, z.classes, 0.0, outside=False)
    grid, options = launch(n_rows, width, outside=False)
    energy_kernel[grid](
        *graph.arrays, z.values, z.classes, width, graph.bounds, *parts, terms, n_rows, **options
    )
    return terms
