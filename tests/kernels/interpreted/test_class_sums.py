"""Class sums against float64, beside torch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.kernels.problems import affinity_of, assert_no_worse, random_z
from transclip_fast.kernels import class_sums as kernels
from transclip_fast.ops.torch_backend import TorchOps
from transclip_fast.ops.triton_backend import TritonOps


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def truth_of(z, features, nodes):
    """Sums (K, d) and masses (K,) float64."""
    kept = z.dense().double().numpy()[nodes]
    return kept.T @ features.double().numpy(), kept.sum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("n", "k", "d", "rank"),
    [(77, 33, 96, 7), (300, 3, 33, 2), (300, 5, 33, 5), (1, 1, 5, 1)],
)
def test_class_sums(rng, monkeypatch, dtype, n, k, d, rank):
    monkeypatch.setattr(kernels, "PIECE_ENTRIES", 20)  # a class in several pieces
    features = torch.from_numpy(rng.normal(size=(n, d))).to(dtype)
    z = random_z(rng, n, k, rank)
    nodes = torch.from_numpy(rng.permutation(n))
    affinity, _ = affinity_of([], n)
    found = TritonOps(affinity, nodes).class_sums(z, features)
    same = TorchOps(affinity, nodes).class_sums(z, features.float())
    for ours, theirs, truth in zip(found, same, truth_of(z, features, nodes.numpy()), strict=True):
        assert ours.dtype == torch.float64
        assert ours.shape == truth.shape
        assert_no_worse(ours, theirs, truth, 1e-12)
    again = TritonOps(affinity, nodes).class_sums(z, features)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


def test_lists_longer_than_a_launch_takes(rng, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_ENTRIES", 100)
    z, features = random_z(rng, 77, 33, 7), torch.from_numpy(rng.normal(size=(77, 5)))
    found = TritonOps(affinity_of([], 77)[0]).class_sums(z, features.float())
    for ours, truth in zip(found, truth_of(z, features.float(), np.arange(77)), strict=True):
        np.testing.assert_allclose(ours, truth, atol=1e-12)


def test_columns_first_are_refused(rng):
    ops = TritonOps(affinity_of([], 30)[0])
    with pytest.raises(ValueError, match="contiguous"):
        ops.class_sums(random_z(rng, 30, 5, 2), torch.ones(4, 30).T)


def test_a_class_without_mass(rng):
    z = random_z(rng, 30, 5, 2)
    z = replace(z, classes=z.classes + 1, n_classes=6)  # the first class has no mass
    ops = TritonOps(affinity_of([], 30)[0])
    sums, counts = ops.class_sums(z, torch.ones(30, 4))
    assert counts[0] == 0
    assert (sums[0] == 0).all()


@pytest.mark.parametrize("rank", [2, 3])
def test_many_similar_rows_keep_their_digits(rng, rank):
    """What is left of the squares is the variance: errors must not add up."""
    features = torch.from_numpy((0.7 + 1e-3 * rng.normal(size=(1500, 9))).astype(np.float32))
    z = random_z(rng, 1500, 3, rank)
    found = TritonOps(affinity_of([], 1500)[0]).class_sums(z, features)
    for ours, truth in zip(found, truth_of(z, features, np.arange(1500)), strict=True):
        np.testing.assert_allclose(ours, truth, rtol=1e-9)
