"""Products of float32 features in 16 bits: nearer to float64 than a float32 GEMM is."""

import numpy as np
import pytest
import torch

from tests.conftest import unit
from transclip_fast.kernels.products import HalfWeights, product


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def errors(features, weights):
    """Errors (N, K) of ours, of a float32 GEMM, and what they may be: of |f p|, of |f| and |p|."""
    features, weights = (torch.from_numpy(np.asarray(x, np.float32)) for x in (features, weights))
    ours = torch.full((len(features) + 3, len(weights)), torch.nan)
    found = product(features, HalfWeights.of(weights, torch.float32), ours)
    assert found.data_ptr() == ours.data_ptr()
    assert ours[len(features) :].isnan().all()
    truth = features.double() @ weights.double().T
    off = [(x.double() - truth).abs() for x in (found, features @ weights.T)]
    sizes = features.double().abs(), weights.double().abs()
    # The last bits of the parts, where entries are small: 2^-36 of f, and 2^-39 of the largest p.
    unseen = 2**-36 * sizes[1].sum(1) + 2**-39 * sizes[0].sum(1, keepdim=True) * sizes[1].max()
    return off[0], off[1], 2**-20 * sizes[0] @ sizes[1].T + unseen


def root_mean_square(x):
    return float(x.square().mean().sqrt())


def test_golden(golden):
    """Text features, and weights of a mixture whose variances differ."""
    features, texts = unit(golden["image_features"][:250]), golden["text_features"]
    variances = np.exp(2 * np.random.default_rng(0).normal(size=texts.shape[1]))
    for weights in (100 * texts, 100 * texts + texts / variances):
        ours, theirs, _ = errors(features, weights)
        assert ours.max() < theirs.max()
        assert root_mean_square(ours) < root_mean_square(theirs)


def kinds(rng, n, d):
    """Rows of all kinds: any sign, one sign, of a few large entries, of entries near nothing."""
    normal = rng.normal(size=(n, d))
    yield unit(normal)
    yield unit(np.abs(normal) + 1)
    yield unit(normal * np.exp(3 * rng.normal(size=(n, d))))
    yield unit(normal * np.where(np.arange(d) % 7 == 0, 1, 1e-9))
    yield unit(np.where(rng.random((n, d)) < 0.1, normal, 0) + 1e-30)


@pytest.mark.parametrize(("n", "k", "d"), [(20, 66, 1280), (30, 129, 512), (70, 20, 300)])
def test_adversarial(rng, n, k, d):
    """Where few terms make up a sum, float32 has one bit more; long sums lose more than that."""
    for i, features in enumerate(kinds(rng, n, d)):
        for j, weights in enumerate(kinds(rng, k, d)):
            ours, theirs, allowed = errors(features, 80 * weights)
            spare = 0 if max(i, j) < 2 else 2**-4 * root_mean_square(allowed)
            assert root_mean_square(ours) <= root_mean_square(theirs) + spare
            assert (ours <= allowed).all()


@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (1, 65, 17), (5, 3, 24)])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_small_shapes_and_weights_of_any_size(rng, n, k, d, scale):
    for features in kinds(rng, n, d):
        ours, _, allowed = errors(features, scale * rng.normal(size=(k, d)))
        assert (ours <= allowed).all()


def test_weights_of_zero(rng):
    ours, _, _ = errors(unit(rng.normal(size=(4, 8))), np.zeros((3, 8)))
    assert ours.max() == 0
