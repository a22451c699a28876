"""Times by the GPU's own clock: of one call, and of each operation of a solve."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

INPUT_SETS = 3  # taken in turns, so that no run finds its inputs in the cache
Arm = Callable[[int], Any]
Result = TypeVar("Result")


class Gpu:
    """The GPU that is measured: its device, clock and memory."""

    device = "cuda"

    def event(self) -> torch.cuda.Event:
        """Return an event of the GPU's own clock."""
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        """Wait until the GPU has done all work."""
        torch.cuda.synchronize()

    def peak(self) -> int:
        """Return the peak of allocated bytes since the last call."""
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return most

    def milliseconds(self, run: Arm, repeats: int = 12) -> float:
        """Return the median time of `run(i)`, where i numbers the set of inputs."""
        for i in range(INPUT_SETS):
            run(i)
        times: list[float] = []
        for i in range(repeats):
            start, stop = self.event(), self.event()
            start.record()
            run(i % INPUT_SETS)
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        return statistics.median(times)

    def seconds(self, run: Callable[[], Result], *, warm: bool = True) -> tuple[Result, float, int]:
        """Return result, seconds and peak bytes of a run, by default after one to warm up."""
        if warm:
            run()
        self.synchronize()
        self.peak()
        start = time.perf_counter()
        result = run()
        self.synchronize()
        return result, time.perf_counter() - start, self.peak()


class Stopwatch:
    """A backend, as a class or built for a run, whose operations are timed by the GPU's clock."""

    def __init__(self, ops: Any, gpu: Gpu) -> None:
        self._ops, self._gpu, self._events = ops, gpu, list[tuple[str, Any, Any]]()

    def __call__(self, *arguments: Any) -> Stopwatch:
        watch = Stopwatch(self._ops(*arguments), self._gpu)
        watch._events = self._events
        return watch

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._ops, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            start, stop = self._gpu.event(), self._gpu.event()
            start.record()
            result = operation(*arguments, **named)
            stop.record()
            self._events.append((name, start, stop))
            return result

        return timed

    def stages(self) -> dict[str, float]:
        """Return the milliseconds of each operation."""
        self._gpu.synchronize()
        total: dict[str, float] = {}
        for name, start, stop in self._events:
            total[name] = total.get(name, 0.0) + start.elapsed_time(stop)
        return total


@contextmanager
def setting(module: Any, name: str, value: Any) -> Iterator[None]:
    """Replace a module's constant or function for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def bits_differ(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> int:
    """Count the entries of two lists of tensors that differ in a bit."""
    return sum(int((a != b).sum()) for a, b in zip(first, second, strict=True))
