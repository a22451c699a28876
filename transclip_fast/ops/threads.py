"""A pool of threads whose torch operations are single-threaded, for loops that release the GIL."""

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

Part = TypeVar("Part")
Result = TypeVar("Result")

_size: ContextVar[int | None] = ContextVar("size", default=None)


def n_threads() -> int:
    """Threads of the pool: as many as torch's own operations take."""
    return _size.get() or torch.get_num_threads()


def each(task: Callable[[Part], Result], parts: Iterable[Part]) -> list[Result]:
    """Call `task` on every part, in parallel; results in the order of the parts."""
    return list(_pool(n_threads(), os.getpid()).map(task, parts))


@contextmanager
def quiet() -> Iterator[None]:
    """
    Keep torch's own operations on the calling thread, and the pool at its size.

    After a parallel operation of torch its OpenMP threads spin for milliseconds, on the cores
    where the pool's next loop wants to run.
    """
    before = torch.get_num_threads()
    token = _size.set(before)
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
