"""
Ranks, processes that share the rows of a graph or a solve: who owns which rows, and all they send.

Rows are cut into parts whose number and length depend on N alone, and each rank owns consecutive
parts. Sums over rows are those of the parts, added along one binary tree, so they have the same
bits for any number of ranks. The neighbours of its rows that a rank does not own are its halo, of H
rows, and G is how often its own rows are in halos. With P ranks, a rank sends, in bytes:

    start    the 8 most confident rows of each class: 96 K (P - 1)
             the features of those that it owns, and of a sample, n rows: 4 d n (P - 1)
             edges to rows of others ("symmetric"), E of them: 20 E
             how many of both, numbers and places of the halo: 16 (P - 1) + 8 H + 8 G
    sweep    z of the rows in halos of others: 4 K G if dense; sparse, 4 G and, of lists that are
             not those of the last sweep, 4 for each entry in use, and 4 more for its class if
             these differ, too, and 8 (P - 1); nothing where z is that of the last fetch, as after
             the energies
    energies the same of the new z, and sums of 2 numbers
    step     class sums and masses, 8 K (d + 1): see below
    end      outlier scores, once in float32, twice in float64: 20 G; `solve` also both labels and
             the outlier score of its n rows to all: 20 n (P - 1)

Where two solves decide on a class cost, start to step are sent twice, and of S rows the neighbours,
their labels and those of the neighbours: 8 (2 k + 1) S (P - 1) for each solve.

To search the graph, of k neighbours a row, a rank with n of the N rows sends, in bytes:

    exact    nothing
    faiss    the nearest of S rows whose recall is measured: 12 S (k + 5) (P - 1), and what was
             found for s of them: 8 s (k + 4) (P - 1)
             the nearest of L centres to m rows of the sample of k-means: 16 m (P - 1); and the
             centres, from rank 0: 4 d L (P - 1)
             how many rows each list has, and how many search it: 16 L (P - 1)
             places of these rows: 8 to each other rank that has blocks of products of the list
             how many they are, and of the next line, in each of R rounds: 8 (R + 2) (P - 1)
             what a block finds for a row of another rank: 8 + 12 (k + 4)
    end      where every rank wants all lists (`build_graph`, not `fit` and the commands):
             12 k n (P - 1)

A sum of s bytes goes up the tree, s for each of a rank's subtrees that joins one of another rank,
and from rank 0 back to all, s (P - 1). A few more sums of one number are taken at the start, after
every step and at the end, and z of the sample. Few-shot and known labels add class sums, and the
nearest rows of each shot, 16 k (P - 1), at the start. `Exchange.sent` counts all of it but
small JSON messages (`transclip_fast.ranks`). Tensors of a GPU travel through its host's memory.

Beside its rows, and what any process takes, a rank holds z of its halo, twice, 8 R H or 4 K H each;
what the start merges, 96 K P; the sums of at most 7 parts, 8 K d each; and while lists travel, what
is sent and what comes, packed. In a search it holds candidates of its rows, 12 (k + 4) each; with
faiss also the sample of k-means, 40 L rows in float32, about N / P rows, those of its lists, the
places of the rows that search these, 8 each, the least product that each of the N rows still takes,
4 N, and what a round finds for others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed

from transclip_fast.data.feature_rows import Tensors, UnitRows
from transclip_fast.ranks import Ranks, lost_rank_as_input_error

# Rows of a part: whole blocks of every product, so that a small problem is cut where its blocks
# end; and enough that adding sums (K, d) is little work beside the products of these rows.
UNIT_ROWS = 512
FEWEST_PARTS, MOST_PARTS = 16, 64
ENOUGH_ROWS = 1 << 14


@dataclass(frozen=True)
class Partition:
    """
    The parts of N rows, and the ranks that own them.

    Parameters
    ----------
    n_rows : int
        N.
    ranks : Ranks
    """

    n_rows: int
    ranks: Ranks

    @property
    def part_rows(self) -> int:
        """Rows of every part but the last."""
        rows = min(-(-self.n_rows // FEWEST_PARTS), ENOUGH_ROWS)
        rows = max(rows, -(-self.n_rows // MOST_PARTS))
        return -(-rows // UNIT_ROWS) * UNIT_ROWS

    @property
    def n_parts(self) -> int:
        return -(-self.n_rows // self.part_rows)

    def first_part(self, rank: int) -> int:
        """The first part of a rank; rank 0 owns part 0."""
        return -(-rank * self.n_parts // self.ranks.size)

    def owner(self, part: int) -> int:
        """The rank that owns a part."""
        return part * self.ranks.size // self.n_parts

    def first_row(self, rank: int) -> int:
        """The first row of a rank; of the rank after the last, N."""
        return min(self.first_part(rank) * self.part_rows, self.n_rows)

    @property
    def most_rows(self) -> int:
        """The most rows of a rank: the first has them."""
        return self.first_row(1)

    @property
    def rows(self) -> slice:
        """The rows of this rank."""
        rank = self.ranks.rank
        return slice(self.first_row(rank), self.first_row(rank + 1))

    @property
    def parts(self) -> list[slice]:
        """This rank's parts, as slices of its own rows."""
        rows, size = self.rows, self.part_rows
        starts = range(0, rows.stop - rows.start, size)
        return [slice(first, min(first + size, rows.stop - rows.start)) for first in starts]


@dataclass(frozen=True)
class Halo:
    """
    The rows of other ranks that are neighbours of this one's.

    Parameters
    ----------
    ids : Tensor (H,) int64
        Their numbers, ascending.
    places : Tensor (H,) int64
        Where z has each of them, after own rows.
    counts : list of int
        How many of them each rank owns.
    wanted : Tensor (G,) int64
        Own rows in halos of others, those of the first rank first.
    wanted_counts : list of int
        How many are in the halo of each rank.
    """

    ids: torch.Tensor
    places: torch.Tensor
    counts: list[int]
    wanted: torch.Tensor
    wanted_counts: list[int]


class Exchange:
    """
    All that ranks send each other.

    Attributes
    ----------
    sent : int
        Bytes that this rank has sent.
    device : torch.device
        Of its tensors.
    """

    def __init__(self, partition: Partition) -> None:
        self.partition, self.ranks = partition, partition.ranks
        self.sent, self.device = 0, torch.device("cpu")
        none = torch.empty(0, dtype=torch.int64)
        self.halo = Halo(none, none, [0] * self.ranks.size, none, [0] * self.ranks.size)
        firsts = [partition.first_row(rank) for rank in range(1, self.ranks.size)]
        self._firsts = torch.tensor(firsts, dtype=torch.int64)

    def total(self, leaf: Callable[[slice], Tensors], shapes: Sequence[Sequence[int]]) -> Tensors:
        """
        The sum over all rows of what `leaf` returns for those of a part, float64, on every rank.

        `leaf` takes a slice of own rows and returns tensors of these `shapes`.
        """
        found = self._tree(leaf, 0, self.partition.n_parts)
        if found is None:
            options: dict[str, Any] = {"dtype": torch.float64, "device": self.device}
            found = tuple(torch.empty(tuple(shape), **options) for shape in shapes)
        return tuple(self._broadcast(tensor, 0) for tensor in found)

    def _tree(self, leaf: Callable[[slice], Tensors], low: int, high: int) -> Tensors | None:
        """The sum of the parts from `low` to `high`, on the rank that owns the first; else None."""
        partition, rank = self.partition, self.ranks.rank
        first = partition.first_part(rank)
        if high <= first or low >= partition.first_part(rank + 1):
            return None
        if high - low == 1:
            return leaf(partition.parts[low - first])
        middle = (low + high) // 2
        left, right = self._tree(leaf, low, middle), self._tree(leaf, middle, high)
        taker, giver = partition.owner(low), partition.owner(middle)
        if rank == giver != taker and right is not None:
            for tensor in right:
                self._send(tensor, taker)
        if rank != taker or left is None:
            return None
        for i, tensor in enumerate(left):
            tensor += self._receive(tensor, giver) if right is None else right[i]
        return left

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, of one shape."""
        parts = [values if r == self.ranks.rank else torch.empty_like(values) for r in self._all]
        return [self._broadcast(part, rank) for rank, part in enumerate(parts)]

    def of_first(self, values: torch.Tensor) -> torch.Tensor:
        """The first rank's values, where every rank has some of one shape."""
        return self._broadcast(values, 0)

    def sum(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum of the counts (n,) of all ranks."""
        return torch.stack(self.gather(counts)).sum(0)

    def swap(self, parts: Sequence[Sequence[torch.Tensor]]) -> Sequence[torch.Tensor]:
        """Send each rank its part, tensors that are joined; returns what each sends this one."""
        counts = [sum(map(len, part)) for part in parts]
        coming = self._counts_from_all(counts)
        joined = torch.cat([tensor for part in parts for tensor in part])
        return torch.split(self._all_to_all(joined, counts, coming), coming)

    def pick(
        self, table: UnitRows, ids: torch.Tensor, nodes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Of the tables of all ranks, each of its own rows, those of the rows `ids` (n,).

        `nodes` (n,) are the places of own rows in the table.
        """
        device, ids = ids.device, ids.cpu()
        owners = self._owners(ids)
        places = (ids[owners == self.ranks.rank] - self.partition.rows.start).to(device)
        own = table[places if nodes is None else nodes[places]]
        found = self._rows_of_all(own, self._counts(owners))
        return found[owners.argsort(stable=True).argsort().to(device)]

    def join(self, values: torch.Tensor) -> torch.Tensor:
        """The values (N, ...) of all rows, of which each rank has those of its own."""
        firsts = [self.partition.first_row(rank) for rank in range(self.ranks.size + 1)]
        return self._rows_of_all(values, [last - first for first, last in pairwise(firsts)])

    def edges(
        self, targets: torch.Tensor, sources: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the edges (E,) of all ranks those whose target this one owns, in order of sources."""
        owners = self._owners(targets.cpu())
        order, counts = owners.argsort(stable=True), self._counts(owners)
        coming = self._counts_from_all(counts)
        order = order.to(targets.device)
        targets, sources, weights = (
            self._all_to_all(x[order], counts, coming) for x in (targets, sources, weights)
        )
        return targets, sources, weights

    def set_halo(self, ids: torch.Tensor, nodes: torch.Tensor | None = None) -> torch.Tensor:
        """
        Make the rows `ids` of others the halo; returns where z has all of `ids`.

        Own rows come first there, then those of others, each owner's in the order in which it has
        them: `nodes` (n,) are the places of own rows.
        """
        rows = self.partition.rows
        own = (ids >= rows.start) & (ids < rows.stop)
        others = torch.unique(ids[~own])
        counts = self._counts(self._owners(others.cpu()))
        coming = self._counts_from_all(counts)
        wanted = self._all_to_all(others, counts, coming) - rows.start
        # In its own order a rank reads its lists one after the other, and like ones stay close.
        kept = torch.split(wanted if nodes is None else nodes[wanted], coming)
        orders = [part.argsort() for part in kept]
        found = torch.split(wanted, coming)
        wanted = torch.cat([part[order] for part, order in zip(found, orders, strict=True)])
        places = self._all_to_all(torch.cat([x.argsort() for x in orders]), coming, counts)
        lengths = torch.tensor(counts, device=places.device)
        places += torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        self.halo = Halo(others, places, counts, wanted, coming)
        return self.places(ids)

    def places(self, ids: torch.Tensor) -> torch.Tensor:
        """Where z has rows, own ones or of the halo; -1 for -1."""
        rows, halo = self.partition.rows, self.halo
        own = (ids >= rows.start) & (ids < rows.stop)
        found, others = torch.where(own, ids - rows.start, -1), ~own & (ids >= 0)
        places = halo.places[torch.searchsorted(halo.ids, ids[others].to(halo.ids.device))]
        found[others] = places.to(ids.device) + rows.stop - rows.start
        return found

    def fetch(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of the halo, from their owners; `rows` are the own ones that others want."""
        return self._all_to_all(rows, self.halo.wanted_counts, self.halo.counts)

    def extend(self, values: torch.Tensor) -> torch.Tensor:
        """Numbers (n,) of own rows, then those of the halo."""
        return torch.cat([values, self.fetch(values[self.halo.wanted.to(values.device)])])

    def digest(self, leaf: Callable[[slice], str]) -> str:
        """Hash of the hashes of all parts, of which `leaf` makes one of own rows."""
        own = [leaf(part) for part in self.partition.parts]
        hashes = [found for part in self.ranks.all_gather(own) for found in part]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    @property
    def _all(self) -> range:
        return range(self.ranks.size)

    def _rows_of_all(self, own: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """The rows (n, ...) of all ranks, the first rank's first: `counts` has how many of each."""
        rank, shape = self.ranks.rank, own.shape[1:]
        parts = (own if r == rank else own.new_empty(counts[r], *shape) for r in self._all)
        return torch.cat([self._broadcast(part, r) for r, part in enumerate(parts)])

    def _owners(self, ids: torch.Tensor) -> torch.Tensor:
        """The rank that owns each row."""
        return torch.bucketize(ids, self._firsts, right=True)

    def _counts(self, owners: torch.Tensor) -> list[int]:
        counts: list[int] = torch.bincount(owners, minlength=self.ranks.size).tolist()
        return counts

    def _counts_from_all(self, counts: list[int]) -> list[int]:
        """How many each rank sends to this one, where this one sends `counts` to each."""
        even = [1] * self.ranks.size
        coming: list[int] = self._all_to_all(torch.tensor(counts), even, even).tolist()
        return coming

    def _send(self, tensor: torch.Tensor, rank: int) -> None:
        self._count(tensor)
        with lost_rank_as_input_error():
            torch.distributed.send(tensor.cpu(), rank)

    def _receive(self, like: torch.Tensor, rank: int) -> torch.Tensor:
        received = torch.empty_like(like, device="cpu")
        with lost_rank_as_input_error():
            torch.distributed.recv(received, rank)
        return received.to(like.device)

    def _broadcast(self, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        """A rank's tensor on every rank, in the memory of this one's."""
        if self.ranks.size == 1:
            return tensor
        if rank == self.ranks.rank:
            self._count(tensor, self.ranks.size - 1)
        on_host = tensor.cpu().contiguous()
        with lost_rank_as_input_error():
            torch.distributed.broadcast(on_host, rank)
        return on_host.to(tensor.device)

    def _all_to_all(
        self, values: torch.Tensor, counts: list[int], coming: list[int]
    ) -> torch.Tensor:
        """Send each rank its `counts` rows of values; returns the rows that come from each."""
        if self.ranks.size == 1:
            return values
        outgoing = len(values) - counts[self.ranks.rank]
        self._count(values[:outgoing])
        received = values.new_empty(sum(coming), *values.shape[1:], device="cpu")
        with lost_rank_as_input_error():
            torch.distributed.all_to_all_single(received, values.cpu().contiguous(), coming, counts)
        return received.to(values.device)

    def _count(self, tensor: torch.Tensor, times: int = 1) -> None:
        self.sent += tensor.numel() * tensor.element_size() * times
