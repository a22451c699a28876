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

SEGMENT_NEIGHBORS = 64  # neighbours of a segment, at most: bounds the time of a block
OUTSIDE_CLASSES = 16  # classes outside a row's slots whose messages are summed one by one


@dataclass(frozen=True)
class Segments:
    """
    The hubs of an affinity in segments.

    Parameters
    ----------
    offsets : Tensor (N + 1,) int64
        Bounds each row's segments; a row that is no hub has none.
    rows, first, last : Tensor (S,) int64
        Row of each segment, and its part of the affinity's entries.
    """

    offsets: torch.Tensor
    rows: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor

    @classmethod
    def of(cls, offsets: torch.Tensor) -> Segments:
        """The segments of an affinity with these offsets (N + 1,); reads their number back."""
        degrees = offsets.diff()
        size = SEGMENT_NEIGHBORS
        counts = torch.where(degrees > size, (degrees + size - 1) // size, 0)
        bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        rows = torch.repeat_interleave(counts)
        places = torch.arange(len(rows), device=rows.device) - bounds[rows]
        first = offsets[rows] + size * places
        return cls(bounds, rows, first, torch.minimum(first + size, offsets[rows + 1]))

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Launch:
    """Rows of a block, slots rounded up to a power of two, warps."""

    rows: int
    slots: int
    warps: int

    @classmethod
    def of(cls, n_slots: int) -> Launch:
        """
        The launch for rows of so many slots: two or four slots a thread, so that a warp shares its
        loads, many rows are in flight, and nothing spills on sm_80, sm_90, sm_100 or gfx942.
        """
        slots = max(16, triton.next_power_of_2(n_slots))
        rows, warps = LAUNCHES.get(slots, (1, 8))
        return cls(rows, slots, warps)


# Slots: rows of a block, warps.
LAUNCHES = {
    16: (8, 1),
    32: (8, 2),
    64: (2, 2),
    128: (1, 4),
    256: (1, 4),
    512: (1, 8),
    1024: (1, 4),
}


@triton.jit
def zero_messages(slots, BLOCK_OUTSIDE: tl.constexpr):
    """The sums before any message, in the order of `accumulate_message`."""
    BLOCK_ROWS: tl.constexpr = slots.shape[0]
    return (
        tl.zeros((BLOCK_ROWS, slots.shape[1]), tl.float32),
        tl.full((BLOCK_ROWS, BLOCK_OUTSIDE), -1, tl.int32),
        tl.zeros((BLOCK_ROWS, BLOCK_OUTSIDE), tl.float32),
        tl.zeros((BLOCK_ROWS,), tl.float32),
    )


@triton.jit
def accumulate_message(
    classes, message, slots, messages, outside_classes, outside_sums, outside_overflow
):
    """
    Add one message a row: `classes` (B,), `message` (B,).

    `slots`, `messages` (B, C): classes of the slots and their sums; `outside_classes`,
    `outside_sums` (B, H): other classes, -1 where free, and their sums; `outside_overflow` (B,).
    """
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
    first, last, columns_ptr, weights_ptr, z_ptr, z_classes_ptr, width,
    slots, messages, outside_classes, outside_sums, outside_overflow,
):  # fmt: skip
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
            messages, outside_classes, outside_sums, outside_overflow = accumulate_message(
                classes, weight * value,
                slots, messages, outside_classes, outside_sums, outside_overflow,
            )  # fmt: skip
            place += 1
            value = tl.load(z_ptr + place, own & (place < stop), other=0.0)
    return messages, outside_classes, outside_sums, outside_overflow


@triton.jit
def gather_segments(
    first, last, part_ptr, part_classes_ptr, part_sums_ptr, part_overflow_ptr, n_slots,
    slots, messages, outside_classes, outside_sums, outside_overflow,
):  # fmt: skip
    """Add the sums of the segments `first` to `last` (B,) of each row, in order."""
    longest = tl.max((last - first).to(tl.int32), 0)
    for step in range(longest):
        segment = first + step
        own = segment < last
        c = tl.arange(0, slots.shape[1])[None, :]
        mask = own[:, None] & (c < n_slots)
        messages += tl.load(part_ptr + segment[:, None] * n_slots + c, mask, other=0.0)
        outside_overflow += tl.load(part_overflow_ptr + segment, own, other=0.0)
        for h in range(outside_classes.shape[1]):
            place = segment * outside_classes.shape[1] + h
            classes = tl.load(part_classes_ptr + place, own, other=-1)
            message = tl.load(part_sums_ptr + place, own & (classes >= 0), other=0.0)
            classes = tl.where(classes >= 0, classes, -2)
            messages, outside_classes, outside_sums, outside_overflow = accumulate_message(
                classes, message, slots, messages, outside_classes, outside_sums, outside_overflow
            )
    return messages, outside_classes, outside_sums, outside_overflow


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
    messages, outside_classes, outside_sums, outside_overflow = zero_messages(slots, BLOCK_OUTSIDE)
    messages, outside_classes, outside_sums, outside_overflow = gather_messages(
        first, last, columns_ptr, weights_ptr, z_ptr, z_classes_ptr, width,
        slots, messages, outside_classes, outside_sums, outside_overflow,
    )  # fmt: skip
    return gather_segments(
        segment, stop, part_ptr, part_classes_ptr, part_sums_ptr, part_overflow_ptr, n_slots,
        slots, messages, outside_classes, outside_sums, outside_overflow,
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
    messages, outside_classes, outside_sums, outside_overflow = zero_messages(slots, BLOCK_OUTSIDE)
    messages, outside_classes, outside_sums, outside_overflow = gather_messages(
        start, stop, columns_ptr, weights_ptr, z_ptr, z_classes_ptr, width,
        slots, messages, outside_classes, outside_sums, outside_overflow,
    )  # fmt: skip
    tl.store(part_ptr + segment[:, None] * n_slots + c, messages, mask)
    h = segment[:, None] * BLOCK_OUTSIDE + tl.arange(0, BLOCK_OUTSIDE)[None, :]
    tl.store(part_classes_ptr + h, outside_classes, inside[:, None])
    tl.store(part_sums_ptr + h, outside_sums, inside[:, None])
    tl.store(part_overflow_ptr + segment, outside_overflow, inside)


def segment_messages(
    segments: Segments,
    columns: torch.Tensor,
    weights: torch.Tensor,
    z: torch.Tensor,
    z_classes: torch.Tensor,
    scores: torch.Tensor,
    classes: torch.Tensor,
    unused: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Messages through each segment to the slots of its row, `classes` (N, C) with scores > unused.

    Returns
    -------
    tuple of Tensor (S, C) float32, (S, H) int32, (S, H) float32, (S,) float32
        Sums at the slots; other classes and their sums; the overflow.
    """
    size, n_slots = len(segments), scores.shape[1]
    parts = (
        scores.new_empty(size, n_slots),
        classes.new_empty(size, OUTSIDE_CLASSES),
        scores.new_empty(size, OUTSIDE_CLASSES),
        scores.new_empty(size),
    )
    if size:
        launch = Launch.of(n_slots)
        segment_kernel[(triton.cdiv(size, launch.rows),)](
            segments.rows, segments.first, segments.last, columns, weights,
            z, z_classes, z.shape[1], scores, classes, n_slots, unused, *parts, size,
            BLOCK_ROWS=launch.rows, BLOCK_SLOTS=launch.slots, BLOCK_OUTSIDE=OUTSIDE_CLASSES,
            num_warps=launch.warps,
        )  # fmt: skip
    return parts
