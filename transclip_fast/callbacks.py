"""Checkpoint and progress interfaces for long-running work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

SavedState = Mapping[str, np.ndarray]
Count = Callable[[int, int], None]  # (done, total)


class Checkpoint(Protocol):
    """Where a state is saved; `transclip_fast.store.checkpoint` has one on disk."""

    def load(self) -> SavedState | None:
        """The last saved state of this very work, or None."""

    def keep(self, state: Callable[[], SavedState]) -> None:
        """Save a state, unless the last one was saved a moment ago."""


class NoCheckpoint:
    """Saves nothing."""

    def load(self) -> SavedState | None:
        return None

    def keep(self, state: Callable[[], SavedState]) -> None:
        pass


@dataclass(frozen=True)
class Step:
    """
    A completed outer step.

    Its number, the objective per query, how many labels it changed, and the labels (n,) of this
    process's rows, a tensor.
    """

    number: int
    objective: float
    changed: int
    labels: Any


@dataclass(frozen=True)
class Progress:
    """
    The progress of a fit.

    Parameters
    ----------
    rows, all_rows : int
        Rows of features read so far and in all, over all passes; `tol` may end a fit earlier.
    steps, all_steps : int
        Outer steps taken and in all, over all values of gamma that are tried. Both grow where
        `class_cost` solves a second time.
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


class FitProgress:
    """
    Counts the rows and steps of a fit, from any thread, and reports both.

    Parameters
    ----------
    n_rows : int
        N.
    passes : int
        Passes over the rows before the first step; every step takes two more, and so does the end.
        Reads beyond those, as of a class cost, do not count.
    steps, runs : int
        Outer steps of a run, and runs: the values of gamma that are tried.
    report : callable
        Receives a `Progress`.
    """

    def __init__(
        self, n_rows: int, passes: int, steps: int, runs: int, report: Callable[[Progress], None]
    ) -> None:
        self._n_rows, self._first, self._steps = n_rows, passes, steps
        self._passes = passes + 2 * (steps + 1)  # of a run
        self._state = Progress(0, runs * self._passes * n_rows, 0, runs * steps)
        self._limit, self._report, self._lock = 0, report, threading.Lock()

    def rows(self, number: int) -> None:
        """Count rows that were read."""
        with self._lock:
            # A pass may read a row twice: the count stops at the end of the step.
            rows = min(self._state.rows + number, self._limit)
            self._state = replace(self._state, rows=rows)
            self._report(self._state)

    def run(self, number: int) -> Callable[[Step], None]:
        """
        Start run `number`; returns the function to call after each of its steps.

        It may be one more than was known of.
        """
        before = number * self._passes + self._first
        with self._lock:
            self._limit = (before + 2) * self._n_rows
            self._state = replace(
                self._state,
                all_rows=max(self._state.all_rows, (number + 1) * self._passes * self._n_rows),
                all_steps=max(self._state.all_steps, (number + 1) * self._steps),
            )

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
                self._report(self._state)

        return step
