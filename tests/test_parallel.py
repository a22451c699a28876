"""The pool of threads on which torch computes alone."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from transclip_fast.parallel import (
    ThreadBuffer,
    fixed_threads,
    flushed_denormals,
    n_threads,
    parallel_map,
    single_threaded_torch,
)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_several_threads(two_threads):
    ready = threading.Barrier(2, timeout=20)

    def task(part):
        ready.wait()  # passes only where two run at once
        return part, torch.get_num_threads()

    assert parallel_map(task, range(6)) == [(part, 1) for part in range(6)]
    assert torch.get_num_threads() == 2


def test_maps_within_maps_run_in_place(two_threads):
    assert parallel_map(lambda x: sum(parallel_map(lambda y: x * y, range(4))), range(9)) == [
        6 * x for x in range(9)
    ]


def test_an_error_reaches_the_caller(two_threads):
    def task(part):
        raise ValueError(f"part {part}")

    with pytest.raises(ValueError, match="part 0"):
        parallel_map(task, range(3))


def test_one_thread_for_torch_keeps_the_pool_and_is_undone(two_threads):
    seen = []

    def task():
        with single_threaded_torch(), single_threaded_torch():
            seen.append((torch.get_num_threads(), n_threads()))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        task()
    assert seen == [(1, 2)]
    assert torch.get_num_threads() == 2


def test_other_threads_keep_their_number(two_threads):
    """A thread that first uses torch during a solve is not left with one thread for good."""
    with single_threaded_torch():
        parallel_map(str, range(3))
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == 2


def test_buffers_are_a_threads_own(two_threads):
    buffer, ready = ThreadBuffer(torch.float32), threading.Barrier(2, timeout=20)

    def task(part):
        block = buffer.block(2, 3).fill_(part)
        ready.wait()
        return block.unique().item()

    assert parallel_map(task, range(2)) == [0, 1]
    first = buffer.block(2, 3)
    assert buffer.block(3, 2).data_ptr() == first.data_ptr()
    assert buffer.block(5, 2).shape == (5, 2)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork(two_threads):
    parallel_map(str, range(3))  # the parent's pool, which the child does not have
    child = os.fork()
    if child == 0:
        os._exit(parallel_map(int, range(3)) != [0, 1, 2])
    assert os.waitpid(child, 0)[1] == 0


def flushes():
    return bool(torch.full((1,), 1e-40).mul(1.0) == 0)


def test_denormals_are_flushed_and_then_as_before():
    assert not flushes()
    with flushed_denormals(), fixed_threads(2):
        assert flushes()
        assert all(parallel_map(lambda _: flushes(), range(4)))
        with flushed_denormals():
            assert flushes()
        assert flushes()
    assert not flushes()
