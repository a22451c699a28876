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
from contextvars import ContextVar
from functools import lru_cache
from typing import TypeVar

import torch

CPU = torch.device("cpu")
Part = TypeVar("Part")
Result = TypeVar("Result")

_size: ContextVar[int | None] = ContextVar("size", default=None)


def n_threads() -> int:
    """Threads of the pool: as many as torch's own operations take."""
    return _size.get() or torch.get_num_threads()


def each(
    task: Callable[[Part], Result], parts: Iterable[Part], device: torch.device = CPU
) -> list[Result]:
    """The results of `task` on every part, in order: in threads on a CPU, else one by one."""
    if device.type != "cpu" or n_threads() == 1:  # as it is on the pool's own threads
        return [task(part) for part in parts]
    return list(_pool(n_threads(), os.getpid()).map(task, parts))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's own operations on the calling thread, and the pool at its size."""
    before = torch.get_num_threads()
    token = _size.set(n_threads())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _size.reset(token)


@lru_cache(maxsize=1)
def _pool(size: int, _process: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork, hence the process."""
    before = torch.get_num_threads()
    ready = threading.Barrier(size)
    pool = ThreadPoolExecutor(size, "transclip_fast", initializer=_alone)
    list(pool.map(lambda _: ready.wait(), range(size)))  # all of them have started
    torch.set_num_threads(before)  # which a new thread set for everybody
    return pool


def _alone() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # makes the setting final for this thread
