"""Image features together with those of their patches: rows (n, 1 + L, d)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from transclip_fast.data.checks import UNIT_NORM_TOLERANCE, check_unmasked
from transclip_fast.errors import InputError


class PatchedRows:
    """
    Unit rows (N, 1 + L, d) float32 by slice or index: each image, then its L patches.

    Patches are normalised when they are indexed, so that they may stay on disk.

    Parameters
    ----------
    rows : Tensor (N, d) float32
        Unit rows.
    patches : array (N, L, d), or (N, L d)
        Of any float type; indexed, never modified.
    name : str
        Name of the patches in error messages.
    ids : ndarray (N,), optional
        Position in `patches` of each row; by default its own.

    Raises
    ------
    InputError
        Another shape; when read, a patch that is zero or not finite.
    """

    def __init__(
        self, rows: torch.Tensor, patches: Any, name: str, ids: np.ndarray | None = None
    ) -> None:
        d, shape = rows.shape[1], tuple(getattr(patches, "shape", np.shape(patches)))
        flat = len(shape) == 2 and shape[1] % d == 0
        n_rows = len(rows) if ids is None else shape[0]
        if not (flat or shape[2:] == (d,)) or shape[0] != n_rows or 0 in shape:
            raise InputError(
                f"{name}: expected ({n_rows}, L, {d}), the patches of {n_rows} rows, got {shape}"
            )
        check_unmasked(patches, name)
        self.number = shape[1] // d if flat else shape[1]  # L
        self._rows, self._patches, self._name, self._ids = rows, patches, name, ids

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, which: slice | torch.Tensor) -> torch.Tensor:
        rows = self._rows[which]
        places = self._places(which)
        part = self._patches[places]
        read = part if isinstance(part, torch.Tensor) else torch.from_numpy(np.asarray(part))
        patches = read.to(rows.device).float().reshape(len(rows), self.number, rows.shape[1])
        norms = patches.norm(dim=2, keepdim=True)
        wrong = ((norms == 0) | ~norms.isfinite()).flatten(1).any(1)
        if wrong.any():
            row = np.arange(len(self._patches))[places][wrong.cpu().numpy()][0]
            raise InputError(f"{self._name}: row {row} has a patch that is zero or not finite")
        near = (norms - 1).abs() <= UNIT_NORM_TOLERANCE  # used as they are, like images
        return torch.cat([rows[:, None], patches / norms.where(~near, 1)], 1)

    def take(self, which: np.ndarray) -> PatchedRows:
        """Some of the rows by index (n,), read when they are indexed."""
        places = np.arange(len(self))[which] if self._ids is None else self._ids[which]
        return PatchedRows(self._rows[which], self._patches, self._name, places)

    def _places(self, which: slice | torch.Tensor) -> slice | np.ndarray:
        index = which if isinstance(which, slice) else which.numpy()
        return index if self._ids is None else self._ids[index]


def images(rows: torch.Tensor) -> torch.Tensor:
    """Rows (n, d) without their patches, if they have any."""
    return rows[:, 0] if rows.ndim == 3 else rows
