"""
The operations on rows that several processes share: any backend's on each one's own rows, with the
messages of `ops.exchange` in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from transclip_fast.data.checks import unread_matrix
from transclip_fast.data.feature_rows import Rows, Tensors, UnitRows
from transclip_fast.ops.exchange import Exchange
from transclip_fast.ops.torch_backend import START_ROWS, TorchOps, top_rows
from transclip_fast.parallel import parallel_map
from transclip_fast.types import Affinity, Assignments, LinearScore, Messages, Scores


class RankedRows(Rows):
    """
    Features (N, d) of which each process holds its own rows; `rows[ids]` are those of any.

    A process that asks for rows waits until all ask for the same ones.
    """

    def __init__(
        self,
        features: Any,
        name: str,
        device: torch.device,
        exchange: Exchange,
        *,
        held: bool | None = None,
    ) -> None:
        matrix, own = unread_matrix(features, name), exchange.partition.rows
        read = own if own.start < own.stop else slice(0, 1)
        part = matrix[read] if isinstance(matrix, torch.Tensor) else matrix.part(read)
        rows = Rows(part, name, device, held=held, first=read.start)
        vars(self).update(vars(rows))
        self.exchange = exchange
        exchange.device = self.device
        self._rows = rows.part(slice(0, own.stop - own.start))
        self.shape = (len(matrix), rows.shape[1])

    def __getitem__(self, ids: torch.Tensor | slice) -> torch.Tensor:
        if isinstance(ids, slice):
            raise TypeError("a slice of rows is that of one process: take its own part")
        return self.exchange.pick(self._rows, ids)

    def digest(self, leaf: Callable[[slice], str]) -> str:
        return self.exchange.digest(leaf)

    def local(self) -> Rows:
        self._rows.on_read = self.on_read
        return self._rows

    @property
    def own(self) -> slice:
        return self.exchange.partition.rows

    def total(self, leaf: Callable[[slice], Tensors], shapes: Sequence[Sequence[int]]) -> Tensors:
        return self.exchange.total(leaf, shapes)

    def largest(self, values: torch.Tensor) -> float:
        most = values.amax() if len(values) else values.new_tensor(-torch.inf)
        return float(torch.stack(self.exchange.gather(most)).max())

    def pick(
        self, table: UnitRows, ids: torch.Tensor, nodes: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.exchange.pick(table, ids, nodes)


def neighbor_places(
    features: Rows, neighbors: np.ndarray
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Places (n, k) of neighbours among own rows and the halo; and what appends the latter."""
    if not isinstance(features, RankedRows):
        return neighbors, lambda values: values
    exchange = features.exchange
    places = exchange.places(torch.from_numpy(np.require(neighbors, requirements="W"))).numpy()
    return places, lambda values: exchange.extend(torch.from_numpy(values)).numpy()


class RankedBackend:
    """A backend on `RankedRows`: what state needs before there is a graph, and its operations."""

    def __init__(self, local: type[TorchOps], exchange: Exchange) -> None:
        self._local, self._exchange = local, exchange

    def __call__(self, affinity: Affinity, nodes: torch.Tensor | None = None) -> RankedOps:
        return RankedOps(self._local(affinity, nodes), self._exchange, nodes)

    def start(
        self,
        features: RankedRows,
        weights: torch.Tensor | None,
        log_prior: torch.Tensor | None,
        *,
        out: Assignments,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `TorchOps.start`; normalisers (n,) are of own rows."""
        rows, partition = features.local(), self._exchange.partition
        n_classes, device = out.n_classes, features.device
        normaliser = out.values.new_empty(len(out))
        # Empty places of a rank with fewer rows have no row.
        values = [torch.full((START_ROWS, n_classes), -torch.inf, device=device)]
        places = [torch.full((START_ROWS, n_classes), -1, dtype=torch.int64, device=device)]
        for part in partition.parts:
            prior = None if log_prior is None else log_prior[part]
            found = self._local.start(rows.part(part), weights, prior, out=out.take(part))
            normaliser[part] = found[0]
            values.append(found[1])
            places.append(found[2] + part.start + partition.rows.start)
        own = _first_rows(*(torch.cat([*found[1:], found[0]]) for found in (values, places)))
        merged = _first_rows(*(torch.cat(self._exchange.gather(found)) for found in own))
        n_rows = min(START_ROWS, len(features))
        return normaliser, merged[0][:n_rows], merged[1][:n_rows]

    def power_sums(self, features: RankedRows) -> torch.Tensor:
        """As `TorchOps.power_sums`, of the rows of all."""
        rows = features.local()

        def leaf(part: slice) -> Tensors:
            return (self._local.power_sums(rows.part(part)),)

        return features.total(leaf, [(2, features.shape[1])])[0]


class RankedOps:
    """
    The operations of a backend `local` that a solve calls, on the rows of this process.

    The columns of the affinity are those and, after them, the halo.
    """

    def __init__(
        self, local: TorchOps, exchange: Exchange, nodes: torch.Tensor | None = None
    ) -> None:
        self._local, self.exchange, self._nodes = local, exchange, nodes
        self._fetched: Assignments | None = None  # z whose halo is that of its rows
        wanted, partition = exchange.halo.wanted, exchange.partition
        self._wanted = wanted if nodes is None else nodes[wanted]
        self._parts = {
            part.start: local.of_rows(part, partition.n_parts) for part in partition.parts
        }

    def room(self, z: Assignments) -> Assignments:
        self._fetched = None  # frees it, too
        return z.with_room(len(self.exchange.halo.ids))

    def with_halo(self, z: Assignments) -> Assignments:
        n_halo, n_own = len(self.exchange.halo.ids), len(z)
        whole = z.extended(n_halo)
        if z is self._fetched or self.exchange.ranks.size == 1:
            return whole
        if z.classes is None:
            whole.values[n_own:] = self.exchange.fetch(z.values[self._wanted])
        else:
            self._fetch_lists(z, whole.take(slice(n_own, None)))
        self._fetched = z
        return whole

    def _fetch_lists(self, z: Assignments, halo: Assignments) -> None:
        """Set the halo's lists of z, of which ranks send what has changed since the last time."""
        before, counts = self._fetched, self.exchange.halo.counts
        wanted = torch.split(self._wanted, self.exchange.halo.wanted_counts)
        found = self.exchange.swap([self._local.pack(z, rows, before) for rows in wanted])
        if before is not None:
            before = before.extended(len(halo)).take(slice(len(z), None))

        def unpack(part: tuple[torch.Tensor, slice]) -> None:
            packed, rows = part
            last = None if before is None else before.take(rows)
            self._local.unpack(packed, halo.take(rows), last)

        ranks = (slice(*ends) for ends in pairwise(accumulate(counts, initial=0)))
        parallel_map(unpack, zip(found, ranks, strict=True), z.values.device)

    def best(self, z: Assignments) -> tuple[torch.Tensor, torch.Tensor]:
        return self._local.best(z)

    def neighbor_means(
        self, z: Assignments, neighbors: torch.Tensor, classes: torch.Tensor | None
    ) -> torch.Tensor:
        return self._local.neighbor_means(z, neighbors, classes)

    def score(self, features: UnitRows, score: LinearScore, *, out: Scores) -> Scores:
        rows = _local(features)
        for part in self.exchange.partition.parts:
            own = out.take(self._entries(part))
            self._parts[part.start].score(rows.part(part), score.take(part), out=own)
        return out

    def sweep(
        self, base: Scores, z: Assignments, *, out: Assignments, bounded: bool = True
    ) -> Assignments:
        whole = self.with_halo(z)
        if out is self._fetched:
            self._fetched = None
        if len(out):
            self._local.sweep(base, whole, out=out, bounded=bounded)
        return out

    def class_sums(self, z: Assignments, features: UnitRows) -> tuple[torch.Tensor, torch.Tensor]:
        rows, (n_classes, dim) = _local(features), (z.n_classes, features.shape[1])

        def leaf(part: slice) -> Tensors:
            own = z.take(self._entries(part))
            return self._parts[part.start].class_sums(own, rows.part(part))

        sums, counts = self.exchange.total(leaf, [(n_classes, dim), (n_classes,)])
        return sums, counts

    def energies(self, z: Assignments) -> tuple[torch.Tensor, torch.Tensor]:
        whole = self.with_halo(z)
        terms = z.values.new_empty(0, 2, dtype=torch.float64)
        if len(z):
            terms = self._local.row_energies(whole)
        if self._nodes is not None:
            terms = terms[self._nodes]
        ((pairwise, entropy),) = self.exchange.total(lambda part: (terms[part].sum(0),), [(2,)])
        return pairwise, entropy

    def expectation(self, z: Assignments, log_prior: torch.Tensor) -> torch.Tensor:
        def leaf(part: slice) -> Tensors:
            own = z.take(self._entries(part))
            return (self._parts[part.start].expectation(own, log_prior[part]),)

        return self.exchange.total(leaf, [()])[0]

    def received(self, z: Assignments, messages: Messages) -> torch.Tensor:
        def leaf(part: slice) -> Tensors:
            own = z.take(self._entries(part))
            return (self._parts[part.start].received(own, messages.take(part)),)

        return self.exchange.total(leaf, [()])[0]

    def _entries(self, part: slice) -> slice:
        """Entries of z that the operations of a part index: its own, or with nodes all."""
        return part if self._nodes is None else slice(None)


Operations = TorchOps | RankedOps  # of a solve


def _local(features: UnitRows) -> Rows:
    """The rows of this process."""
    if not isinstance(features, RankedRows):
        raise TypeError("these operations are on rows that ranks share")
    return features.local()


def _first_rows(values: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 8 largest entries of each column of values (n, K), and their rows; -1 come last."""
    # Of equal ones the first count: rows ascend, after those that are none were moved to the end.
    order = (rows < 0).int().argsort(dim=0, stable=True)
    values, rows = values.gather(0, order), rows.gather(0, order)
    top = top_rows(values)
    return values.gather(0, top), rows.gather(0, top)
