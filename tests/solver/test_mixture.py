"""The mixture's closed forms against sums over rows in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from tests.conftest import unit
from transclip_fast.solver.loop import linear_score
from transclip_fast.solver.mixture import VARIANCE_FLOOR, Mixture, Moments
from transclip_fast.solver.prior import LinearPrior


@st.composite
def weighted_rows(draw):
    """z (n, k) with rows on the simplex, some classes empty, and features (n, d)."""
    n, k, d = draw(st.integers(1, 12)), draw(st.integers(1, 5)), draw(st.integers(2, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    features = unit(rng.normal(size=(n, d)))
    z = rng.gamma(draw(st.sampled_from([0.05, 1.0, 20.0])), size=(n, k)) + 1e-12
    present = rng.random(k) < 0.7
    present[rng.integers(k)] = True
    z *= present
    return z / z.sum(1, keepdims=True), features


def moments_of(z, features):
    return Moments(
        torch.from_numpy(z.sum(0)),
        torch.from_numpy(z.T @ features),
        torch.from_numpy((features**2).sum(0)),
    )


def start(k, d, seed=0):
    """Some mixture, never near the rows' own."""
    rng = np.random.default_rng(seed)
    return Mixture(
        torch.from_numpy(unit(rng.normal(size=(k, d)))), torch.from_numpy(rng.uniform(1, 2, d))
    )


@given(weighted_rows(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_means(rows, unit_means):
    z, features = rows
    before = start(z.shape[1], features.shape[1])
    after = before.update_means(moments_of(z, features), unit=unit_means)
    for k in range(z.shape[1]):
        if z[:, k].sum() == 0:
            expected = before.means[k]
        else:
            expected = np.average(features, axis=0, weights=z[:, k])
            if unit_means:
                expected = expected / np.linalg.norm(expected)
        np.testing.assert_allclose(after.means[k], expected, atol=1e-9)
    assert after.variances is before.variances


@given(weighted_rows(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_variance(rows, isotropic):
    z, features = rows
    n, d = features.shape
    mixture = start(z.shape[1], d)
    covariance = "isotropic" if isotropic else "diagonal"
    after = mixture.update_variance(moments_of(z, features), covariance=covariance)
    distances = (features[:, None] - mixture.means.numpy()) ** 2  # (n, k, d)
    expected = np.maximum((z[:, :, None] * distances).sum((0, 1)) / n, 1e-6 / d)
    if isotropic:
        expected = np.full(d, expected.mean())
    np.testing.assert_allclose(after.variances, expected, rtol=1e-9, atol=1e-14)
    assert after.means is mixture.means


@given(weighted_rows())
@settings(max_examples=60, deadline=None)
def test_log_likelihood(rows):
    z, features = rows
    mixture = start(z.shape[1], features.shape[1])
    means, variances = mixture.means.numpy(), mixture.variances.numpy()
    densities = -0.5 * ((features[:, None] - means) ** 2 / variances + np.log(variances)).sum(2)
    np.testing.assert_allclose(
        mixture.log_likelihood(moments_of(z, features)), (z * densities).sum(), rtol=1e-9
    )


@given(weighted_rows())
@settings(max_examples=60, deadline=None)
def test_linear_score_is_the_log_density_up_to_a_constant_per_row(rows):
    z, features = rows
    mixture = start(z.shape[1], features.shape[1])
    weights, offset = (tensor.numpy() for tensor in mixture.linear_score())
    linear = features @ weights.T + offset
    means, variances = mixture.means.numpy(), mixture.variances.numpy()
    g = -0.5 * ((features[:, None] - means) ** 2 / variances).sum(2)
    np.testing.assert_allclose(linear - linear[:, :1], g - g[:, :1], atol=1e-9)


def test_thousands_of_classes():
    """Steps go by blocks of classes."""
    n, k, d = 60, 3001, 24
    rng = np.random.default_rng(0)
    features, prototypes = unit(rng.normal(size=(n, d))), rng.normal(size=(k, d))
    z = rng.dirichlet(np.ones(k), n)
    moments, mixture, costs = moments_of(z, features), start(k, d), rng.random(k)
    means, variances = mixture.means.numpy(), mixture.variances.numpy()
    score = linear_score(
        mixture,
        LinearPrior(torch.from_numpy(prototypes).float()),
        likelihood_weight=0.5,
        kl_weight=2.0,
        class_costs=torch.from_numpy(costs),
    )
    found = features @ score.weights.numpy().T + score.offset.numpy()
    g = features @ (means / variances).T - 0.5 * (means**2 / variances).sum(1)
    expected = 0.5 * g + 2 * features @ prototypes.T - costs
    np.testing.assert_allclose(found - found[:, :1], expected - expected[:, :1], atol=2e-5)
    after = mixture.update_means(moments)
    np.testing.assert_allclose(after.means, unit(z.T @ features), atol=1e-12)
    distances = (features**2).sum(0) - 2 * (means * (z.T @ features)).sum(0)
    distances = distances + (z.sum(0)[:, None] * means**2).sum(0)
    spread = mixture.update_variance(moments).variances
    np.testing.assert_allclose(spread, distances / n, rtol=1e-12)
    likelihood = -0.5 * ((distances / variances).sum() + n * np.log(variances).sum())
    np.testing.assert_allclose(mixture.log_likelihood(moments), likelihood, rtol=1e-12)
    total = (z * (features @ prototypes.T)).sum()
    np.testing.assert_allclose(moments.dot(torch.from_numpy(prototypes)), total, rtol=1e-12)


def test_variance_floor_and_its_size():
    features = np.repeat(unit(np.ones((1, 8)) + np.arange(8)), 5, axis=0)
    z = np.full((5, 2), 0.5)
    mixture = start(2, 8).update_means(moments_of(z, features))
    after = mixture.update_variance(moments_of(z, features))
    np.testing.assert_allclose(after.variances, 1e-6 / 8)
    assert VARIANCE_FLOOR == 1e-6


def test_mass_below_float32_noise_keeps_the_mean():
    z, features = np.array([[1.0, 1e-35]]), np.array([[0.6, 0.8]])
    before = start(2, 2)
    for unit_means in (True, False):
        after = before.update_means(moments_of(z, features), unit=unit_means)
        np.testing.assert_array_equal(after.means[1], before.means[1])
        np.testing.assert_allclose(after.means[0], features[0])


@given(weighted_rows(), weighted_rows(), st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_moments_pool_like_rows(rows, others, weight):
    z, features = rows
    k, d = z.shape[1], features.shape[1]
    other_z = np.resize(others[0], (3, k))
    other_features = np.resize(others[1], (3, d))
    pooled = moments_of(z, features) + moments_of(other_z, other_features) * weight
    weights = np.r_[np.ones(len(z)), np.full(3, weight)][:, None]
    z, features = np.concatenate([z, other_z]), np.concatenate([features, other_features])
    np.testing.assert_allclose(pooled.counts, (weights * z).sum(0), rtol=1e-12)
    np.testing.assert_allclose(pooled.sums, (weights * z).T @ features, atol=1e-10)
    np.testing.assert_allclose(pooled.squares, (weights * features**2).sum(0), rtol=1e-12)


def first(log_prior):
    """The 8 largest of each class and their rows."""
    order = np.argsort(-log_prior, axis=0, kind="stable")[:8]
    values = np.take_along_axis(log_prior, order, 0).astype(np.float32)
    return torch.from_numpy(values), torch.from_numpy(order)


@pytest.mark.parametrize("shots", [False, True])
def test_start(shots):
    """8 most confident rows of each class, weighted by their probability; shots instead."""
    rng = np.random.default_rng(0)
    features, prior = unit(rng.normal(size=(40, 6))), rng.dirichlet(np.ones(5), 40)
    support, labels = unit(rng.normal(size=(5, 6))), np.array([0, 0, 0, 3, 3])
    expected = []
    for k in range(5):
        if shots and (labels == k).any():
            expected.append(support[labels == k].sum(0))
        else:
            best = np.argsort(-prior[:, k])[:8]
            expected.append((prior[best, k, None] * features[best]).sum(0))
    mixture = Mixture.start(
        *first(np.log(prior)),
        torch.from_numpy(features.astype(np.float32)),
        moments_of(np.eye(5)[labels], support) if shots else None,
    )
    np.testing.assert_allclose(mixture.means, unit(np.array(expected)), atol=1e-6)
    np.testing.assert_allclose(mixture.variances, 1 / 6)


def test_start_of_a_class_whose_probabilities_underflow():
    """The weights' ratios count, not their scale."""
    rng = np.random.default_rng(0)
    features = torch.from_numpy(unit(rng.normal(size=(8, 6))).astype(np.float32))
    log_prior = rng.normal(size=(8, 3))
    expected = Mixture.start(*first(log_prior), features).means
    shifted = Mixture.start(*first(log_prior - [0.0, 5000.0, 90.0]), features).means
    np.testing.assert_allclose(shifted, expected, atol=1e-3)  # float32 of 5000
    excluded = Mixture.start(*first(log_prior - [0.0, np.inf, 0.0]), features).means
    np.testing.assert_allclose(excluded[1], unit(features.double().numpy().sum(0)[None])[0])


def test_the_mass_that_rows_dropped_is_shared():
    """As the kept mass is; class 2 has none."""
    draw = np.random.default_rng(0)
    z = draw.dirichlet(np.full(5, 0.3), size=40)
    z[z < 0.1] = z[:, 2] = 0
    features = draw.normal(size=(40, 7))
    kept = [torch.from_numpy(x) for x in (z.sum(0), z.T @ features, (features**2).sum(0))]
    whole = [torch.tensor([40.0]).double(), torch.from_numpy(features.sum(0))[None], kept[2]]
    moments = Moments(*kept).with_dropped(Moments(*whole))
    sums, counts = reference.sparse_sums(z, features)
    np.testing.assert_allclose(moments.sums, sums, atol=1e-12)
    np.testing.assert_allclose(moments.counts, counts, atol=1e-12)
    assert moments.squares is kept[2]
