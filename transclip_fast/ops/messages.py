"""Constant messages: what each query hears about some classes, whatever z is."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Messages:
    """
    A sparse (N, K) array in rows of entries; no row names a class twice.

    `offsets` (N + 1,) int64 bounds each row's part of `classes` (E,) int64 and `weights` (E,)
    float32.
    """

    offsets: torch.Tensor
    classes: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(
        cls, rows: torch.Tensor, classes: torch.Tensor, weights: torch.Tensor, n_rows: int
    ) -> Messages:
        """Entries sorted by row."""
        lengths = torch.bincount(rows, minlength=n_rows)
        offsets = torch.zeros(n_rows + 1, dtype=torch.int64, device=rows.device)
        torch.cumsum(lengths, 0, out=offsets[1:])
        return cls(offsets, classes, weights)

    def rows(self) -> torch.Tensor:
        """Row of each entry, (E,) int64."""
        return torch.repeat_interleave(self.offsets.diff())

    def add_to(self, block: torch.Tensor, rows: slice) -> None:
        """Add the messages to `rows` to their base scores, a block (n, K), in place."""
        offsets = self.offsets[rows.start : rows.stop + 1]
        entries = slice(int(offsets[0]), int(offsets[-1]))
        local = torch.repeat_interleave(offsets.diff())
        block[local, self.classes[entries]] += self.weights[entries]
