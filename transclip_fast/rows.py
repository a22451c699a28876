"""Unit rows in float32, from memory or from a file larger than memory."""

from __future__ import annotations

import numpy as np
import torch

from transclip_fast.inputs import as_matrix, as_unit_rows, unit_divisors

BLOCK_BYTES = 1 << 22  # of float32 rows read at a time


class Rows:
    """
    Features (N, d): `rows[ids]`, or a slice, is a float32 tensor of unit rows on the device.

    A `numpy.memmap` stays in its file, in its own type; anything else is held in memory.

    Parameters
    ----------
    features : array_like (N, d)

    Raises
    ------
    InputError
        As `transclip_fast.inputs.as_unit_rows`.
    """

    def __init__(
        self, features: object, name: str = "features", device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self._divisors: torch.Tensor | None = None
        if isinstance(features, np.memmap):
            self._matrix = as_matrix(features, name)
            self._divisors = unit_divisors(self._matrix, name)
        else:
            self._matrix = as_unit_rows(features, name).to(self.device)
        self.shape = self._matrix.shape

    def __len__(self) -> int:
        return len(self._matrix)

    def __getitem__(self, ids: torch.Tensor | slice) -> torch.Tensor:
        if isinstance(ids, torch.Tensor):
            ids = ids.to(self._matrix.device)
        rows = self._matrix[ids].to(self.device, torch.float32)
        if self._divisors is not None:
            rows = (rows.double() / self._divisors[ids].to(self.device)[..., None]).float()
        return rows

    def blocks(self) -> list[slice]:
        """Slices that cover all rows, each small beside memory."""
        step = max(64, BLOCK_BYTES // (4 * self.shape[1]))
        return [slice(start, start + step) for start in range(0, len(self), step)]
