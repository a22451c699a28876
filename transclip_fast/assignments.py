"""
The (N, K) arrays of the solver, z and its scores, whole or cut to each row's largest entries.

The full form keeps every class of every row, in class order; its `classes` is None. The short form
keeps lists: row i holds class `classes[i, c]` with `values[i, c]`, the entries in use first. Only
`ops` relies on the form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from scipy import sparse

    from transclip_fast.truncation import Truncation


@dataclass(frozen=True)
class Scores:
    """
    Base scores b, up to a constant per row.

    Parameters
    ----------
    values : Tensor (N, K) or (N, C) float32
        b; in the short form b less the row's log-sum-exp over all K classes, -inf where unused.
    classes : Tensor (N, C) int32, optional
        Candidates.
    n_classes : int
        K.
    tail : Tensor (N,) float32
        Mass of softmax(b) outside the candidates.
    least : Tensor (N,) float32
        Short form: a class is a candidate if its entry of `values` is at least this.
    """

    values: torch.Tensor
    classes: torch.Tensor | None
    n_classes: int
    tail: torch.Tensor
    least: torch.Tensor

    @classmethod
    def empty(cls, reach: torch.Tensor, n_classes: int, truncation: Truncation | None) -> Scores:
        """
        Room for the scores of N rows.

        Parameters
        ----------
        reach : Tensor (N,) float32
            The most nats by which messages can move a class of a row against another.
        """
        floor = torch.tensor(0.0 if truncation is None else truncation.floor, dtype=reach.dtype)
        least, tail = floor.log().to(reach.device) - reach, torch.zeros_like(reach)
        if truncation is None:
            return cls(reach.new_empty(len(reach), n_classes), None, n_classes, tail, least)
        shape = len(reach), truncation.candidates
        classes = torch.zeros(shape, dtype=torch.int32, device=reach.device)
        values = torch.full_like(classes, -torch.inf, dtype=reach.dtype)
        return cls(values, classes, n_classes, tail, least)


@dataclass(frozen=True)
class Assignments:
    """
    Soft assignments z (N, K); rows sum to 1, in the short form to 1 less what was dropped.

    Parameters
    ----------
    values : Tensor (N, K) or (N, R) float32
        0 where unused.
    classes : Tensor (N, R) int32, optional
    n_classes : int
        K.
    bound : Tensor (N,) float32
        The mass that the last sweep may have misplaced because messages reached classes that are
        no candidates.
    floor : float
        Short form: entries below it are dropped, except a row's largest.
    """

    values: torch.Tensor
    classes: torch.Tensor | None
    n_classes: int
    bound: torch.Tensor
    floor: float = 0.0

    @classmethod
    def empty(
        cls, n_rows: int, n_classes: int, truncation: Truncation | None, device: torch.device
    ) -> Assignments:
        """Room for the assignments of N rows."""
        bound = torch.zeros(n_rows, dtype=torch.float32, device=device)
        if truncation is None:
            return cls(bound.new_zeros(n_rows, n_classes), None, n_classes, bound)
        values = bound.new_zeros(n_rows, truncation.rank)
        classes = torch.zeros_like(values, dtype=torch.int32)
        return cls(values, classes, n_classes, bound, truncation.floor)

    def __len__(self) -> int:
        return len(self.values)

    def best(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Most likely class of each row (N,) int64, the lowest of equal ones, and its z (N,)."""
        largest = self.values.max(1)
        if self.classes is None:
            return largest.indices, largest.values
        others = torch.where(self.values == largest.values[:, None], self.classes, self.n_classes)
        return others.amin(1).long(), largest.values

    def empty_like(self) -> Assignments:
        """Room for another z of the same form."""
        classes = None if self.classes is None else torch.zeros_like(self.classes)
        values, bound = torch.zeros_like(self.values), torch.zeros_like(self.bound)
        return replace(self, values=values, classes=classes, bound=bound)

    def take(self, rows: torch.Tensor | slice) -> Assignments:
        """The rows given by index (n,) int64, in that order."""
        classes = None if self.classes is None else self.classes[rows]
        return replace(self, values=self.values[rows], classes=classes, bound=self.bound[rows])

    def at(self, rows: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """z of pairs of a row and a class, (E,)."""
        if self.classes is None:
            return self.values[rows, classes]
        return torch.where(self.classes[rows] == classes[:, None], self.values[rows], 0).sum(1)

    def dense(self, classes: slice = slice(None)) -> torch.Tensor:
        """z of consecutive classes, of all if not told, as an (N, n) float32 tensor."""
        if self.classes is None:
            return self.values[:, classes]
        start, stop, _ = classes.indices(self.n_classes)
        places = self.classes.long() - start
        inside = (places >= 0) & (places < stop - start)
        whole = self.values.new_zeros(len(self), stop - start)
        return whole.scatter_add_(1, places.where(inside, 0), self.values.where(inside, 0))

    def state(self) -> dict[str, np.ndarray]:
        """What `restore` needs; in the short form the entries in use, as they come first."""
        if self.classes is None:
            return {"z": self.values.cpu().numpy()}
        used = self.values > 0
        return {
            "z": self.values[used].cpu().numpy(),
            "classes": self.classes[used].cpu().numpy(),
            "lengths": used.sum(1, dtype=torch.int32).cpu().numpy(),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over an earlier `state`, in place."""
        z = torch.from_numpy(state["z"]).to(self.values.device)
        if self.classes is None:
            self.values.copy_(z)
            return
        lengths = torch.from_numpy(state["lengths"]).to(z.device)
        used = torch.arange(self.values.shape[1], device=z.device) < lengths[:, None]
        self.values.zero_()[used] = z
        self.classes[used] = torch.from_numpy(state["classes"]).to(z.device)

    def numpy(self) -> np.ndarray | sparse.csr_array:
        """z (N, K) as an array, in the short form as scipy's CSR."""
        if self.classes is None:
            return self.values.cpu().numpy()
        from scipy import sparse  # a GPU machine with numpy and torch alone never comes here

        values, classes = self.values.cpu().numpy(), self.classes.cpu().numpy()
        used = values > 0
        offsets = np.concatenate([[0], used.sum(1).cumsum()])
        shape = len(self), self.n_classes
        table = sparse.csr_array((values[used], classes[used], offsets), shape)
        table.sort_indices()
        return table
