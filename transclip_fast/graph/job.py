"""A search that one process does, or several do together, each for its own rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from transclip_fast.callbacks import Checkpoint, Count, NoCheckpoint, SavedState
from transclip_fast.graph.candidates import Candidates
from transclip_fast.ops.blocks import blocks
from transclip_fast.ops.exchange import Exchange, Partition
from transclip_fast.parallel import parallel_map
from transclip_fast.ranks import ALONE, Ranks

Item = TypeVar("Item")


@dataclass(frozen=True)
class Job:
    """
    A search, and this process's share of it.

    Every process can read all rows, and finds the candidates of its own; all of them take as many
    rounds, after each of which a checkpoint may be kept.

    Parameters
    ----------
    exchange : Exchange
        With the other processes; its partition has this one's rows.
    progress : callable
        Called with (rows done, rows in all) after every round.
    checkpoint : Checkpoint
    """

    exchange: Exchange
    progress: Count
    checkpoint: Checkpoint

    @classmethod
    def of(
        cls,
        n_rows: int,
        ranks: Ranks = ALONE,
        progress: Count | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Job:
        """A search of so many rows."""
        exchange = Exchange(Partition(n_rows, ranks))
        return cls(exchange, progress or (lambda done, total: None), checkpoint or NoCheckpoint())

    @property
    def own(self) -> slice:
        """The rows whose candidates this process finds."""
        return self.exchange.partition.rows

    @property
    def n_rows(self) -> int:
        return self.exchange.partition.n_rows

    def report(self, done: int, total: int) -> None:
        """Show as progress that so much of the work is done."""
        self.progress(self.n_rows * done // max(1, total), self.n_rows)

    def rounds(self, items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
        """This process's items in rounds: as many as that process needs which has most items."""
        number = max(self.exchange.ranks.all_gather(-(-len(items) // max(1, size))))
        for i in range(number):
            yield items[i * len(items) // number : (i + 1) * len(items) // number]

    def search_panels(
        self,
        search: Callable[[slice, Candidates], None],
        found: Candidates,
        panel_rows: int,
        round_rows: int,
        state: SavedState | None,
    ) -> None:
        """
        Fill the candidates of own rows, `search` those of a panel of rows at a time.

        `state` is that of the checkpoint.
        """
        first = self.own.start
        searched = torch.zeros(len(found.ids), dtype=torch.bool)
        if state is not None and "searched" in state:  # not so if "auto" chose another search
            found.restore(state)
            searched = torch.from_numpy(np.array(state["searched"]))

        def place(panel: slice) -> slice:
            return slice(panel.start - first, panel.stop - first)

        def fill(panel: slice) -> None:
            part = found.part(place(panel))
            part.clear()  # panels of another number of processes may have reached into this one
            search(panel, part)
            searched[place(panel)] = True

        panels = blocks(self.own.stop, panel_rows, first)
        missing = [panel for panel in panels if not searched[place(panel)].all()]
        for batch in self.rounds(missing, round_rows // panel_rows):
            parallel_map(fill, batch, found.ids.device)
            self.report(int(searched.sum()), len(searched))
            self.checkpoint.keep(partial(found.state, searched=searched))
