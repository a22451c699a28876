"""What long work keeps so that it can go on after it was killed, and what it tells meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

State = Mapping[str, np.ndarray]
Count = Callable[[int, int], None]  # (done, in all)


class Checkpoint(Protocol):
    """Where a state is kept: `transclip_fast.store.checkpoint` has one on disk."""

    def load(self) -> State | None:
        """The state last kept of this very work, if there is one."""

    def keep(self, state: Callable[[], State]) -> None:
        """Keep a state, if the last one is old enough to be worth the time."""


class NoCheckpoint:
    """Keeps nothing."""

    def load(self) -> State | None:
        return None

    def keep(self, state: Callable[[], State]) -> None:
        pass
