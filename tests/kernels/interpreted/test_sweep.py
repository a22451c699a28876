"""Sweeps and energies against float64, beside torch in float32."""

import numpy as np
import pytest
import torch

from tests.kernels.problems import (
    affinity_of,
    assert_lists_end,
    assert_no_worse,
    dense,
    difficult_graph,
    nan_like,
    random_scores,
    random_z,
    sweep_truth,
)
from transclip_fast.kernels import messages, segments
from transclip_fast.ops.torch_backend import TorchOps
from transclip_fast.ops.triton_backend import TritonOps
from transclip_fast.types import Affinity


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def run_sweep(rng, n, k, candidates, rank, affinity, weights):
    """One sweep, held against float64 and torch."""
    base, _ = random_scores(rng, n, k, candidates)
    z = random_z(rng, n, k, rank)
    before = z.values.clone(), z.classes.clone()
    found, again = nan_like(z), nan_like(z)
    ops = TritonOps(affinity)
    assert ops.sweep(base, z, out=found) is found
    same = TorchOps(affinity).sweep(base, z, out=z.empty_like())
    truth, bound = sweep_truth(base, weights @ dense(*before, k), rank, z.floor)
    lists = dense(found.values, found.classes, k), dense(same.values, same.classes, k)
    assert_no_worse(*lists, truth, 2e-7)
    assert_lists_end(found.values, 0)
    assert (found.classes >= 0).all()
    assert torch.equal(z.values, before[0])
    assert torch.equal(z.classes, before[1])
    ops.sweep(base, z, out=again, bounded=False)
    assert torch.equal(found.values, again.values)
    assert torch.equal(found.classes, again.classes)
    assert again.bound.isnan().all()  # left as it was
    return found, same, bound


@pytest.mark.parametrize(("k", "candidates", "rank"), [(33, 10, 4), (13, 13, 13), (1, 1, 1)])
def test_sweep(rng, k, candidates, rank):
    affinity, weights = difficult_graph(rng, 41)
    found, same, bound = run_sweep(rng, 41, k, candidates, rank, affinity, weights)
    assert_no_worse(found.bound, same.bound, bound, 1e-6)


@pytest.fixture
def short_segments(monkeypatch):
    monkeypatch.setattr(segments, "SEGMENT_NEIGHBORS", 16)
    monkeypatch.setattr(segments, "MERGED_SEGMENTS", 2)


def test_a_hub_is_summed_in_segments(rng, monkeypatch, short_segments):
    affinity, weights = difficult_graph(rng, 33, hub=150)
    found, same, bound = run_sweep(rng, 33, 21, 5, 3, affinity, weights)
    segmented = segments.SegmentedAffinity.of(affinity)
    assert [len(level.rows) for level in segmented.levels] == [10, 5, 3, 2]
    # Messages to the hub overflow the list of other classes: its bound may only be larger.
    assert_no_worse(found.bound[1:], same.bound[1:], bound[1:], 1e-6)
    assert found.bound[0] >= bound[0] - 1e-6
    monkeypatch.setattr(messages, "OUTSIDE_CLASSES", 32)
    found, same, bound = run_sweep(rng, 33, 21, 5, 3, affinity, weights)
    assert_no_worse(found.bound, same.bound, bound, 1e-6)


def test_hubs_of_all_sizes(rng, short_segments):
    """Segments of some hubs are merged more often than those of others."""
    edges = [(i, int(j), rng.normal() / n) for i, n in enumerate([16, 17, 33, 200, 3])
             for j in rng.integers(0, 20, n)]  # fmt: skip
    affinity, weights = affinity_of(edges, 20)
    bounds = segments.SegmentedAffinity.of(affinity).bounds
    assert (bounds.diff(dim=1)[:, 0] > 0).tolist() == [False, True, True, True] + 16 * [False]
    run_sweep(rng, 20, 9, 5, 3, affinity, weights)


@pytest.mark.parametrize("degree", [100, 10_000, 1_000_000])
def test_a_hub_takes_few_steps(degree):
    """Each level adds up a bounded number of entries or segments, and there are few levels."""
    affinity = Affinity(torch.tensor([0, degree, degree + 3]), *2 * [torch.zeros(degree + 3)])
    graph = segments.SegmentedAffinity.of(affinity)
    longest = [int((level.last - level.first).max()) for level in graph.levels]
    steps = sum(longest) + int(graph.bounds.diff(dim=1).max())
    assert steps <= 64 + 8 * (1 + np.log(degree / 64) / np.log(8))
    assert graph.bounds[1].tolist() == [0, 0]


@pytest.mark.parametrize("weight", [600.0, -600.0])
def test_messages_do_not_overflow(rng, weight):
    affinity, weights = affinity_of([(i, (i + 1) % 9, weight) for i in range(9)], 9)
    found, _, bound = run_sweep(rng, 9, 7, 3, 3, affinity, weights)
    np.testing.assert_allclose(found.bound, bound, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2])
def test_without_edges(rng, n):
    affinity, weights = affinity_of([], n)
    run_sweep(rng, n, 5, 3, 2, affinity, weights)


@pytest.mark.parametrize("rank", [21, 4])
def test_energies(rng, rank):
    affinity, weights = difficult_graph(rng, 33, hub=80)
    z = random_z(rng, 33, 21, rank)
    whole = z.dense().double().numpy()
    truth = (whole * (weights @ whole)).sum(), (whole * np.log(np.where(whole > 0, whole, 1))).sum()
    for found, same, exact in zip(
        TritonOps(affinity).energies(z), TorchOps(affinity).energies(z), truth, strict=True
    ):
        assert found.dtype == torch.float64
        assert_no_worse(found, same, exact, 1e-6)
