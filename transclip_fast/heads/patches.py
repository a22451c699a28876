"""Image features with those of their patches behind them: rows (n, 1 + L, d)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from transclip_fast.errors import InputError
from transclip_fast.heads.base import unit


class PatchedRows:
    """
    Unit rows (N, 1 + L, d) float32 in slices: each image, and behind it its L patches.

    Patches are made unit rows as they are read, so that they may stay on disk.

    Parameters
    ----------
    rows : Tensor (N, d) float32
        Unit rows.
    patches : array (N, L, d), or (N, L d)
        Of any float type; sliced, never modified.
    name : str
        For messages.

    Raises
    ------
    InputError
        Another shape; when sliced, a patch that is zero or not finite.
    """

    def __init__(self, rows: torch.Tensor, patches: Any, name: str) -> None:
        n_rows, d = rows.shape
        shape = tuple(getattr(patches, "shape", np.shape(patches)))
        flat = len(shape) == 2 and shape[1] % d == 0
        if not (flat or shape[2:] == (d,)) or shape[0] != n_rows or 0 in shape:
            raise InputError(
                f"{name}: expected ({n_rows}, L, {d}), the patches of {n_rows} rows, got {shape}"
            )
        self._rows, self._patches, self._name = rows, patches, name
        self.number = shape[1] // d if flat else shape[1]  # L

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, block: slice) -> torch.Tensor:
        rows = self._rows[block]
        part = self._patches[block]
        read = part if isinstance(part, torch.Tensor) else torch.from_numpy(np.asarray(part))
        patches = read.float().reshape(len(rows), self.number, rows.shape[1])
        sizes = patches.norm(dim=2).amin(1)
        wrong = ((sizes == 0) | ~patches.isfinite().all(2).all(1)).nonzero()
        if len(wrong):
            row = (block.start or 0) + int(wrong[0])
            raise InputError(f"{self._name}: row {row} has a patch that is zero or not finite")
        return torch.cat([rows[:, None], unit(patches)], 1)


def images(rows: torch.Tensor) -> torch.Tensor:
    """Rows (n, d), without their patches where they have any."""
    return rows[:, 0] if rows.ndim == 3 else rows
