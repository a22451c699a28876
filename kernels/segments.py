"""
Hubs cut into segments, so that no row keeps its block of rows waiting.

A row of more than SEGMENT_NEIGHBORS neighbours is a hub. Segments of at most so many are summed by
themselves, and their sums MERGED_SEGMENTS at a time, until at most that many are left. A hub of n
neighbours takes some 64 + 8 log_8(n / 64) steps one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from transclip_fast.types import Affinity

SEGMENT_NEIGHBORS = 64  # of a segment, at most
MERGED_SEGMENTS = 8  # whose sums are added at a time, at most


@dataclass(frozen=True)
class Segments:
    """
    One level of segments; all are numbered from level to level, these from `base` on.

    `rows`, `first`, `last` (S,) int64 are each segment's row and its part of the entries; beyond
    the first level, of the segments of the level before.
    """

    base: int
    rows: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor


@dataclass(frozen=True)
class SegmentedAffinity:
    """
    An affinity of N rows, its hubs cut into levels of segments.

    `bounds` (N, 2) int32 are the first and last segment that each row adds up itself, of which a
    row that is no hub has none.
    """

    affinity: Affinity
    bounds: torch.Tensor
    levels: list[Segments]

    @classmethod
    def of(cls, affinity: Affinity) -> SegmentedAffinity:
        """Cut the hubs into segments, whose numbers are read back from the device."""
        ends = torch.stack([affinity.offsets[:-1], affinity.offsets[1:]])  # (2, N)
        hubs = ends.diff(dim=0)[0] > SEGMENT_NEIGHBORS
        levels: list[Segments] = []
        base, size = 0, SEGMENT_NEIGHBORS
        while True:
            degrees = ends.diff(dim=0)[0].where(hubs, 0)
            counts = torch.where(degrees > size, (degrees + size - 1) // size, 0)
            rows = torch.repeat_interleave(counts)
            if not len(rows):
                break
            stop = base + counts.cumsum(0)
            start = stop - counts
            first = ends[0, rows] + size * (torch.arange(len(rows), device=rows.device) + base)
            first -= size * start[rows]
            levels.append(Segments(base, rows, first, torch.minimum(first + size, ends[1, rows])))
            ends = torch.stack([start, stop]).where(counts > 0, ends)
            base, size = base + len(rows), MERGED_SEGMENTS
        return cls(affinity, ends.where(hubs, 0).T.contiguous().int(), levels)

    @property
    def n_segments(self) -> int:
        return sum(len(level.rows) for level in self.levels)

    @property
    def arrays(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Offsets, columns and weights of the affinity."""
        return self.affinity.offsets, self.affinity.columns, self.affinity.weights
