"""
A pool of threads on which torch computes alone.

Torch's own threads wait for each other in every operation. Where something else has the other's
core, a wait takes a time slice, and of small operations there are thousands; and after each they
spin for milliseconds on the cores where the next loop wants to run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

CPU = torch.device("cpu")
Part = TypeVar("Part")
Result = TypeVar("Result")

_lock = threading.Lock()
_own = threading.local()  # `size`: what a thread had before it became quiet
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def n_threads() -> int:
    """Threads of the pool: as many as torch's own operations take."""
    return getattr(_own, "size", None) or torch.get_num_threads()


def parallel_map(
    task: Callable[[Part], Result], parts: Iterable[Part], device: torch.device = CPU
) -> list[Result]:
    """The results of `task` on every part, in order: in threads on a CPU, else one by one."""
    if device.type != "cpu" or n_threads() == 1:  # as it is on the pool's own threads
        return [task(part) for part in parts]
    return list(_pool(n_threads()).map(task, parts))


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Keep torch's own operations on the calling thread, and the pool at its size."""
    if hasattr(_own, "size"):
        yield
        return
    _own.size = torch.get_num_threads()
    _alone(_own.size)
    try:
        yield
    finally:
        torch.set_num_threads(_own.size)
        del _own.size


@contextmanager
def fixed_threads(number: int) -> Iterator[None]:
    """The number of CPU threads decides the last bits: it stays that of the first run."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _pool(size: int) -> ThreadPoolExecutor:
    """The pool of a size; threads do not survive a fork, so each process has its own."""
    with _lock:
        key = os.getpid(), size
        if key not in _pools:
            ready = threading.Barrier(size)
            pool = ThreadPoolExecutor(size, "transclip_fast", initializer=_alone, initargs=(size,))
            list(pool.map(lambda _: ready.wait(), range(size)))  # all of them have started
            _pools[key] = pool
        return _pools[key]


def _alone(others: int) -> None:
    """
    Let torch use this thread only when called from it, and `others` threads from elsewhere.

    Torch's setting is both the calling thread's and the one that threads take over when they
    first compute; another thread puts the latter back.
    """
    torch.set_num_threads(1)
    torch.get_num_threads()  # makes it final for this thread
    helper = threading.Thread(target=torch.set_num_threads, args=(others,))
    helper.start()
    helper.join()
