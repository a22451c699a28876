"""
Messages through the graph, (A z)_i = sum_j A_ij z_j: the part that sweeps and energies share.

A block of rows adds the first neighbour of each row, then the second, and so on. The neighbours of
a hub are cut into segments (`segments.py`), which are summed first, in parallel; its own block adds
up those of the last level, in order.

A row has slots, the classes whose messages it needs (its candidates). With BLOCK_OUTSIDE, messages
to other classes are summed too, in a list of the first OUTSIDE_CLASSES of them. The sizes of
messages to any further class are added to one overflow, so the largest sum is exact up to that many
classes, and an upper bound beyond. It more than doubles the instructions of a message.

Layout: rows run over lanes and slots over registers, so that an entry of a neighbour is loaded once
for all slots. Each entry is compared with all slots, because Triton cannot scatter to registers.

Shapes: z and its classes (N, R); affinity in CSR with E entries; slots (B, C) of a block of B rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from transclip_fast.kernels.segments import SegmentedAffinity
from transclip_fast.types import Assignments

OUTSIDE_CLASSES = 16  # classes outside a row's slots whose messages are summed one by one
# Slots, a power of two: rows of a block, warps. With two or four slots a thread, a warp shares its
# loads and many rows are in flight.
LAUNCHES = {16: (8, 1), 32: (8, 2), 64: (2, 2), 128: (1, 4), 256: (1, 4), 512: (1, 8), 1024: (1, 4)}


@triton.jit
def zero_messages(slots, BLOCK_OUTSIDE: tl.constexpr):
    """
    The sums before any message: of the slots (B, C); with BLOCK_OUTSIDE also the other classes, -1
    where free, and their sums (B, H), and the overflow (B,).
    """
    BLOCK_ROWS: tl.constexpr = slots.shape[0]
    messages = tl.zeros((BLOCK_ROWS, slots.shape[1]), tl.float32)
    if BLOCK_OUTSIDE:
        sums = (
            messages,
            tl.full((BLOCK_ROWS, BLOCK_OUTSIDE), -1, tl.int32),
            tl.zeros((BLOCK_ROWS, BLOCK_OUTSIDE), tl.float32),
            tl.zeros((BLOCK_ROWS,), tl.float32),
        )
    else:
        sums = (messages,)
    return sums


@triton.jit
def accumulate_outside(classes, message, missed, outside_classes, outside_sums, outside_overflow):
    """Add one message a row (B,) to its class (B,) in the list of other classes, if `missed`."""
    listed = outside_classes == classes[:, None]  # (B, H)
    missed = missed & (tl.max(listed.to(tl.int32), 1) == 0) & (message != 0)
    taken = tl.sum((outside_classes >= 0).to(tl.int32), 1)  # (B,)
    place = tl.arange(0, outside_classes.shape[1])[None, :]
    enters = (place == taken[:, None]) & missed[:, None]
    outside_classes = tl.where(enters, classes[:, None], outside_classes)
    outside_sums += tl.where(listed | enters, message[:, None], 0.0)
    full = taken == outside_classes.shape[1]
    outside_overflow += tl.where(missed & full, tl.abs(message), 0.0)
    return outside_classes, outside_sums, outside_overflow


@triton.jit
def accumulate_message(classes, message, slots, sums, BLOCK_OUTSIDE: tl.constexpr):
    """Add one message a row, `message` (B,) to `classes` (B,); `slots` (B, C) are classes too."""
    in_slot = slots == classes[:, None]  # (B, C)
    messages = sums[0] + tl.where(in_slot, message[:, None], 0.0)
    if BLOCK_OUTSIDE:
        missed = tl.max(in_slot.to(tl.int32), 1) == 0
        outside_classes, outside_sums, outside_overflow = accumulate_outside(
            classes, message, missed, sums[1], sums[2], sums[3]
        )
        sums = (messages, outside_classes, outside_sums, outside_overflow)
    else:
        sums = (messages,)
    return sums


@triton.jit
def gather_messages(
    first, last, columns_ptr, weights_ptr, z_ptr, z_classes_ptr, width, slots, sums,
    BLOCK_OUTSIDE: tl.constexpr,
):  # fmt: skip
    """Add the entries `first` to `last` (B,) of the affinity, each a list (width,) of z."""
    longest = tl.max((last - first).to(tl.int32), 0)
    for step in range(longest):
        entry = first + step
        own = entry < last
        place = tl.load(columns_ptr + entry, own, other=0) * width  # (B,)
        weight = tl.load(weights_ptr + entry, own, other=0.0)
        value = tl.load(z_ptr + place, own, other=0.0)
        r = 0
        while tl.max(value, 0) > 0:  # at 0 the rest of a list is unused
            classes = tl.load(z_classes_ptr + place + r, value > 0, other=-2)
            sums = accumulate_message(classes, weight * value, slots, sums, BLOCK_OUTSIDE)
            r += 1
            value = tl.load(z_ptr + place + r, (value > 0) & (r < width), other=0.0)
    return sums


@triton.jit
def gather_segments(
    first, last, part_ptr, part_classes_ptr, part_sums_ptr, part_overflow_ptr, n_slots, sums,
    BLOCK_OUTSIDE: tl.constexpr,
):  # fmt: skip
    """Add the sums of the segments `first` to `last` (B,) of each row, in order."""
    longest = tl.max(last - first, 0)
    c = tl.arange(0, sums[0].shape[1])[None, :]
    for step in range(longest):
        segment = (first + step).to(tl.int64)
        own = first + step < last
        mask = own[:, None] & (c < n_slots)
        messages = sums[0] + tl.load(part_ptr + segment[:, None] * n_slots + c, mask, other=0.0)
        if BLOCK_OUTSIDE:
            outside_classes, outside_sums, outside_overflow = sums[1], sums[2], sums[3]
            outside_overflow += tl.load(part_overflow_ptr + segment, own, other=0.0)
            for h in range(BLOCK_OUTSIDE):
                place = segment * BLOCK_OUTSIDE + h
                classes = tl.load(part_classes_ptr + place, own, other=-1)
                message = tl.load(part_sums_ptr + place, own & (classes >= 0), other=0.0)
                outside_classes, outside_sums, outside_overflow = accumulate_outside(
                    tl.where(classes >= 0, classes, -2), message, classes >= 0,
                    outside_classes, outside_sums, outside_overflow,
                )  # fmt: skip
            sums = (messages, outside_classes, outside_sums, outside_overflow)
        else:
            sums = (messages,)
    return sums


@triton.jit
def row_messages(
    row, inside, offsets_ptr, columns_ptr, weights_ptr, z_ptr, z_classes_ptr, width,
    segments_ptr, part_ptr, part_classes_ptr, part_sums_ptr, part_overflow_ptr, n_slots,
    slots, BLOCK_OUTSIDE: tl.constexpr,
):  # fmt: skip
    """All messages to rows (B,), at their slots (B, C) and outside; hubs add up their segments."""
    segment = tl.load(segments_ptr + 2 * row, inside, other=0)
    last_segment = tl.load(segments_ptr + 2 * row + 1, inside, other=0)
    start = tl.load(offsets_ptr + row, inside, other=0)
    stop = tl.load(offsets_ptr + row + 1, inside, other=0)
    stop = tl.where(last_segment > segment, start, stop)
    sums = gather_messages(
        start, stop, columns_ptr, weights_ptr, z_ptr, z_classes_ptr, width,
        slots, zero_messages(slots, BLOCK_OUTSIDE), BLOCK_OUTSIDE,
    )  # fmt: skip
    return gather_segments(
        segment, last_segment, part_ptr, part_classes_ptr, part_sums_ptr, part_overflow_ptr,
        n_slots, sums, BLOCK_OUTSIDE,
    )  # fmt: skip


@triton.jit
def store_segments(
    segment, inside, sums, part_ptr, part_classes_ptr, part_sums_ptr, part_overflow_ptr, n_slots,
    BLOCK_OUTSIDE: tl.constexpr,
):  # fmt: skip
    """Store the sums of segments (B,)."""
    c = tl.arange(0, sums[0].shape[1])[None, :]
    mask = inside[:, None] & (c < n_slots)
    tl.store(part_ptr + segment[:, None] * n_slots + c, sums[0], mask)
    if BLOCK_OUTSIDE:
        h = segment[:, None] * BLOCK_OUTSIDE + tl.arange(0, BLOCK_OUTSIDE)[None, :]
        tl.store(part_classes_ptr + h, sums[1], inside[:, None])
        tl.store(part_sums_ptr + h, sums[2], inside[:, None])
        tl.store(part_overflow_ptr + segment, sums[3], inside)


@triton.jit
def segment_kernel(
    rows_ptr, first_ptr, last_ptr, columns_ptr, weights_ptr, z_ptr, z_classes_ptr, width,
    scores_ptr, classes_ptr, n_slots, unused,
    part_ptr, part_classes_ptr, part_sums_ptr, part_overflow_ptr, n_segments,
    BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_OUTSIDE: tl.constexpr,
):  # fmt: skip
    """A block of segments of neighbours: see `segment_messages`."""
    segment = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = segment < n_segments
    c = tl.arange(0, BLOCK_SLOTS)[None, :]
    row = tl.load(rows_ptr + segment, inside, other=0)
    mask = inside[:, None] & (c < n_slots)
    place = row[:, None] * n_slots + c
    used = tl.load(scores_ptr + place, mask, other=float("-inf")) > unused
    slots = tl.where(used, tl.load(classes_ptr + place, mask, other=-1), -1)  # (B, C)
    start = tl.load(first_ptr + segment, inside, other=0)
    stop = tl.load(last_ptr + segment, inside, other=0)
    sums = gather_messages(
        start, stop, columns_ptr, weights_ptr, z_ptr, z_classes_ptr, width,
        slots, zero_messages(slots, BLOCK_OUTSIDE), BLOCK_OUTSIDE,
    )  # fmt: skip
    store_segments(
        segment, inside, sums, part_ptr, part_classes_ptr, part_sums_ptr, part_overflow_ptr,
        n_slots, BLOCK_OUTSIDE,
    )  # fmt: skip


@triton.jit
def merge_kernel(
    first_ptr, last_ptr, part_ptr, part_classes_ptr, part_sums_ptr, part_overflow_ptr,
    base, n_slots, n_segments,
    BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_OUTSIDE: tl.constexpr,
):  # fmt: skip
    """A block of segments of segments, numbered from `base` on."""
    segment = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = segment < n_segments
    start = tl.load(first_ptr + segment, inside, other=0).to(tl.int32)
    stop = tl.load(last_ptr + segment, inside, other=0).to(tl.int32)
    no_slots = tl.full((BLOCK_ROWS, BLOCK_SLOTS), -1, tl.int32)
    sums = gather_segments(
        start, stop, part_ptr, part_classes_ptr, part_sums_ptr, part_overflow_ptr,
        n_slots, zero_messages(no_slots, BLOCK_OUTSIDE), BLOCK_OUTSIDE,
    )  # fmt: skip
    store_segments(
        base + segment, inside, sums, part_ptr, part_classes_ptr, part_sums_ptr,
        part_overflow_ptr, n_slots, BLOCK_OUTSIDE,
    )  # fmt: skip


def launch(n_rows: int, n_slots: int, *, outside: bool) -> tuple[tuple[int], dict[str, int]]:
    """Grid and options of a kernel on so many rows, or segments, of so many slots."""
    slots = max(16, triton.next_power_of_2(n_slots))
    rows, warps = LAUNCHES.get(slots, (1, 8))
    listed = OUTSIDE_CLASSES if outside else 0
    blocks = {"BLOCK_ROWS": rows, "BLOCK_SLOTS": slots, "BLOCK_OUTSIDE": listed}
    return (triton.cdiv(n_rows, rows),), {**blocks, "num_warps": warps}


def segment_messages(
    graph: SegmentedAffinity,
    z: Assignments,
    scores: torch.Tensor,
    classes: torch.Tensor | None,
    unused: float,
    *,
    outside: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Messages through each segment to the slots of its row, `classes` (N, C) with scores > unused.

    Returns
    -------
    tuple of Tensor (S, C) float32, (S, H) int32, (S, H) float32, (S,) float32
        Sums at the slots; other classes and their sums; the overflow. H is 0 unless `outside`.
    """
    total, n_slots = graph.n_segments, scores.shape[1]
    listed = OUTSIDE_CLASSES if outside else 0
    parts = (
        scores.new_empty(total, n_slots),
        scores.new_empty(total, listed, dtype=torch.int32),
        scores.new_empty(total, listed),
        scores.new_empty(total),
    )
    for level in graph.levels:
        size = len(level.rows)
        grid, options = launch(size, n_slots, outside=outside)
        if level.base == 0:
            segment_kernel[grid](
                level.rows, level.first, level.last, *graph.arrays[1:], z.values, z.classes,
                z.values.shape[1], scores, classes, n_slots, unused, *parts, size, **options,
            )  # fmt: skip
        else:
            merge_kernel[grid](
                level.first, level.last, *parts, level.base, n_slots, size, **options
            )
    return parts
