"""How a fitted model is held against the float64 reference."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from tests import reference


def assert_agrees(model, run, distinct=True):
    """
    The fitted `model` is the reference `run` to float32 rounding.

    Where most rows coincide (not `distinct`) nearly all of the squares cancel in the variance: what
    is left of it, and of the objective, is rounding relative to 1/d. A hub receives messages of
    hundreds of nats, of which float32 keeps 3e-5.
    """
    z = model.label_distributions_
    assert z.dtype == np.float32
    z = z.toarray() if sparse.issparse(z) else z
    np.testing.assert_allclose(z, run.z, rtol=0, atol=1e-5 if distinct else 1e-4)
    np.testing.assert_array_equal(model.transduction_, z.argmax(1))
    np.testing.assert_allclose(model.means_, run.means, rtol=0, atol=2e-6)
    atol = 0 if distinct else 1e-5 / len(model.variances_)
    np.testing.assert_allclose(model.variances_, run.variances, rtol=1e-4, atol=atol)
    if distinct:  # L is a sum over all rows, and each is as good as its z
        np.testing.assert_allclose(model.objective_, run.objective, rtol=5e-7, atol=1e-5 * len(z))


def dense_weights(graph, n_queries=None):
    """W (rows, N) float64 of neighbour lists, of the queries' own where N is not given."""
    weights = np.zeros((len(graph), n_queries or len(graph)))
    rows, places = np.nonzero(graph.neighbors >= 0)
    weights[rows, graph.neighbors[rows, places]] = graph.similarities[rows, places]
    return weights


def zero_shot_log_prior(features, prototypes, logit_scale=100.0):
    """log y_hat (N, K) float64."""
    return reference.log_prior(
        np.asarray(features, np.float64), np.asarray(prototypes, np.float64), logit_scale
    )
