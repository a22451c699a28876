"""Times by the GPU's own clock, of one call and of each operation of a solve."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from transclip_fast import solver

SETS = 3  # of inputs that are taken in turns, so that no run finds its own in the cache
Arm = Callable[[int], Any]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def milliseconds(run: Arm, repeats: int = 12) -> float:
    """Median time of a call, by the GPU's clock; `run` is told which set of inputs to take."""
    for i in range(SETS):
        run(i)
    times: list[float] = []
    for i in range(repeats):
        start, stop = (_event() for _ in range(2))
        start.record()
        run(i % SETS)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


class Stopwatch:
    """A backend's operations, and the GPU's time in each."""

    def __init__(self, ops: Any) -> None:
        self._ops, self._events = ops, list[tuple[str, Any, Any]]()

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._ops, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            start, stop = (_event() for _ in range(2))
            start.record()
            result = operation(*arguments, **named)
            stop.record()
            self._events.append((name, start, stop))
            return result

        return operation if name == "session" else timed

    def stages(self) -> dict[str, float]:
        """Milliseconds of each operation."""
        torch.cuda.synchronize()
        total: dict[str, float] = {}
        for name, start, stop in self._events:
            total[name] = total.get(name, 0.0) + start.elapsed_time(stop)
        return total


@contextmanager
def stopwatch(ops: Any) -> Iterator[Stopwatch]:
    """Let the solver's operations be timed."""
    watch, before = Stopwatch(ops), vars(solver)["operations"]
    vars(solver)["operations"] = lambda _: watch
    try:
        yield watch
    finally:
        vars(solver)["operations"] = before
