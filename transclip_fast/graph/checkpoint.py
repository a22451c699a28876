"""What a search tells while it runs, and what it needs to go on after it was killed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

State = Mapping[str, np.ndarray]
Progress = Callable[[int, int], None]


class Checkpoint(Protocol):
    """Where the state of a search is kept: `transclip_fast.store.graphs` has one on disk."""

    def load(self) -> State | None:
        """The state last kept of this very search, if there is one."""

    def keep(self, state: Callable[[], State]) -> None:
        """Keep a state, if the last one is old enough to be worth the time."""


class NoCheckpoint:
    """Keeps nothing."""

    def load(self) -> State | None:
        return None

    def keep(self, state: Callable[[], State]) -> None:
        pass
