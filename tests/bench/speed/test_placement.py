"""Bytes that processes would send, by the order of rows."""

import numpy as np
import pytest

from bench.speed.placement import sent
from transclip_fast import NeighborGraph

N = 2048  # four parts of rows


def ring():
    """Each row's only neighbour is the next one."""
    neighbors = (np.arange(N)[:, None] + 1) % N
    return NeighborGraph(neighbors, np.ones(neighbors.shape, np.float32))


@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_at_the_ends_of_consecutive_parts_travel(ranks):
    found = sent(ring(), np.arange(N), np.arange(N), ranks)
    firsts = np.arange(ranks) * N // ranks
    ends = np.concatenate([firsts, firsts - 1]) % N
    assert found["halo_rows"] == 2 * ranks
    assert found["sweep_bytes"] == ends.sum()
    assert found["remote"] == pytest.approx(ranks / N)


def test_a_row_travels_once_to_a_rank_that_needs_it_twice():
    order = np.concatenate([np.arange(0, N, 2), np.arange(1, N, 2)])
    found = sent(ring(), np.full(N, 8), order, 2)
    assert found == {"remote": 1, "halo_rows": N, "sweep_bytes": 8 * N}
