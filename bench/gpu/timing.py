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


class Cpu(Gpu):
    """Stands in for a GPU: the same calls, each once, on the CPU's clock."""

    device = "cpu"

    def event(self) -> Any:
        """Return an event of the CPU's clock."""
        return CpuEvent()

    def synchronize(self) -> None:
        """Nothing is ahead of the CPU."""

    def peak(self) -> int:
        """Return 0: nothing is counted."""
        return 0

    def milliseconds(self, run: Arm, repeats: int = 1) -> float:
        """Return the time of the last set of inputs, after the first to warm up."""
        run(0)
        start = time.perf_counter()
        run(INPUT_SETS - 1)
        return 1e3 * (time.perf_counter() - start)

    def seconds(
        self, run: Callable[[], Result], *, warm: bool = False
    ) -> tuple[Result, float, int]:
        """Return result and seconds of a run."""
        return super().seconds(run, warm=False)


class CpuEvent:
    """A moment, as an event of CUDA."""

    def record(self) -> None:
        """Take the time."""
        self.seconds = time.perf_counter()

    def elapsed_time(self, stop: CpuEvent) -> float:
        """Return the milliseconds until another event."""
        return 1e3 * (stop.seconds - self.seconds)


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
