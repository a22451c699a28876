"""Inputs that no benchmark has: few rows, more classes than rows, duplicates, absent classes."""

import numpy as np
import pytest
import torch

from tests import reference
from tests.agreement import assert_agrees, dense_weights, zero_shot_log_prior
from tests.conftest import unit
from transclip_fast import TransCLIP
from transclip_fast.graph.exact import nearest
from transclip_fast.graph.neighbor_graph import NeighborGraph


def identical_rows(features):
    return np.repeat(features[:1], 40, axis=0)


def many_duplicates(features):
    """2000 copies of one row between the others."""
    return np.concatenate([features[:30], np.repeat(features[30:31], 2000, axis=0), features[31:]])


CASES = {
    "one row": ({"n": 1}, {}, None),
    "one row, one class": ({"n": 1, "k": 1}, {}, None),
    "five rows": ({"n": 5}, {}, None),
    "one class": ({"k": 1}, {}, None),
    "more classes than rows": ({"n": 10, "k": 30}, {}, None),
    "one dimension less than classes": ({"d": 5}, {}, None),
    "as many neighbours as rows": ({"n": 12}, {"n_neighbors": 12}, None),
    "more neighbours than rows": ({"n": 12}, {"n_neighbors": 40}, None),
    "identical rows": ({}, {}, identical_rows),
    "identical rows, many neighbours": ({}, {"n_neighbors": 60}, identical_rows),
    "2000 duplicates": ({}, {}, many_duplicates),
}


@pytest.mark.filterwarnings("ignore:n_neighbors")
@pytest.mark.parametrize("few_shot", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_finite_repeatable_and_equal_to_the_reference(problem, name, few_shot):
    sizes, values, change = CASES[name]
    features, prototypes, _ = problem(**sizes)
    if change is not None:
        features = change(features)
    shots = {}
    if few_shot:
        labels = np.minimum(np.arange(8) // 3, len(prototypes) - 1)
        support, _, _ = problem(n=8, d=features.shape[1], seed=7)
        shots = {"support_features": support, "support_labels": labels}

    def fit():
        return TransCLIP(device="cpu", gamma=0.02, **values).fit(features, prototypes, **shots)

    model, again = fit(), fit()
    z = model.label_distributions_
    for array in (z, model.means_, model.variances_, model.objective_):
        assert np.isfinite(array).all()
    np.testing.assert_allclose(z.sum(1), 1, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(z, again.label_distributions_)
    np.testing.assert_array_equal(model.means_, again.means_)

    free = {}
    if change is not None:  # which duplicates are neighbours is the model's choice
        free["graph"] = dense_weights(model.graph_)
    if few_shot:
        shots = {"support": support, "labels": labels, "gamma": 0.02}
        if change is not None:
            rows = torch.from_numpy(np.concatenate([support, features]))
            found = nearest(rows[:8], rows[8:], model.n_neighbors)  # as the model does
            free["support_graph"] = dense_weights(
                NeighborGraph(*map(np.asarray, found)), len(features)
            )
    run = reference.solve(
        features,
        zero_shot_log_prior(features, prototypes),
        parameters=reference.Parameters(**values),
        **shots,
        **free,
    )
    assert_agrees(model, run, distinct=change is None and len(features) > 1)


def test_a_class_absent_from_the_queries(problem):
    """Its prototype is opposite to every row, so that its mass underflows."""
    features, prototypes, _ = problem()
    prototypes = np.concatenate([prototypes, -prototypes.mean(0, keepdims=True)])
    prototypes = unit(prototypes).astype(np.float32)
    model = TransCLIP(device="cpu").fit(features, prototypes)
    run = reference.zero_shot(features, prototypes)
    assert run.z[:, -1].max() < 1e-40
    assert model.label_distributions_[:, -1].max() == 0
    np.testing.assert_allclose(model.label_distributions_, run.z, atol=1e-5)
    np.testing.assert_allclose(model.means_[:-1], run.means[:-1], atol=2e-6)
    start = reference.start_means(
        features.astype(np.float64), np.exp(zero_shot_log_prior(features, prototypes)), None, None
    )
    np.testing.assert_allclose(model.means_[-1], start[-1], atol=2e-6)  # it keeps its mean


def test_a_class_that_the_prior_excludes_everywhere(problem):
    """It starts somewhere finite and never gets mass."""
    features, prototypes, _ = problem()
    prior = np.exp(zero_shot_log_prior(features, prototypes))
    prior = np.insert(prior, 2, 0, axis=1)
    model = TransCLIP(device="cpu").fit(features, prior=prior)
    others = TransCLIP(device="cpu").fit(features, prior=np.delete(prior, 2, axis=1))
    assert (model.label_distributions_[:, 2] == 0).all()
    assert np.isfinite(model.means_).all()
    np.testing.assert_allclose(
        np.delete(model.label_distributions_, 2, axis=1), others.label_distributions_, atol=2e-6
    )
    np.testing.assert_allclose(model.objective_, others.objective_, atol=1e-3)


@pytest.mark.parametrize("of", ["texts", "prior"])
def test_new_rows_are_labelled_in_blocks(of, problem, monkeypatch):
    features, texts, _ = problem(n=77)
    arrays = {"text_features": texts}
    if of == "prior":
        arrays = {"prior": np.random.default_rng(0).dirichlet(np.ones(6), size=77)}
    model = TransCLIP(device="cpu").fit(features, **arrays)
    new = {name: array[::-1] for name, array in arrays.items() if of == "prior"}
    whole = model.predict_proba(features[::-1], **new)
    monkeypatch.setattr("transclip_fast.solver.loop.product_rows", lambda *_: 10)
    np.testing.assert_allclose(model.predict_proba(features[::-1], **new), whole, atol=1e-6)
    np.testing.assert_array_equal(model.predict(features[::-1], **new), whole.argmax(1))
