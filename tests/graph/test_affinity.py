"""The affinity against dense matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.agreement import dense_weights
from transclip_fast.graph.affinity import affinity
from transclip_fast.graph.neighbor_graph import NeighborGraph


def random_graph(n, k, seed, dtype=np.int64):
    """Any lists: shorter than k, mutual, with similarities of both signs."""
    rng = np.random.default_rng(seed)
    neighbors = np.full((n, k), -1, dtype)
    for i in range(n):
        found = rng.permutation(np.delete(np.arange(n), i))[: rng.integers(k + 1)]
        neighbors[i, : len(found)] = found
    similarities = rng.uniform(-1, 1, (n, k)).astype(np.float32)
    return NeighborGraph(neighbors, similarities)  # of no neighbour, too: never to be read


def dense(found, n):
    """A (N, N) of an Affinity."""
    offsets = found.offsets.numpy()
    assert offsets[0] == 0
    assert offsets[-1] == len(found.columns) == len(found.weights)
    matrix = np.zeros((n, n))
    rows = np.repeat(np.arange(n), np.diff(offsets))
    np.add.at(matrix, (rows, found.columns.numpy()), found.weights.double().numpy())
    return matrix


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 2**32 - 1), st.booleans())
def test_against_dense(n, k, seed, clamp):
    graph = random_graph(n, k, seed)
    w = dense_weights(graph)
    if clamp:
        w = np.maximum(w, 0)
    symmetric = dense(affinity(graph, clamp_similarity=clamp), n)
    np.testing.assert_allclose(symmetric, (w + w.T) / (2 * k), atol=1e-7)
    directed = dense(affinity(graph, mode="directed", clamp_similarity=clamp), n)
    np.testing.assert_allclose(directed, w / k, atol=1e-7)


@pytest.fixture
def _every_warning():
    """Torch repeats the warnings that it otherwise gives once a process."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.usefixtures("_every_warning")
@pytest.mark.parametrize("mode", ["symmetric", "directed"])
def test_int32_and_read_only_lists(mode):
    """As a memory map has them."""
    graph = random_graph(9, 3, 0)
    narrow = NeighborGraph(graph.neighbors.astype(np.int32), graph.similarities.astype(np.float16))
    narrow.neighbors.setflags(write=False)
    narrow.similarities.setflags(write=False)
    found, expected = affinity(narrow, mode=mode), affinity(graph, mode=mode)
    assert found.columns.dtype == expected.columns.dtype
    np.testing.assert_array_equal(found.columns, expected.columns)
    np.testing.assert_allclose(found.weights, expected.weights, atol=1e-3)
