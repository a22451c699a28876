"""Neighbour lists, and the ways in which a fit is given them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from transclip_fast.data.checks import as_array
from transclip_fast.data.feature_rows import Rows
from transclip_fast.errors import InputError


@dataclass(frozen=True, eq=False)
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
        How the lists were made: at least `search` and `recall`.

    Examples
    --------
    >>> import numpy as np
    >>> from transclip_fast import NeighborGraph
    >>> similarities = np.array([[0.9], [0.9], [0.8]], np.float32)
    >>> graph = NeighborGraph(np.array([[1], [0], [1]]), similarities)
    >>> len(graph), graph.n_neighbors
    (3, 1)
    """

    neighbors: np.ndarray
    similarities: np.ndarray
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("neighbors", "similarities"):  # that may be tensors
            object.__setattr__(self, name, as_array(getattr(self, name), name))

    def __len__(self) -> int:
        return len(self.neighbors)

    @property
    def n_neighbors(self) -> int:
        return int(self.neighbors.shape[1])

    def part(self, rows: slice) -> NeighborGraph:
        """The lists of consecutive rows, which name rows as before."""
        return NeighborGraph(self.neighbors[rows], self.similarities[rows], self.info)

    def sha256(self) -> str:
        """Hash of the lists."""
        digest = hashlib.sha256(np.ascontiguousarray(self.neighbors).data)
        digest.update(np.ascontiguousarray(self.similarities).data)
        return digest.hexdigest()

    def check(
        self, n_rows: int, n_neighbors: int, own: slice | None = None, name: str = "graph"
    ) -> NeighborGraph:
        """
        Check that the graph fits `n_rows` rows; returns it with the `n_neighbors` best only.

        With `own`, the lists of these rows only are checked and returned.

        Raises
        ------
        InputError
            Other number of rows, shorter lists, ids that are no row, or lists that are to be cut
            and are not best first.
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
        if self.neighbors.dtype.kind not in "iu":
            raise InputError(f"{name}: neighbors must be integers, got {self.neighbors.dtype}")
        own = own or slice(0, n_rows)
        # Arrays of these types, as `build_graph` makes them, are not copied.
        neighbors = np.asarray(self.neighbors[own, :n_neighbors], np.int64)
        with np.errstate(over="ignore"):  # infinity is no similarity: see below
            similarities = np.asarray(self.similarities[own, :n_neighbors], np.float32)
        wrong = (neighbors < -1) | (neighbors >= n_rows)
        wrong |= neighbors == np.arange(own.start, own.stop)[:, None]
        wrong |= ~np.isfinite(similarities)
        if wrong.any():
            row = own.start + int(wrong.any(1).argmax())
            raise InputError(f"{name}: row {row} has an impossible neighbour; build it again")
        if n_neighbors < self.n_neighbors:
            rises = np.diff(self.similarities[own], axis=1) > 0
            rising = (rises & (self.neighbors[own, 1:] >= 0)).any(1)
            if rising.any():
                row = own.start + int(rising.argmax())
                raise InputError(
                    f"{name}: {n_neighbors} of {self.n_neighbors} neighbours are used, and those "
                    f"of row {row} are not best first; sort them"
                )
        return NeighborGraph(neighbors, similarities, self.info)


GraphSource = NeighborGraph | Callable[[Rows], NeighborGraph] | None
