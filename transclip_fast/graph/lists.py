"""Neighbour lists: for each row, the rows most similar to it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from transclip_fast.errors import InputError


@dataclass(frozen=True)
class NeighborGraph:
    """
    Directed k-nearest-neighbour lists, best first.

    Parameters
    ----------
    neighbors : ndarray (N, k) int64
        Row ids, -1 where there is none.
    similarities : ndarray (N, k) float32
        Inner products with the neighbours.
    info : mapping
        How the lists were made: at least `method` and `recall`.
    """

    neighbors: np.ndarray
    similarities: np.ndarray
    info: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.neighbors)

    @property
    def n_neighbors(self) -> int:
        return int(self.neighbors.shape[1])

    def sha256(self) -> str:
        """Hash of the lists."""
        digest = hashlib.sha256(self.neighbors.tobytes())
        digest.update(self.similarities.tobytes())
        return digest.hexdigest()

    def check(self, n_rows: int, n_neighbors: int, name: str = "graph") -> NeighborGraph:
        """
        The graph cut to its `n_neighbors` best, once it is known to fit `n_rows` rows.

        Raises
        ------
        InputError
            Other number of rows, shorter lists, or ids that are no row.
        """
        if self.neighbors.shape != self.similarities.shape or self.neighbors.ndim != 2:
            raise InputError(f"{name}: neighbors and similarities differ in shape")
        if len(self) != n_rows:
            raise InputError(f"{name}: has {len(self)} rows, the features have {n_rows}")
        if self.n_neighbors < n_neighbors:
            raise InputError(
                f"{name}: lists have {self.n_neighbors} neighbours, {n_neighbors} are needed; "
                "build the graph again or lower n_neighbors"
            )
        if self.neighbors.dtype.kind != "i":
            raise InputError(f"{name}: neighbors must be integers, got {self.neighbors.dtype}")
        neighbors = self.neighbors[:, :n_neighbors]
        similarities = self.similarities[:, :n_neighbors]
        wrong = (neighbors < -1) | (neighbors >= n_rows)
        wrong |= neighbors == np.arange(n_rows)[:, None]
        wrong |= ~np.isfinite(similarities)
        if wrong.any():
            row = int(wrong.any(1).argmax())
            raise InputError(f"{name}: row {row} has an impossible neighbour; build it again")
        return NeighborGraph(neighbors, similarities, self.info)
