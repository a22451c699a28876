"""
Plain data that travels between graph, solver and operations.

The (N, K) arrays, z and its scores, are dense, or sparse: cut to each row's largest entries. Dense
ones keep every class of every row, in class order; their `classes` is None. Sparse ones are lists:
row i has class `classes[i, c]` with `values[i, c]`, and entries in use come first. Only `ops`
depends on the form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from scipy import sparse

# Entries of z below this are dropped; the solver accounts for their total mass.
FLOOR = 1e-4
FLOAT32_ROUNDING = 2.0**-24  # half of float32's eps
LARGEST_MESSAGE = 64.0  # nats: e^64 moves all of a row's mass
MASS_UNITS = 2**30  # of a row: 2^33 rows can be counted
BLOCK_ROWS = 1 << 14  # of lists that are counted or cut at a time


def row_offsets(rows: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Where the entries of each row begin and end, (N + 1,) int64, of those in `rows` (E,)."""
    offsets = torch.zeros(n_rows + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(torch.bincount(rows, minlength=n_rows), 0, out=offsets[1:])
    return offsets


def _entries_of(offsets: torch.Tensor, rows: slice) -> tuple[torch.Tensor, slice]:
    """The offsets of consecutive rows, from 0 on, and the place of their entries among all."""
    offsets = offsets[rows.start : rows.stop + 1]
    return offsets - offsets[0], slice(int(offsets[0]), int(offsets[-1]))


@dataclass(frozen=True, eq=False)
class Affinity:
    """
    A (N, N) in rows of entries; two entries of a row may name the same column.

    `offsets` (N + 1,) int64 bounds each row's part of `columns` (E,) int64 and `weights` (E,)
    float32.
    """

    offsets: torch.Tensor
    columns: torch.Tensor
    weights: torch.Tensor

    def take(self, rows: slice) -> Affinity:
        """The consecutive rows `rows`; entries are views of these."""
        offsets, entries = _entries_of(self.offsets, rows)
        return Affinity(offsets, self.columns[entries], self.weights[entries])

    def max_message(self) -> torch.Tensor:
        """sum_j |A_ij| (N,) float32, a bound on messages to row i, as z_j is a distribution."""
        lengths = self.offsets.diff()
        return torch.segment_reduce(
            self.weights.abs(), "sum", lengths=lengths, initial=0.0, unsafe=True
        )


@dataclass(frozen=True, eq=False)
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
        return cls(row_offsets(rows, n_rows), classes, weights)

    def take(self, rows: slice) -> Messages:
        """The consecutive rows `rows`; entries are views of these."""
        offsets, entries = _entries_of(self.offsets, rows)
        return Messages(offsets, self.classes[entries], self.weights[entries])

    def rows(self) -> torch.Tensor:
        """Row of each entry, (E,) int64."""
        return torch.repeat_interleave(self.offsets.diff())

    def add_to(self, block: torch.Tensor, rows: slice) -> None:
        """Add the messages to `rows` to their base scores, a block (n, K), in place."""
        own = self.take(rows)
        block[own.rows(), own.classes] += own.weights


@dataclass(frozen=True, eq=False)
class LinearScore:
    """
    The base score that every backend computes: b = F P^T + c + prior_weight log y_hat + messages.

    Parameters
    ----------
    weights : Tensor (K, d) float32
        P.
    offset : Tensor (K,) float32
        c.
    log_prior : Tensor (N, K) float32, optional
        log y_hat of a prior that is not linear in the features; -inf excludes a class.
    prior_weight : float
        Of `log_prior`.
    messages : Messages, optional
        Of the support, by rows of the features.
    """

    weights: torch.Tensor
    offset: torch.Tensor
    log_prior: torch.Tensor | None = None
    prior_weight: float = 1.0
    messages: Messages | None = None

    def take(self, rows: slice) -> LinearScore:
        """The score of consecutive rows `rows`."""
        log_prior = None if self.log_prior is None else self.log_prior[rows]
        messages = None if self.messages is None else self.messages.take(rows)
        return replace(self, log_prior=log_prior, messages=messages)


@dataclass(frozen=True)
class Truncation:
    """
    Limits on the entries of a sparse row.

    Parameters
    ----------
    candidates : int
        C, classes of the base score at most.
    rank : int
        R, classes of z at most, no more than C.
    floor : float
        z below it is dropped, and so are candidates that no message can lift to it. The largest
        entry of a row always stays.
    """

    candidates: int
    rank: int
    floor: float = FLOOR


@dataclass(frozen=True, eq=False)
class Scores:
    """
    Base scores b, up to a constant per row.

    Parameters
    ----------
    values : Tensor (N, K) or (N, C) float32
        b; if sparse, b less the row's log-sum-exp over all K classes, -inf where unused.
    classes : Tensor (N, C) int32, optional
        Candidates.
    n_classes : int
        K.
    tail : Tensor (N,) float32
        Mass of softmax(b) outside the candidates.
    log_threshold : Tensor (N,) float32
        Sparse: a class is a candidate if its entry of `values` is at least this.
    """

    values: torch.Tensor
    classes: torch.Tensor | None
    n_classes: int
    tail: torch.Tensor
    log_threshold: torch.Tensor

    @classmethod
    def empty(
        cls, max_message: torch.Tensor, n_classes: int, truncation: Truncation | None
    ) -> Scores:
        """
        Room for the scores of N rows.

        Parameters
        ----------
        max_message : Tensor (N,) float32
            The most nats by which messages can move a class of a row against another.
        """
        n_rows, dtype = len(max_message), max_message.dtype
        floor = torch.tensor(0.0 if truncation is None else truncation.floor, dtype=dtype)
        threshold = floor.log().to(max_message.device) - max_message
        tail = torch.zeros_like(max_message)
        values = max_message.new_empty(n_rows, n_classes if truncation is None else 0)
        scores = cls(values, None, n_classes, tail, threshold)
        return scores if truncation is None else scores.lists(n_classes, truncation.candidates)

    def lists(self, n_classes: int, candidates: int) -> Scores:
        """Room for lists of the same rows, among `n_classes` classes."""
        shape = len(self.values), candidates
        classes = torch.zeros(shape, dtype=torch.int32, device=self.values.device)
        values = torch.full_like(classes, -torch.inf, dtype=self.values.dtype)
        return replace(self, values=values, classes=classes, n_classes=n_classes)

    def take(self, rows: slice) -> Scores:
        """The consecutive rows `rows`, as views of these."""
        return replace(
            self,
            values=self.values[rows],
            classes=None if self.classes is None else self.classes[rows],
            tail=self.tail[rows],
            log_threshold=self.log_threshold[rows],
        )

    def set_log(self, z: Assignments) -> None:
        """Scores of which `z`, of these rows, is the softmax."""
        if self.classes is None or z.classes is None:
            torch.log(z.values, out=self.values)
            return
        width = z.values.shape[1]
        torch.log(z.values, out=self.values[:, :width])
        self.classes[:, :width] = z.classes
        self.values[:, width:] = -torch.inf
        torch.clamp(1 - z.values.sum(1), min=0, out=self.tail)


@dataclass(frozen=True, eq=False)
class Assignments:
    """
    Soft assignments z (N, K); rows sum to 1, sparse ones to 1 less the dropped mass.

    Parameters
    ----------
    values : Tensor (N, K) or (N, R) float32
        0 where unused.
    classes : Tensor (N, R) int32, optional
    n_classes : int
        K.
    bound : Tensor (N,) float32
        The mass that the last sweep with a bound may have misplaced because messages reached
        classes that are no candidates.
    floor : float
        Sparse: entries below it are dropped, except a row's largest.
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

    def exponentiate(self) -> None:
        """Lists of log z become z, in place; -inf is an unused entry, and becomes 0."""
        for start in range(0, len(self), BLOCK_ROWS):
            values = self.values[start : start + BLOCK_ROWS]
            used = values > -torch.inf
            # No entry in use may underflow: a list ends at its first 0.
            values.exp_().clamp_(min=torch.finfo(values.dtype).tiny).mul_(used)

    def counts(self) -> torch.Tensor:
        """The mass of each class, (K,) float64; of sparse z the same bits for any split of rows."""
        total = torch.zeros(self.n_classes, dtype=torch.float64, device=self.values.device)
        units = total.long()
        for start in range(0, len(self), BLOCK_ROWS):
            z = self.take(slice(start, start + BLOCK_ROWS))
            if z.classes is None:
                total += z.values.sum(0, dtype=torch.float64)
            else:  # sums of integers do not depend on their order, which a GPU leaves open
                mass = (z.values * MASS_UNITS).long()
                units.scatter_add_(0, z.classes.long().flatten(), mass.flatten())
        return total if self.classes is None else units.double() / MASS_UNITS

    def best(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Most likely class of each row (N,) int64, the lowest of equal ones, and its z (N,)."""
        largest = self.values.max(1)
        if self.classes is None:
            return largest.indices, largest.values
        tied = torch.where(self.values == largest.values[:, None], self.classes, self.n_classes)
        return tied.amin(1).long(), largest.values

    def empty_like(self) -> Assignments:
        """Room for another z of the same form."""
        classes = None if self.classes is None else torch.zeros_like(self.classes)
        values, bound = torch.zeros_like(self.values), torch.zeros_like(self.bound)
        return replace(self, values=values, classes=classes, bound=bound)

    def take(self, rows: torch.Tensor | slice) -> Assignments:
        """The rows `rows` (n,) int64, in that order."""
        classes = None if self.classes is None else self.classes[rows]
        return replace(self, values=self.values[rows], classes=classes, bound=self.bound[rows])

    def with_room(self, n_rows: int) -> Assignments:
        """A copy in memory that has room for `n_rows` rows more, for `extended`."""

        def copied(rows: torch.Tensor) -> torch.Tensor:
            room = rows.new_zeros(len(rows) + n_rows, *rows.shape[1:])[: len(rows)]
            return room.copy_(rows)

        classes = None if self.classes is None else copied(self.classes)
        return replace(self, values=copied(self.values), classes=classes)

    def extended(self, n_rows: int) -> Assignments:
        """These rows, and the `n_rows` more for which their memory has room; without a bound."""

        def longer(rows: torch.Tensor) -> torch.Tensor:
            return rows.as_strided((len(rows) + n_rows, *rows.shape[1:]), rows.stride())

        classes = None if self.classes is None else longer(self.classes)
        return replace(self, values=longer(self.values), classes=classes)

    def of_classes(self, classes: torch.Tensor, rank: int) -> Assignments:
        """Lists of the `rank` largest entries, of the `classes` (K',) with mass, numbered anew."""
        if self.classes is None:
            raise TypeError("only lists leave classes out")
        number = torch.zeros(self.n_classes, dtype=torch.int32, device=classes.device)
        number[classes] = torch.arange(len(classes), dtype=torch.int32, device=classes.device)
        values = self.values.new_empty(len(self), rank)
        kept = torch.empty_like(values, dtype=torch.int32)
        for start in range(0, len(self), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            values[rows], places = self.values[rows].topk(rank, dim=1)
            kept[rows] = number[self.classes[rows].gather(1, places).long()]
        return replace(self, values=values, classes=kept, n_classes=len(classes))

    def take_into(self, rows: torch.Tensor, out: Assignments) -> Assignments:
        """As `take` of all rows in another order, in the memory of `out`."""
        torch.index_select(self.values, 0, rows, out=out.values)
        torch.index_select(self.bound, 0, rows, out=out.bound)
        if self.classes is not None and out.classes is not None:
            torch.index_select(self.classes, 0, rows, out=out.classes)
        return out

    def at(self, rows: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """z of pairs of a row and a class, (E,)."""
        if self.classes is None:
            return self.values[rows, classes]
        return torch.where(self.classes[rows] == classes[:, None], self.values[rows], 0).sum(1)

    def dense(self, classes: slice = slice(None)) -> torch.Tensor:
        """z of consecutive classes, of all by default, as an (N, n) float32 tensor."""
        if self.classes is None:
            return self.values[:, classes]
        start, stop, _ = classes.indices(self.n_classes)
        places = self.classes.long() - start
        inside = (places >= 0) & (places < stop - start)
        whole = self.values.new_zeros(len(self), stop - start)
        return whole.scatter_add_(1, places.where(inside, 0), self.values.where(inside, 0))

    def state(self) -> dict[str, np.ndarray]:
        """Arrays for `restore`; of sparse assignments the entries in use, which come first."""
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
        """z (N, K) as an array, if sparse as scipy's CSR."""
        if self.classes is None:
            return self.values.cpu().numpy()
        from scipy import sparse  # imported here: dense solves run without scipy

        values, classes = self.values.cpu().numpy(), self.classes.cpu().numpy()
        used = values > 0
        offsets = np.concatenate([[0], used.sum(1).cumsum()])
        shape = len(self), self.n_classes
        table = sparse.csr_array((values[used], classes[used], offsets), shape)
        table.sort_indices()
        return table
