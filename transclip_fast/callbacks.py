"""Checkpoint and progress interfaces for long-running work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Step:
    """An outer step that was taken: its number, the objective per query, labels it changed."""

    number: int
    objective: float
    changed: int


@dataclass(frozen=True)
class Progress:
    """
    How far a fit has come.

    Parameters
    ----------
    rows, all_rows : int
        Rows of features read, and that will be read, over all passes; fewer if `tol` ends it.
    steps, all_steps : int
        Outer steps taken, and in all, over all values of gamma that are tried.
    objective : float, optional
        L per query after the last step.
    changed : int, optional
        Labels that the last step changed.
    """

    rows: int
    all_rows: int
    steps: int
    all_steps: int
    objective: float | None = None
    changed: int | None = None


class Meter:
    """
    Counts the rows and steps of a fit, in any thread, and tells of both.

    Parameters
    ----------
    n_rows : int
    first : int
        Passes over the rows before the first step; each step takes two, and so does the end.
    steps, runs : int
        Of a run, and their number.
    tell : callable
    """

    def __init__(
        self, n_rows: int, first: int, steps: int, runs: int, tell: Callable[[Progress], None]
    ) -> None:
        self._n_rows, self._first, self._steps = n_rows, first, steps
        self._passes = first + 2 * (steps + 1)  # of a run
        self._state = Progress(0, runs * self._passes * n_rows, 0, runs * steps)
        self._limit, self._tell, self._lock = 0, tell, threading.Lock()

    def rows(self, number: int) -> None:
        """Rows were read."""
        with self._lock:
            # Some are read once more: the next step is not there before it is there.
            rows = min(self._state.rows + number, self._limit)
            self._state = replace(self._state, rows=rows)
            self._tell(self._state)

    def run(self, number: int) -> Callable[[Step], None]:
        """A run begins; what to call after each of its steps."""
        before = number * self._passes + self._first
        self._limit = (before + 2) * self._n_rows

        def step(taken: Step) -> None:
            rows = (before + 2 * taken.number) * self._n_rows
            with self._lock:
                self._limit = rows + 2 * self._n_rows
                self._state = replace(
                    self._state,
                    rows=rows,
                    steps=number * self._steps + taken.number,
                    objective=taken.objective,
                    changed=taken.changed,
                )
                self._tell(self._state)

        return step
