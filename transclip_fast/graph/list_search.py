"""
Search of the lists that each row probes, by one process or several.

All rows that probe a list are multiplied with it at once, by torch, in blocks; where the CPU is
faster in int8, in int8, and in float32 the pairs that may be candidates. Blocks do not depend on
the number of processes, and candidates not on the order of blocks: the bits are the same for any
number. A process computes consecutive blocks, of about as many products as another's. It has an
index of the lists of these, reads the rows that probe them, and sends candidates to the process
whose rows these are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from transclip_fast.callbacks import SavedState
from transclip_fast.data.feature_rows import Rows
from transclip_fast.graph.candidates import Candidates
from transclip_fast.graph.faiss_index import load_faiss, read_list
from transclip_fast.graph.job import Job
from transclip_fast.graph.products import int8_products
from transclip_fast.ops.exchange import Exchange
from transclip_fast.parallel import parallel_map
from transclip_fast.ranks import Ranks

BLOCK_PRODUCTS = 1 << 20  # of rows with members of a list that they probe, 4 MB in float32
FEWEST_QUERIES, MOST_QUERIES = 256, 4096  # of a block: a list may be one row, or all
BATCH_BLOCKS = 64  # between two merges
# Of a block, rows on which int8 products are tried, and the share of these products that may be
# multiplied again: of a list of copies all are, which takes several times as long.
TRIED_QUERIES, MOST_AGAIN = 64, 0.25


class Blocks:
    """
    The numbered blocks of products of L lists, and the rank that computes each.

    Parameters
    ----------
    sizes, probing : ndarray (L,) int64
        Members of each list, and rows that probe it.
    ranks : Ranks

    Attributes
    ----------
    firsts : ndarray (L + 1,) int64
        The first block of each list; of the list after the last, the number of all.
    own : slice
        This rank's blocks.
    n_products : int
        Of all blocks.
    """

    def __init__(self, sizes: np.ndarray, probing: np.ndarray, ranks: Ranks) -> None:
        self._queries = (BLOCK_PRODUCTS // sizes.clip(1)).clip(FEWEST_QUERIES, MOST_QUERIES)
        self._members = (BLOCK_PRODUCTS // self._queries).clip(1)
        self._columns = -(-sizes // self._members)
        self.firsts = _starts(self._columns * -(-probing // self._queries))
        work = _starts(sizes * probing)
        self.n_products = int(work[-1])
        shares = work[-1] / ranks.size * np.arange(ranks.size + 1)
        ends = np.interp(shares, work, self.firsts).astype(np.int64)
        ends[-1] = self.firsts[-1]
        self.own = slice(int(ends[ranks.rank]), int(ends[ranks.rank + 1]))
        # The first and the last rank that has blocks of a list; of one without blocks, any.
        self._first_rank, self._last_rank = (
            (np.searchsorted(ends, blocks, side="right") - 1).astype(np.int32)
            for blocks in (self.firsts[:-1], self.firsts[1:] - 1)
        )

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def block(self, number: int) -> tuple[int, slice, slice]:
        """The list of a block; and which of its members, and of the rows that probe it."""
        which = int(np.searchsorted(self.firsts, number, side="right")) - 1
        row, column = divmod(number - int(self.firsts[which]), int(self._columns[which]))
        width, height = int(self._members[which]), int(self._queries[which])
        members = slice(column * width, (column + 1) * width)
        return which, members, slice(row * height, (row + 1) * height)

    def pairs(self, lists: torch.Tensor, exchange: Exchange) -> np.ndarray:
        """
        The pairs (list, row) of this rank's blocks: list * N + row, ascending.

        Each rank gives the `lists` (n, m) of its own rows.
        """
        partition, numbers = exchange.partition, lists.numpy()
        own = np.arange(partition.rows.start, partition.rows.stop)[:, None]
        keys = (numbers.astype(np.int64) * partition.n_rows + own).ravel()
        if exchange.ranks.size > 1:
            first, last = (x[numbers.ravel()] for x in (self._first_rank, self._last_rank))
            ranks = range(exchange.ranks.size)
            parts = [[torch.from_numpy(keys[(first <= r) & (r <= last)])] for r in ranks]
            keys = torch.cat(list(exchange.swap(parts))).numpy()
        keys.sort()
        return keys


@dataclass(frozen=True)
class ListSearch:
    """
    The search of this process's blocks.

    Parameters
    ----------
    rows : Rows (N, d)
    index : faiss.Index
        With the lists of its blocks at least.
    blocks : Blocks
    centres : Tensor (L, d)
        Of the lists.
    nearest : Tensor (n, P) int32
        The lists that each own row probes.
    job : Job
    unrounded : bool
        Whether all products, also those that are resumed from, are those of float32 rows.
    """

    rows: Rows
    index: Any
    blocks: Blocks
    centres: torch.Tensor
    nearest: torch.Tensor
    job: Job
    unrounded: bool = False

    def fill(self, found: Candidates, state: SavedState) -> None:
        """Find the candidates of own rows; `state` is that of the checkpoint, empty for none."""
        exchange, own = self.job.exchange, self.job.own
        done = np.zeros(len(self.blocks), bool)
        if state:
            found.restore(state)
            done[:] = state["done"]
        # The smallest product that can still enter a row's list.
        min_products = np.full(len(self.rows), -np.inf, np.float32)
        queries = self.blocks.pairs(self.nearest, exchange)
        starts = np.searchsorted(queries, np.arange(len(self.centres) + 1) * len(self.rows))
        queries %= len(self.rows)

        def probing(number: int) -> np.ndarray:
            """The rows (n,) of a block that probe its list."""
            which, _, some = self.blocks.block(number)
            return queries[starts[which] : starts[which + 1]][some]

        def saved() -> SavedState:
            index = {"centres": self.centres.numpy(), "nearest": self.nearest.numpy()}
            return found.state(done=done, unrounded=np.array(self.unrounded), **index)

        dim = self.rows.shape[1]
        int8 = int8_products(self.blocks.n_products, dim, self.rows.device)
        search = partial(self._search, int8, min_products)
        mine = self.blocks.own
        missing = (np.flatnonzero(~done[mine]) + mine.start).tolist()
        for batch in self.job.rounds(missing, BATCH_BLOCKS):
            rows = [torch.from_numpy(probing(number)) for number in batch]
            # Made before the products are: between those, these would keep freed memory in pieces.
            parts = [Candidates.empty(len(ids), found.size) for ids in rows]
            min_products[own] = found.values.numpy()[:, -1].clip(min=min_products[own])
            parallel_map(search, zip(batch, rows, parts, strict=True))
            _merge(rows, parts, found, own.start, exchange)
            # Between the first and the last of a batch nothing is left to do.
            ends = [batch[0], batch[-1] + 1] if batch else [0, 0]
            for first, stop in exchange.ranks.all_gather(ends):
                done[first:stop] = True
            self.job.report(int(done.sum()), len(done))
            self.job.checkpoint.keep(saved)

    def _search(
        self, int8: Any, min_products: np.ndarray, task: tuple[int, torch.Tensor, Candidates]
    ) -> None:
        """
        Fill the candidates of the rows of a block, (number, rows, candidates).

        Products below `min_products` (N,) would not stay with their row; a full list raises it.
        `int8` is the module of int8 products if these are to be used.
        """
        from transclip_fast.ops.numba_candidates import enter_products

        load_faiss().omp_set_num_threads(1)  # of this thread: the pool is the parallelism
        number, rows, found = task
        which, members, _ = self.blocks.block(number)
        others, features = read_list(self.index, which, members)
        queries, ids = self.rows[rows], rows.numpy()
        lowest, centre = min_products[ids], self.centres[which]  # the nearer, the smaller errors
        coded = int8.Int8Rows.of(features, centre) if int8 and len(others) else None
        for some in (slice(0, TRIED_QUERIES), slice(TRIED_QUERIES, len(rows))):
            part = found.part(some)
            if coded is None:
                products = (queries[some] @ features.T).numpy()
                lists = part.values.numpy(), part.ids.numpy()
                enter_products(products, others, ids[some], lowest[some], *lists)
                continue
            block = int8.Int8Rows.of(queries[some], centre)
            again = block.enter(coded, ids[some], others, lowest[some], part)
            if again > MOST_AGAIN * len(block) * len(coded):
                coded = None
        # Where another thread raises it at once, the lower number may remain: nothing is lost.
        min_products[ids] = found.values.numpy()[:, -1].clip(min=min_products[ids])


def _merge(
    rows: list[torch.Tensor],
    parts: list[Candidates],
    found: Candidates,
    first: int,
    exchange: Exchange,
) -> None:
    """Merge candidates of some rows into those of own rows, the `first` of which is number 0."""
    from transclip_fast.ops.numba_candidates import merge

    if exchange.ranks.size > 1:
        rows = [torch.empty(0, dtype=torch.int64), *rows]
        parts = [Candidates.empty(0, found.size), *parts]
        ids, values = (torch.cat([getattr(part, x) for part in parts]) for x in ("ids", "values"))
        numbers, ids, values = exchange.edges(torch.cat(rows), ids, values)
        rows, parts = [numbers], [Candidates(ids, values)]
    into = found.values.numpy(), found.ids.numpy()
    for numbers, part in zip(rows, parts, strict=True):
        merge(part.values.numpy(), part.ids.numpy(), numbers.numpy() - first, *into)


def _starts(counts: np.ndarray) -> np.ndarray:
    """Sums (L + 1,) of the counts (L,) before each."""
    return np.concatenate([[0], np.cumsum(counts)])
