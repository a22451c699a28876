"""
What rows hear through the graph: (A z)_i = sum_j A_ij z_j, the part that sweeps and energies share.

A block of rows listens to the first neighbour of each row, then to the second, and so on. A row
with many more neighbours than others would keep its block waiting: such a hub is cut into segments
of at most LIMIT neighbours. The segments are heard first, all in parallel, and the hub's own block
adds them up in their order.

In the short form a row has slots, the classes whose messages it wants (its candidates). What it
hears of other classes is listed by class as it comes, up to ELSEWHERE of them; sizes of messages
of any further class are pooled, so that the largest sum is exact or, beyond that many, an upper
bound.

Layout: rows run over lanes and slots over registers, so that an entry of a neighbour is loaded once
for all slots. Messages are scattered by comparison: Triton has no scatter to registers, and a table
of each entry's slot would be as many bytes as the class it replaces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LIMIT = 64
ELSEWHERE = 16
BLOCK = 1024  # classes at a time in the full form


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
        counts = torch.where(degrees > LIMIT, (degrees + LIMIT - 1) // LIMIT, 0)
        bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        rows = torch.repeat_interleave(counts)
        places = torch.arange(len(rows), device=rows.device) - bounds[rows]
        first = offsets[rows] + LIMIT * places
        return cls(bounds, rows, first, torch.minimum(first + LIMIT, offsets[rows + 1]))

    def __len__(self) -> int:
        return len(self.rows)


@triton.jit
def hear(classes, message, slots, heard, others, elsewhere, pooled):
    """
    Enter one message a row: `classes` (B,), `message` (B,).

    `slots`, `heard` (B, C): classes wanted and their sums; `others`, `elsewhere` (B, H): other
    classes, -1 where free, and their sums; `pooled` (B,).
    """
    wanted = slots == classes[:, None]  # (B, C)
    heard += tl.where(wanted, message[:, None], 0.0)
    listed = others == classes[:, None]  # (B, H)
    missed = (tl.max(wanted.to(tl.int32), 1) + tl.max(listed.to(tl.int32), 1) == 0) & (message != 0)
    taken = tl.sum((others >= 0).to(tl.int32), 1)  # (B,)
    place = tl.arange(0, others.shape[1])[None, :]
    enters = (place == taken[:, None]) & missed[:, None]
    others = tl.where(enters, classes[:, None], others)
    elsewhere += tl.where(listed | enters, message[:, None], 0.0)
    pooled += tl.where(missed & (taken == others.shape[1]), tl.abs(message), 0.0)
    return heard, others, elsewhere, pooled


@triton.jit
def listen(
    first, last, columns, weights, z, z_classes, width, slots, heard, others, elsewhere, pooled
):
    """Hear the entries `first` to `last` (B,) of the affinity, each a list (width,) of z."""
    longest = tl.max((last - first).to(tl.int32), 0)
    for step in range(longest):
        entry = first + step
        own = entry < last
        place = tl.load(columns + entry, own, other=0) * width  # (B,)
        stop = place + width
        weight = tl.load(weights + entry, own, other=0.0)
        value = tl.load(z + place, own, other=0.0)
        while tl.max(value, 0) > 0:  # the rest of all lists is unused
            classes = tl.load(z_classes + place, value > 0, other=-2)
            heard, others, elsewhere, pooled = hear(
                classes, weight * value, slots, heard, others, elsewhere, pooled
            )
            place += 1
            value = tl.load(z + place, own & (place < stop), other=0.0)
    return heard, others, elsewhere, pooled


@triton.jit
def add_segments(
    first, last, part, part_others, part_elsewhere, part_pooled, n_slots,
    slots, heard, others, elsewhere, pooled,
):  # fmt: skip
    """Add the segments `first` to `last` (B,) of each row, in order."""
    longest = tl.max((last - first).to(tl.int32), 0)
    for step in range(longest):
        segment = first + step
        own = segment < last
        c = tl.arange(0, slots.shape[1])[None, :]
        mask = own[:, None] & (c < n_slots)
        heard += tl.load(part + segment[:, None] * n_slots + c, mask, other=0.0)
        pooled += tl.load(part_pooled + segment, own, other=0.0)
        for h in range(others.shape[1]):
            place = segment * others.shape[1] + h
            classes = tl.load(part_others + place, own, other=-1)
            message = tl.load(part_elsewhere + place, own & (classes >= 0), other=0.0)
            classes = tl.where(classes >= 0, classes, -2)
            heard, others, elsewhere, pooled = hear(
                classes, message, slots, heard, others, elsewhere, pooled
            )
    return heard, others, elsewhere, pooled


@triton.jit
def hear_all(
    row, inside, offsets, columns, weights, z, z_classes, width,
    segments, part, part_others, part_elsewhere, part_pooled, n_slots, slots, H: tl.constexpr,
):  # fmt: skip
    """All that rows (B,) hear at their slots (B, C) and elsewhere; a hub from its segments."""
    first = tl.load(offsets + row, inside, other=0)
    last = tl.load(offsets + row + 1, inside, other=0)
    segment = tl.load(segments + row, inside, other=0)
    stop = tl.load(segments + row + 1, inside, other=0)
    last = tl.where(segment == stop, last, first)
    heard, others, elsewhere, pooled = silence(slots, H)
    heard, others, elsewhere, pooled = listen(
        first, last, columns, weights, z, z_classes, width, slots, heard, others, elsewhere, pooled
    )
    return add_segments(
        segment, stop, part, part_others, part_elsewhere, part_pooled, n_slots,
        slots, heard, others, elsewhere, pooled,
    )  # fmt: skip


@triton.jit
def silence(slots, H: tl.constexpr):
    """Nothing heard yet."""
    B: tl.constexpr = slots.shape[0]
    others = tl.full((B, H), -1, tl.int32)
    return (
        tl.zeros((B, slots.shape[1]), tl.float32),
        others,
        tl.zeros((B, H), tl.float32),
        tl.zeros((B,), tl.float32),
    )


@triton.jit
def segment_kernel(
    rows, first, last, columns, weights, z, z_classes, width,
    scores, classes, n_slots, least,
    part, part_others, part_elsewhere, part_pooled, n_segments,
    B: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Segments of hubs, to `part` (S, C), `part_others`, `part_elsewhere` (S, H), `part_pooled`."""
    segment = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = segment < n_segments
    c = tl.arange(0, C)[None, :]
    row = tl.load(rows + segment, inside, other=0)
    mask = inside[:, None] & (c < n_slots)
    place = row[:, None] * n_slots + c
    used = tl.load(scores + place, mask, other=float("-inf")) > least
    slots = tl.where(used, tl.load(classes + place, mask, other=-1), -1)  # (B, C)
    start = tl.load(first + segment, inside, other=0)
    stop = tl.load(last + segment, inside, other=0)
    heard, others, elsewhere, pooled = silence(slots, H)
    heard, others, elsewhere, pooled = listen(
        start, stop, columns, weights, z, z_classes, width, slots, heard, others, elsewhere, pooled
    )
    tl.store(part + segment[:, None] * n_slots + c, heard, mask)
    h = segment[:, None] * H + tl.arange(0, H)[None, :]
    tl.store(part_others + h, others, inside[:, None])
    tl.store(part_elsewhere + h, elsewhere, inside[:, None])
    tl.store(part_pooled + segment, pooled, inside)


@triton.jit
def listen_full(first, last, columns, weights, z, n_classes, k):
    """Sum of the rows of z (N, K) of the entries `first` to `last`, at the classes k (B,)."""
    heard = tl.zeros(k.shape, tl.float32)
    for entry in range(first, last):
        row = tl.load(columns + entry) * n_classes
        heard += tl.load(weights + entry) * tl.load(z + row + k, k < n_classes, other=0.0)
    return heard


@triton.jit
def heard_full(row, offsets, columns, weights, z, segments, part, n_classes, k):
    """(A z) of a row at the classes k (B,): from its segments if it is a hub, else directly."""
    segment, stop = tl.load(segments + row), tl.load(segments + row + 1)
    heard = tl.zeros(k.shape, tl.float32)
    if segment == stop:
        first, last = tl.load(offsets + row), tl.load(offsets + row + 1)
        heard = listen_full(first, last, columns, weights, z, n_classes, k)
    for s in range(segment, stop):
        heard += tl.load(part + s * n_classes + k, k < n_classes, other=0.0)
    return heard


@triton.jit
def segment_full_kernel(
    first, last, columns, weights, z, part, n_classes, B: tl.constexpr
):  # fmt: skip
    """Segments of hubs, to `part` (S, K)."""
    segment = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * B + tl.arange(0, B)
    start, stop = tl.load(first + segment), tl.load(last + segment)
    heard = listen_full(start, stop, columns, weights, z, n_classes, k)
    tl.store(part + segment * n_classes + k, heard, k < n_classes)


@dataclass(frozen=True)
class Launch:
    """Rows of a block, slots rounded up to a power of two, warps."""

    rows: int
    slots: int
    warps: int

    @classmethod
    def of(cls, n_slots: int) -> Launch:
        """
        Two or four slots a thread: a warp shares what it loads, many rows are under way, and
        nothing spills on any of sm_80, sm_90, sm_100, gfx942.
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


def full_launch(n_classes: int) -> tuple[int, int]:
    """Classes of a block of the full form and its warps."""
    size = min(BLOCK, max(32, triton.next_power_of_2(n_classes)))
    return size, max(1, size // 256)


def hear_segments(
    segments: Segments,
    columns: torch.Tensor,
    weights: torch.Tensor,
    z: torch.Tensor,
    z_classes: torch.Tensor,
    scores: torch.Tensor,
    classes: torch.Tensor,
    least: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    What each segment hears at the slots of its row, those of `classes` (N, C) with scores > least.

    Returns
    -------
    tuple of Tensor (S, C) float32, (S, H) int32, (S, H) float32, (S,) float32
        Sums at the slots; other classes and their sums; the size of all else.
    """
    size, n_slots = len(segments), scores.shape[1]
    parts = (
        scores.new_empty(size, n_slots),
        classes.new_empty(size, ELSEWHERE),
        scores.new_empty(size, ELSEWHERE),
        scores.new_empty(size),
    )
    if size:
        launch = Launch.of(n_slots)
        segment_kernel[(triton.cdiv(size, launch.rows),)](
            segments.rows, segments.first, segments.last, columns, weights,
            z, z_classes, z.shape[1], scores, classes, n_slots, least, *parts, size,
            B=launch.rows, C=launch.slots, H=ELSEWHERE, num_warps=launch.warps,
        )  # fmt: skip
    return parts


def hear_segments_full(
    segments: Segments, columns: torch.Tensor, weights: torch.Tensor, z: torch.Tensor
) -> torch.Tensor:
    """What each segment hears in the full form, (S, K) float32."""
    size, n_classes = len(segments), z.shape[1]
    part = z.new_empty(size, n_classes)
    if size:
        block, warps = full_launch(n_classes)
        segment_full_kernel[(size, triton.cdiv(n_classes, block))](
            segments.first, segments.last, columns, weights, z, part, n_classes,
            B=block, num_warps=warps,
        )  # fmt: skip
    return part
