"""The float64 reference is the published method, and its formulas are those of the paper."""

from math import exp, hypot, log

import numpy as np
import pytest

from tests import reference
from tests.conftest import unit
from tests.reference import Parameters


def test_reference_reproduces_the_published_run(golden):
    expected = golden["official_assignments"]
    z = reference.zero_shot(golden["image_features"], golden["text_features"]).z
    assert np.abs(z - expected).max() <= 2e-5
    np.testing.assert_array_equal(z.argmax(1), expected.argmax(1))


def test_log_softmax():
    np.testing.assert_allclose(
        reference.log_softmax(np.log([[1.0, 3.0], [2.0, 2.0]]) + 700),
        np.log([[0.25, 0.75], [0.5, 0.5]]),
    )


@pytest.mark.parametrize(
    ("clamp", "expected"),
    [
        (False, [[0, 0.6, 0], [0.6, 0, 0], [-0.6, 0, 0]]),
        (True, [[0, 0.6, 0], [0.6, 0, 0], [0, 0, 0]]),
    ],
)
def test_graph_weighs_the_nearest_other_row_by_its_cosine(clamp, expected):
    rows = np.array([[1, 0], [0.6, 0.8], [-0.6, -0.8]])
    weights = reference.knn_weights(rows, rows, 1, True, clamp)
    np.testing.assert_allclose(weights, expected, atol=1e-15)


def test_support_rows_drop_nothing_from_their_lists():
    queries = np.array([[1, 0], [0.6, 0.8]])
    weights = reference.knn_weights(queries, queries, 1, False, False)
    np.testing.assert_allclose(weights, np.eye(2))


def test_one_sweep_by_hand():
    features = np.array([[1, 0], [0.6, 0.8]])
    prior = np.array([[0.8, 0.2], [0.3, 0.7]])
    parameters = Parameters(n_neighbors=1, max_iter=0, inner_iter=1, likelihood_weight=0.25)
    run = reference.solve(features, np.log(prior), parameters=parameters)

    # Both rows start both means; the variance is 1/2, so g is minus the squared distance.
    starts = [(0.8 + 0.3 * 0.6, 0.3 * 0.8), (0.2 + 0.7 * 0.6, 0.7 * 0.8)]
    means = [(x / hypot(x, y), y / hypot(x, y)) for x, y in starts]
    np.testing.assert_allclose(run.means, means)
    for i, (x, y) in enumerate(features):
        other = prior[1 - i]  # W + W^T has 0.6 twice, over 2k = 2
        masses = [
            exp(-0.25 * ((x - m) ** 2 + (y - n) ** 2) + 0.6 * other[k] + log(prior[i, k]))
            for k, (m, n) in enumerate(means)
        ]
        np.testing.assert_allclose(run.z[i], np.array(masses) / sum(masses))


def test_one_step_by_hand():
    """With one class z is 1, the mean is the mean, the variance that of all rows."""
    rng = np.random.default_rng(0)
    features, support = unit(rng.normal(size=(9, 4))), unit(rng.normal(size=(2, 4)))
    labels = np.zeros(2, int)
    parameters = Parameters(max_iter=1, unit_means=False)
    run = reference.solve(
        features, np.zeros((9, 1)), support=support, labels=labels, gamma=0.01,
        parameters=parameters,
    )  # fmt: skip
    weights = np.r_[np.full(9, 1 / 9), np.full(2, 0.5 / 2)]  # 50 gamma = 0.5
    rows = np.concatenate([features, support])
    mean = np.average(rows, axis=0, weights=weights)
    np.testing.assert_allclose(run.means[0], mean)
    np.testing.assert_allclose(
        run.variances, np.average((rows - mean) ** 2, axis=0, weights=weights)
    )
    assert run.gamma == 0.01


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("few_shot", [False, True])
@pytest.mark.parametrize("covariance", ["diagonal", "isotropic"])
def test_objective_falls_in_every_step(problem, seed, few_shot, covariance):
    features, prototypes, labels = problem(seed=seed)
    parameters = Parameters(unit_means=False, covariance=covariance, clamp_similarity=True)
    if few_shot:
        support, features = features[:20], features[20:]
        run = reference.few_shot(
            features, prototypes, support, labels[:20], gamma=0.02, parameters=parameters
        )
    else:
        run = reference.zero_shot(features, prototypes, parameters)
    steps = np.diff(run.objective)
    assert len(steps) == 10
    assert steps.max() <= 1e-9
    assert steps.min() < -0.1


def test_predict_is_the_posterior_of_the_mixture():
    solution = reference.Solution(None, np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([0.5, 0.25]))
    z = reference.predict(np.array([[0.6, 0.8]]), solution, np.log([[0.5, 0.5]]), 1.0, 1.0)
    g = np.array([-(0.6**2) - 2 * 0.2**2, -(0.4**2) - 2 * 0.8**2])
    np.testing.assert_allclose(z[0], np.exp(g) / np.exp(g).sum())
