"""
A pool of threads, each of which runs torch single-threaded.

Torch's own threads wait for each other in every operation: a solve has thousands of small ones, and
if other work holds a core, each wait costs a time slice. After an operation they also spin for
milliseconds on cores that the next compiled loop needs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

CPU = torch.device("cpu")
SUBNORMAL = 1e-40
Part = TypeVar("Part")
Returned = TypeVar("Returned")

_caller = threading.local()  # `threads`: of torch, before `single_threaded_torch`


class ThreadBuffer(threading.local):
    """Memory for one block at a time, separate in each thread; it grows to the largest block."""

    def __init__(self, dtype: torch.dtype) -> None:  # runs in every thread
        self._entries = torch.empty(0, dtype=dtype)

    def block(self, n_rows: int, n_columns: int) -> torch.Tensor:
        """An uninitialised block (n_rows, n_columns), valid until the next one of this thread."""
        size = n_rows * n_columns
        if size > len(self._entries):
            self._entries = torch.empty(size, dtype=self._entries.dtype)
        return self._entries[:size].view(n_rows, n_columns)


def n_threads() -> int:
    """Threads of the pool: as many as torch's own operations take."""
    return getattr(_caller, "threads", None) or torch.get_num_threads()


def parallel_map(
    task: Callable[[Part], Returned], parts: Iterable[Part], device: torch.device = CPU
) -> list[Returned]:
    """The results of `task` on every part, in order: in threads on a CPU, else one by one."""
    parts = list(parts)
    # A pool's own threads have one thread each; handing over a single part only costs time.
    if device.type != "cpu" or len(parts) == 1 or n_threads() == 1:
        return [task(part) for part in parts]
    return list(_pool(os.getpid(), n_threads()).map(task, parts))


@contextmanager
def single_threaded_torch(device: torch.device = CPU) -> Iterator[None]:
    """Keep torch's own operations on the calling thread, and the pool at its size."""
    threads = torch.get_num_threads()
    if threads == 1 or device.type != "cpu":  # one thread also within another such block
        yield
        return
    _caller.threads = threads
    _use_one_thread(threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        del _caller.threads


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """
    Take numbers below float32's smallest normal one, 1e-38, for 0, as the pool's threads do.

    Arithmetic on them is a hundred times slower, and a class that costs 60 nats has many.
    """
    before = bool(torch.full((1,), SUBNORMAL).mul(1.0) == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextmanager
def fixed_threads(number: int) -> Iterator[None]:
    """Compute with `number` CPU threads, on which the last bits of a result depend."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _pool(process: int, size: int) -> ThreadPoolExecutor:
    """The pool of a process, as threads do not survive a fork, and of a size."""
    return ThreadPoolExecutor(size, "transclip_fast", _start_thread, (size,))


def _start_thread(default: int) -> None:
    """Prepare a thread of the pool."""
    _use_one_thread(default)
    torch.set_flush_denormal(True)


def _use_one_thread(default: int) -> None:
    """
    Let torch use one thread when called from this thread, and `default` when from a new one.

    `set_num_threads` sets two numbers: the calling thread's, and the process's, which a thread
    takes over at its first operation. A short-lived thread restores the process's number.
    """
    torch.set_num_threads(1)
    torch.get_num_threads()  # counts as the first operation of this thread
    helper = threading.Thread(target=torch.set_num_threads, args=(default,))
    helper.start()
    helper.join()
