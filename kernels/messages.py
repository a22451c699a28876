"""
Messages through the graph, (A z)_i = sum_j A_ij z_j: the part that sweeps and energies share.

A block of rows adds the first neighbour of each row, then the second, and so on. A row with many
more neighbours than others would keep its block waiting: such a hub is cut into segments of at most
SEGMENT_NEIGHBORS neighbours. All segments are summed first, in parallel, and the hub's own block
adds their sums in order.

A row has slots, the classes whose messages it needs (its candidates). Messages to other classes are
summed in a list of the first OUTSIDE_CLASSES of them. The sizes of messages to any further class
are added to one overflow, so the largest sum is exact up to that many classes, and an upper bound
beyond.

Layout: rows run over lanes and slots over registers, so that an entry of a neighbour is loaded once
for all slots. Each entry is compared with all slots, because Triton cannot scatter to registers,
and a table of the entries' slots would have as many bytes as their classes.

Shapes: z and its classes (N, R); affinity in CSR with E entries; slots (B, C) of a block of B rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from transclip_fast.types import Affinity, Assignments

SEGMENT_NEIGHBORS = 64  # of a segment, at most: bounds the time of a block
OUTSIDE_CLASSES = 16  # classes outside a row's slots whose messages are summed one by one
# Slots, a power of two: rows of a block, warps. With two or four slots a thread, a warp shares its
# loads and many rows are in flight.
LAUNCHES = {16: (8, 1), 32: (8, 2), 64: (2, 2), 128: (1, 4), 256: (1, 4), 512: (1, 8), 1024: (1, 4)}


@dataclass(frozen=True)
class SegmentedAffinity:
    """
    An affinity of N rows, its hubs cut into S segments.

    `bounds` (N + 1,) int64 bounds each row's segments, of which a row that is no hub has none;
    `rows`, `first`, `last` (S,) int64 are each segment's row and its part of the entries.
    """

    affinity: Affinity
    bounds: torch.Tensor
    rows: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor

    @classmethod
    def of(cls, affinity: Affinity) -> SegmentedAffinity:
        """Cut the hubs into segments, whose number is read back from the device."""
        offsets, size = affinity.offsets, SEGMENT_NEIGHBORS
        degrees = offsets.diff()
        counts = torch.where(degrees > size, (degrees + size - 1) // size, 0)
        bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        rows = torch.repeat_interleave(counts)
        places = torch.arange(len(rows), device=rows.device) - bounds[rows]
        first = offsets[rows] + size * places
        return cls(affinity, bounds, rows, first, torch.minimum(first + size, offsets[rows + 1]))

    @property
    def arrays(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Offsets, columns and weights of the affinity."""
        return self.affinity.offsets, self.affinity.columns, self.affinity.weights


@triton.jit
def zero_messages(slots, BLOCK_OUTSIDE: tl.constexpr):
    """
    The sums before any message: of the slots (B, C), the other classes, -1 where free, and their
    sums (B, H), and the overflow (B,).
    """
    BLOCK_ROWS: tl.constexpr = slots.shape[0]
    return (
        tl.zeros((BLOCK_ROWS, slots.shape[1]), tl.float32),
        tl.full((BLOCK_ROWS, BLOCK_OUTSIDE), -1, tl.int32),
        tl.zeros((BLOCK_ROWS, BLOCK_OUTSIDE), tl.float32),
        tl.zeros((BLOCK_ROWS,), tl.float32),
    )


@triton.jit
def accumulate_message(classes, message, slots, sums):
    """Add one message a row, `message` (B,) to `classes` (B,); `slots` (B, C) are classes too."""
    messages, outside_classes, outside_sums, outside_overflow = sums
    in_slot = slots == classes[:, None]  # (B, C)
    messages += tl.where(in_slot, message[:, None], 0.0)
    listed = outside_classes == classes[:, None]  # (B, H)
    found = tl.max(in_slot.to(tl.int32), 1) + tl.max(listed.to(tl.int32), 1)
    missed = (found == 0) & (message != 0)
    taken = tl.sum((outside_classes >= 0).to(tl.int32), 1)  # (B,)
    place = tl.arange(0, outside_classes.shape[1])[None, :]
    enters = (place == taken[:, None]) & missed[:, None]
    outside_classes = tl.where(enters, classes[:, None], outside_classes)
    outside_sums += tl.where(listed | enters, message[:, None], 0.0)
    full = taken == outside_classes.shape[1]
    outside_overflow += tl.where(missed & full, tl.abs(message), 0.0)
    return messages, outside_classes, outside_sums, outside_overflow


@triton.jit
def gather_messages(
    first, last, columns_ptr, weights_ptr, z_ptr, z_classes_ptr, width, slots, sums
):
    """Add the entries `first` to `last` (B,) of the affinity, each a list (width,) of z."""
    longest = tl.max((last - first).to(tl.int32), 0)
    for step in range(longest):
        entry = first + step
        own = entry < last
        place = tl.load(columns_ptr + entry, own, other=0) * width  # (B,)
        stop = place + width
        weight = tl.load(weights_ptr + entry, own, other=0.0)
        value = tl.load(z_ptr + place, own, other=0.0)
        while tl.max(value, 0) > 0:  # at 0 the rest of a list is unused
            classes = tl.load(z_classes_ptr + place, value > 0, other=-2)
            sums = accumulate_message(classes, weight * value, slots, sums)
            place += 1
            value = tl.load(z_ptr + place, own & (place < stop), other=0.0)
    return sums


@triton.jit
def gather_segments(
    first, last, part_ptr, part_classes_ptr, part_sums_ptr, part_overflow_ptr, n_slots, slots, sums
):
    """Add the sums of the segments `first` to `last` (B,) of each row, in order."""
    longest = tl.max((last - first).to(tl.int32), 0)
    for step in range(longest):
        segment = first + step
        own = segment < last
        c = tl.arange(0, slots.shape[1])[None, :]
        mask = own[:, None] & (c < n_slots)
        messages, outside_classes, outside_sums, outside_overflow = sums
        messages += tl.load(part_ptr + segment[:, None] * n_slots + c, mask, other=0.0)
        outside_overflow += tl.load(part_overflow_ptr + segment, own, other=0.0)
        sums = messages, outside_classes, outside_sums, outside_overflow
        for h in range(outside_classes.shape[1]):
            place = segment * outside_classes.shape[1] + h
            classes = tl.load(part_classes_ptr + place, own, other=-1)
            message = tl.load(part_sums_ptr + place, own & (classes >= 0), other=0.0)
            sums = accumulate_message(tl.where(classes >= 0, classes, -2), message, slots, sums)
    return sums


@triton.jit
def row_messages(
    row, inside, offsets_ptr, columns_ptr, weights_ptr, z_ptr, z_classes_ptr, width,
    segments_ptr, part_ptr, part_classes_ptr, part_sums_ptr, part_overflow_ptr, n_slots,
    slots, BLOCK_OUTSIDE: tl.constexpr,
):  # fmt: skip
    """All messages to rows (B,), at their slots (B, C) and outside; hubs add up their segments."""
    first = tl.load(offsets_ptr + row, inside, other=0)
    last = tl.load(offsets_ptr + row + 1, inside, other=0)
    segment = tl.load(segments_ptr + row, inside, other=0)
    stop = tl.load(segments_ptr + row + 1, inside, other=0)
    last = tl.where(segment == stop, last, first)
    sums = gather_messages(
        first, last, columns_ptr, weights_ptr, z_ptr, z_classes_ptr, width,
        slots, zero_messages(slots, BLOCK_OUTSIDE),
    )  # fmt: skip
    return gather_segments(
        segment, stop, part_ptr, part_classes_ptr, part_sums_ptr, part_overflow_ptr, n_slots,
        slots, sums,
    )  # fmt: skip


@triton.jit
def segment_kernel(
    rows_ptr, first_ptr, last_ptr, columns_ptr, weights_ptr, z_ptr, z_classes_ptr, width,
    scores_ptr, classes_ptr, n_slots, unused,
    part_ptr, part_classes_ptr, part_sums_ptr, part_overflow_ptr, n_segments,
    BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_OUTSIDE: tl.constexpr,
):  # fmt: skip
    """A block of segments: see `segment_messages`."""
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
    messages, outside_classes, outside_sums, outside_overflow = gather_messages(
        start, stop, columns_ptr, weights_ptr, z_ptr, z_classes_ptr, width,
        slots, zero_messages(slots, BLOCK_OUTSIDE),
    )  # fmt: skip
    tl.store(part_ptr + segment[:, None] * n_slots + c, messages, mask)
    h = segment[:, None] * BLOCK_OUTSIDE + tl.arange(0, BLOCK_OUTSIDE)[None, :]
    tl.store(part_classes_ptr + h, outside_classes, inside[:, None])
    tl.store(part_sums_ptr + h, outside_sums, inside[:, None])
    tl.store(part_overflow_ptr + segment, outside_overflow, inside)


def launch(n_rows: int, n_slots: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and options of a kernel on so many rows, or segments, of so many slots."""
    slots = max(16, triton.next_power_of_2(n_slots))
    rows, warps = LAUNCHES.get(slots, (1, 8))
    blocks = {"BLOCK_ROWS": rows, "BLOCK_SLOTS": slots, "BLOCK_OUTSIDE": OUTSIDE_CLASSES}
    return (triton.cdiv(n_rows, rows),), {**blocks, "num_warps": warps}


def segment_messages(
    graph: SegmentedAffinity,
    z: Assignments,
    scores: torch.Tensor,
    classes: torch.Tensor | None,
    unused: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Messages through each segment to the slots of its row, `classes` (N, C) with scores > unused.

    Returns
    -------
    tuple of Tensor (S, C) float32, (S, H) int32, (S, H) float32, (S,) float32
        Sums at the slots; other classes and their sums; the overflow.
    """
    size, n_slots = len(graph.rows), scores.shape[1]
    grid, options = launch(size, n_slots)
    outside = size, options["BLOCK_OUTSIDE"]
    parts = (
        scores.new_empty(size, n_slots),
        scores.new_empty(outside, dtype=torch.int32),
        scores.new_empty(outside),
        scores.new_empty(size),
    )
    if size:
        segment_kernel[grid](
            graph.rows, graph.first, graph.last, *graph.arrays[1:], z.values, z.classes,
            z.values.shape[1], scores, classes, n_slots, unused, *parts, size, **options,
        )  # fmt: skip
    return parts
