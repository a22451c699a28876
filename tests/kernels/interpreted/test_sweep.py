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
    full_scores,
    log_softmax,
    nan_like,
    random_scores,
    random_z,
    sweep_truth,
)
from transclip_fast.kernels import messages
from transclip_fast.ops import torch_backend as twin
from transclip_fast.ops import triton_backend as ops


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def run_short(rng, n, k, candidates, rank, affinity, weights):
    """One sweep of the short form, held against float64 and torch."""
    base, _ = random_scores(rng, n, k, candidates)
    z = random_z(rng, n, k, rank)
    before = z.values.clone(), z.classes.clone()
    found, again = nan_like(z), nan_like(z)
    assert ops.sweep(base, affinity, z, out=found) is found
    same = twin.sweep(base, affinity, z, out=z.empty_like())
    truth, bound = sweep_truth(base, weights @ dense(*before, k), rank, z.floor)
    lists = dense(found.values, found.classes, k), dense(same.values, same.classes, k)
    assert_no_worse(*lists, truth, 2e-7)
    assert_lists_end(found.values, 0)
    assert (found.classes >= 0).all()
    assert torch.equal(z.values, before[0])
    assert torch.equal(z.classes, before[1])
    ops.sweep(base, affinity, z, out=again)
    assert all(
        torch.equal(getattr(found, x), getattr(again, x)) for x in ("values", "classes", "bound")
    )
    return found, same, bound


@pytest.mark.parametrize(("k", "candidates", "rank"), [(33, 10, 4), (13, 13, 13), (1, 1, 1)])
def test_short_form(rng, k, candidates, rank):
    affinity, weights = difficult_graph(rng, 41)
    found, same, bound = run_short(rng, 41, k, candidates, rank, affinity, weights)
    assert_no_worse(found.bound, same.bound, bound, 1e-6)


def test_a_hub_is_heard_in_segments(rng, monkeypatch):
    affinity, weights = difficult_graph(rng, 33, hub=150)
    found, same, bound = run_short(rng, 33, 21, 5, 3, affinity, weights)
    assert len(messages.Segments.of(affinity.offsets)) == 3
    # The hub hears more classes than are told apart: its bound may only be larger.
    assert_no_worse(found.bound[1:], same.bound[1:], bound[1:], 1e-6)
    assert found.bound[0] >= bound[0] - 1e-6
    monkeypatch.setattr(messages, "ELSEWHERE", 32)
    found, same, bound = run_short(rng, 33, 21, 5, 3, affinity, weights)
    assert_no_worse(found.bound, same.bound, bound, 1e-6)


@pytest.mark.parametrize("weight", [600.0, -600.0])
def test_messages_do_not_overflow(rng, weight):
    affinity, weights = affinity_of([(i, (i + 1) % 9, weight) for i in range(9)], 9)
    found, _, bound = run_short(rng, 9, 7, 3, 3, affinity, weights)
    np.testing.assert_allclose(found.bound, bound, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2])
def test_nobody_to_hear(rng, n):
    affinity, weights = affinity_of([], n)
    run_short(rng, n, 5, 3, 2, affinity, weights)


@pytest.mark.parametrize(("n", "k", "hub"), [(41, 33, 0), (33, 96, 150), (5, 1, 0), (1, 7, 0)])
def test_full_form(rng, monkeypatch, n, k, hub):
    monkeypatch.setattr(messages, "BLOCK", 32)
    affinity, weights = difficult_graph(rng, n, hub)
    base = torch.from_numpy(rng.normal(size=(n, k)).astype(np.float32))
    base[n // 2, : k // 2] = -torch.inf
    z = random_z(rng, n, k)
    found, again = nan_like(z), nan_like(z)
    ops.sweep(full_scores(base), affinity, z, out=found)
    same = twin.sweep(full_scores(base), affinity, z, out=z.empty_like())
    truth = np.exp(log_softmax(base.double().numpy() + weights @ z.values.double().numpy()))
    assert_no_worse(found.values, same.values, truth, 2e-7)
    ops.sweep(full_scores(base), affinity, z, out=again)
    assert torch.equal(found.values, again.values)


@pytest.mark.parametrize("weight", [600.0, -600.0])
def test_messages_do_not_overflow_the_full_form(rng, weight):
    affinity, weights = affinity_of([(i, (i + 1) % 9, weight) for i in range(9)], 9)
    base = torch.from_numpy(rng.normal(size=(9, 7)).astype(np.float32))
    z = random_z(rng, 9, 7)
    found = nan_like(z)
    ops.sweep(full_scores(base), affinity, z, out=found)
    same = twin.sweep(full_scores(base), affinity, z, out=z.empty_like())
    truth = np.exp(log_softmax(base.double().numpy() + weights @ z.values.double().numpy()))
    assert_no_worse(found.values, same.values, truth, 2e-7)


@pytest.mark.parametrize("rank", [None, 4])
def test_energies(rng, rank):
    affinity, weights = difficult_graph(rng, 33, hub=80)
    z = random_z(rng, 33, 21, rank)
    whole = z.dense().double().numpy()
    truth = (whole * (weights @ whole)).sum(), (whole * np.log(np.where(whole > 0, whole, 1))).sum()
    for found, same, exact in zip(
        ops.energies(z, affinity), twin.energies(z, affinity), truth, strict=True
    ):
        assert found.dtype == torch.float64
        assert_no_worse(found, same, exact, 1e-6)
