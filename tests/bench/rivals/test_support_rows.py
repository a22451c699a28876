"""The published code's errors in the few-shot graph, against the float64 reference."""

from functools import partial

import numpy as np
import pytest

from bench.rivals.support_rows import fit_published_rows
from tests import reference
from tests.agreement import assert_agrees
from tests.solver.test_loop import few_shot_problem
from transclip_fast import TransCLIP


@pytest.mark.parametrize("gamma", reference.GAMMAS)
@pytest.mark.parametrize("seed", range(3))
def test_published_rows(problem, seed, gamma):
    features, prototypes, support, labels = few_shot_problem(problem, seed)
    runs = {}
    for published in (False, True):
        model = TransCLIP(device="cpu", gamma=gamma)
        fit = partial(fit_published_rows, model) if published else model.fit
        fit(features, prototypes, support_features=support, support_labels=labels)
        parameters = reference.Parameters(published_support_rows=published)
        runs[published] = reference.few_shot(
            features, prototypes, support, labels, gamma, parameters=parameters
        )
        assert_agrees(model, runs[published])
        assert (model.graph_.neighbors != np.arange(len(features))[:, None]).all()
    assert np.abs(runs[True].z - runs[False].z).max() > 1e-3


@pytest.mark.filterwarnings("ignore:n_neighbors")
@pytest.mark.parametrize(
    ("n_queries", "values"),
    [
        (60, {"n_neighbors": 1}),
        (60, {"n_neighbors": 7, "clamp_similarity": True}),
        (24, {}),  # as many queries as shots
        (9, {}),  # lists of the last shots and of all queries tell constants
        (9, {"n_neighbors": 5, "kl_weight": 1.0}),
        (4, {}),  # a shot's list without its first query has all others
        (3, {}),  # and here it is shorter than k
    ],
)
@pytest.mark.parametrize("assignments", ["dense", "sparse"])
def test_published_rows_of_any_shape(problem, n_queries, values, assignments):
    features, prototypes, labels = problem(n=24 + n_queries, d=17)
    rows = np.random.default_rng(n_queries).normal(size=features.shape) * 0.1 + features
    features = reference.unit(rows).astype(np.float32)
    queries, support = np.split(features, [n_queries])
    whole = {"candidates": 6, "rank": 6} if assignments == "sparse" else {}
    model = TransCLIP(
        device="cpu",
        gamma=0.02,
        assignments=assignments,
        **whole,
        **values,
    )
    classes = labels[n_queries:]
    arrays = {"support_features": support, "support_labels": classes}
    fit_published_rows(model, queries, prototypes, **arrays)
    parameters = reference.Parameters(published_support_rows=True, **values)
    run = reference.few_shot(queries, prototypes, support, classes, 0.02, parameters=parameters)
    assert_agrees(model, run)


@pytest.mark.parametrize("clamp", [False, True])
def test_published_rows_with_negative_similarities(clamp):
    rows = reference.unit(np.random.default_rng(3).normal(size=(40, 4))).astype(np.float32)
    features, prototypes, support = rows[:20], rows[20:24], rows[24:]
    labels = np.arange(16) % 4
    values = {"n_neighbors": 15, "logit_scale": 5.0, "clamp_similarity": clamp}
    model = TransCLIP(device="cpu", gamma=0.02, **values)
    arrays = {"support_features": support, "support_labels": labels}
    fit_published_rows(model, features, prototypes, **arrays)
    parameters = reference.Parameters(published_support_rows=True, **values)
    run = reference.few_shot(features, prototypes, support, labels, 0.02, parameters=parameters)
    assert_agrees(model, run)


def test_published_rows_change_nothing_without_shots(problem):
    features, prototypes, _ = problem()
    plain = TransCLIP(device="cpu").fit(features, prototypes)
    model = fit_published_rows(TransCLIP(device="cpu"), features, prototypes)
    np.testing.assert_array_equal(model.label_distributions_, plain.label_distributions_)


def test_published_rows_know_one_graph_mode():
    with pytest.raises(ValueError, match="graph_mode='symmetric' only"):
        fit_published_rows(TransCLIP(graph_mode="directed"), None, None)
