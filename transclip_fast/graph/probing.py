"""
Search list by list: every row is compared with the lists whose centres are nearest to it.

All rows that probe a list are multiplied with it at once, a dense product, and each product counts
for both its rows. Probes are added in rounds until the neighbours are good enough, and no round
repeats what an earlier one did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from transclip_fast.callbacks import Checkpoint, Count, State
from transclip_fast.data.feature_rows import Rows
from transclip_fast.graph.best import BestLists
from transclip_fast.graph.compare import Pair, byte_products, compare
from transclip_fast.graph.exact import all_pairs
from transclip_fast.parallel import parallel_map

if TYPE_CHECKING:
    from transclip_fast.graph.byte_products import ByteProducts

RANKED = 16  # centres that are ranked for each row at first
CELLS = 1 << 22  # of a block of products


class ListSearch:
    """
    The search of `rows` in lists, where it stands.

    Parameters
    ----------
    rows : Rows
    best : BestLists
        Receives what is found.
    train : callable
        Gives the centres (L, d) of the lists; each row is in the list of its nearest one.
    checkpoint : Checkpoint
        Its state, if it has one, is where the search goes on.

    Attributes
    ----------
    probes : int
        Lists with which each row has been compared.
    n_lists : int
        L.
    """

    def __init__(
        self,
        rows: Rows,
        best: BestLists,
        train: Callable[[], torch.Tensor],
        checkpoint: Checkpoint,
    ) -> None:
        self.rows, self.best, self.checkpoint = rows, best, checkpoint
        self.probes = self._rounds = self._blocks = 0
        self._in_bytes: ByteProducts | None = None
        state = checkpoint.load()
        if state is None:
            self._centres = train()
            self._ranked = _rank(rows, self._centres, RANKED)
        else:
            best.restore(state)
            self._centres = torch.from_numpy(state["centres"]).to(rows.device)
            self._ranked = torch.from_numpy(state["ranked"]).to(rows.device)
            self.probes, self._rounds, self._blocks = state["place"].tolist()

    @property
    def n_lists(self) -> int:
        return len(self._centres)

    def run(self, enough: Callable[[], bool], progress: Count) -> None:
        """Add probes until `enough()` of what `best` then holds, or until all lists are probed."""
        done = False
        while not done:
            self._round(progress)
            done = self.probes == self.n_lists or enough()

    def _round(self, progress: Count) -> None:
        """Compare the rows with the lists next in their ranking."""
        n_rows, start = len(self.rows), self._blocks
        probes = next(n for n in _schedule() if n > self.probes)
        probes = min(probes, self.n_lists)
        pairs = self._pairs(self.probes, probes)
        self._in_bytes = self._in_bytes or byte_products(self.rows, pairs)
        for done in compare(self.rows, pairs[start:], self.best, self._in_bytes):
            self._blocks = start + done
            share = n_rows * self._blocks // len(pairs)
            progress(self._rounds * n_rows + share, (self._rounds + 1) * n_rows)
            self.checkpoint.keep(self._state)
        self.probes, self._rounds, self._blocks = probes, self._rounds + 1, 0

    def _pairs(self, first: int, last: int) -> list[Pair]:
        """Blocks of the rows and the lists that they rank `first` to `last`."""
        if last > self._ranked.shape[1]:
            self._ranked = _rank(self.rows, self._centres, 4 * self._ranked.shape[1])
        lists = _grouped(self._ranked[:, 0], self.n_lists)
        if last == 1:
            return [pair for members in lists for pair in all_pairs(members)]
        askers = _grouped(self._ranked[:, first:last].flatten(), self.n_lists)
        return [
            (some, members)
            for members, asking in zip(lists, askers, strict=True)
            if len(members)
            for some in torch.split(asking // (last - first), max(1, CELLS // len(members)))
        ]

    def _state(self) -> State:
        return {
            "place": np.array([self.probes, self._rounds, self._blocks]),
            "centres": self._centres.cpu().numpy(),
            "ranked": self._ranked.cpu().numpy(),
            **self.best.state(),
        }


def _schedule() -> Iterator[int]:
    """Probes after each round."""
    yield 1  # a row's own list alone: what is found there rules out most of the others
    probes = 5
    while True:
        yield probes
        probes += probes // 4


def _rank(rows: Rows, centres: torch.Tensor, size: int) -> torch.Tensor:
    """The nearest centres (N, size) int32 of each row, best first."""
    size = min(size, len(centres))

    def nearest(block: slice) -> torch.Tensor:
        return (rows[block] @ centres.T).topk(size, 1).indices.int()

    return torch.cat(parallel_map(nearest, rows.blocks(), rows.device))


def _grouped(numbers: torch.Tensor, n_groups: int) -> Sequence[torch.Tensor]:
    """For each number below `n_groups` the positions (int64) that hold it."""
    counts = torch.bincount(numbers, minlength=n_groups)
    return torch.split(numbers.argsort(stable=True), counts.tolist())
