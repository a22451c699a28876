"""Every method against its formulas in float64, on odd shapes."""

from __future__ import annotations

import numpy as np
import pytest

from tests import reference_methods as truth
from tests.conftest import balanced, make_problem
from tests.reference import unit
from transclip_fast.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

K = 7


@pytest.fixture(scope="module")
def problem():
    """Queries, texts, shots and their labels in float64 with float32's digits; true labels."""
    x, t, labels = make_problem(n=131, k=K, d=29, seed=3, noise=0.06)
    shots = np.concatenate([balanced(labels, 2), [*np.flatnonzero(labels == 2)[2:5]]])
    others = np.setdiff1d(np.arange(len(x)), shots)
    x, t = x.astype(np.float64), t.astype(np.float64)
    return x[others], t, x[shots], labels[shots], labels[others]


def fitted(name, problem, settings, **arrays):
    x, t, s, y, _ = problem
    given = {"text_features": t, "support_features": s, "support_labels": y} | arrays
    kept = {key: value for key, value in given.items() if value is not None}
    return METHODS[name](device="cpu", **settings).fit(x, **kept)


def agrees(model, z, tolerance=2e-4):
    found = model.label_distributions_
    assert found.dtype == np.float32
    assert found.shape == z.shape
    np.testing.assert_allclose(found, z, atol=tolerance)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(model.transduction_, found.argmax(1))


def anchored(problem, anchors):
    """Queries and labelled rows of the truth, for what text means."""
    x, t, s, y, _ = problem
    everything = np.concatenate([t, s]), np.concatenate([np.arange(K), y])
    if anchors == "probabilities":
        return truth.softmax(30 * x @ t.T), truth.softmax(30 * s @ t.T), y
    return x, *{"shots": (s, y), "texts": (t, np.arange(K)), "both": everything}[anchors]


EVERY_ANCHOR = pytest.mark.parametrize("anchors", ["shots", "texts", "both", "probabilities"])


def test_zero_shot(problem):
    x, t, *_ = problem
    agrees(fitted("zero-shot", problem, {}), truth.zero_shot(x, t))


@pytest.mark.parametrize(
    "settings", [{}, {"max_iter": 0}, {"alpha": 5.0, "n_neighbors": 5, "inner_iter": 1}]
)
def test_stata(problem, settings):
    x, t, *_ = problem
    agrees(fitted("stata", problem, settings), truth.stata(x, t, **settings), 1e-3)


@EVERY_ANCHOR
@pytest.mark.parametrize("settings", [{}, {"n_rows": 0}, {"n_rows": 3, "eps": 40.0}])
def test_bd_cspn(problem, anchors, settings):
    x, s, y = anchored(problem, anchors)
    z = truth.bd_cspn(x, s, y, K, **settings)
    agrees(fitted("bd-cspn", problem, {"anchors": anchors, **settings}), z, 1e-3)


@EVERY_ANCHOR
@pytest.mark.parametrize("settings", [{}, {"n_neighbors": 5, "smoothness": 1.5}])
def test_laplacian_shot(problem, anchors, settings):
    x, s, y = anchored(problem, anchors)
    k = settings.get("n_neighbors", 3)
    graph = truth.knn_weights(problem[0], problem[0], k, True, False) != 0  # of the features
    z = truth.laplacian_shot(x, s, y, K, **settings, weights=graph.astype(float))
    agrees(fitted("laplacianshot", problem, {"anchors": anchors, **settings}), z)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("shots", [False, True])
@pytest.mark.parametrize("share_weight", [0.0, 3.0])
def test_em_dirichlet(problem, hard, shots, share_weight):
    x, t, s, y, _ = problem
    name = "hard-em-dirichlet" if hard else "em-dirichlet"
    settings = {"share_weight": share_weight, "max_iter": 4}
    arrays = {} if shots else {"support_features": None, "support_labels": None}
    labelled = (s, y) if shots else ()
    z = truth.em_dirichlet(x, t, *labelled, hard=hard, **settings)
    agrees(fitted(name, problem, settings, **arrays), z, 2e-3)


def test_dirichlet_steps_end_at_the_largest_likelihood():
    import torch

    from transclip_fast.methods.dirichlet import fit_dirichlet

    draw = np.random.default_rng(0)
    logs = [np.log(draw.dirichlet(scale, 50)).mean(0) for scale in draw.uniform(0.5, 9, (20, 5))]
    found = fit_dirichlet(torch.ones(20, 5, dtype=torch.float64), torch.tensor(np.array(logs)))
    np.testing.assert_allclose(found, [truth.dirichlet_mle(g) for g in logs], rtol=2e-3)


@pytest.mark.parametrize("anchors", ["shots", "texts", "both"])
@pytest.mark.parametrize(
    "settings", [{}, {"n_neighbors": 2, "n_labels": 3, "gamma": 2.0, "alpha": 0.9}]
)
def test_zlap_is_a_direct_solve(problem, anchors, settings):
    x, s, y = anchored(problem, anchors)
    z = truth.zlap(x, s, y, K, **settings)
    agrees(fitted("zlap", problem, {"anchors": anchors, **settings}), z, 1e-5)


def test_columns_of_zlap_are_spread_in_blocks(problem, monkeypatch):
    from transclip_fast.methods import label_graph

    whole = fitted("zlap", problem, {}).label_distributions_
    monkeypatch.setattr(label_graph, "BLOCK_CLASSES", 3)
    np.testing.assert_allclose(fitted("zlap", problem, {}).label_distributions_, whole, atol=1e-7)


@pytest.mark.parametrize("anchors", ["texts", "both"])
@pytest.mark.parametrize(
    "settings", [{}, {"n_neighbors": 3, "n_texts": 2, "gamma": 3.0, "sweeps": 5}]
)
def test_ecalp(problem, anchors, settings):
    x, t, s, y, _ = problem
    labelled = (s, y) if anchors == "both" else ()
    z = truth.ecalp(x, t, *labelled, **settings)
    agrees(fitted("ecalp", problem, {"anchors": anchors, **settings}), z, 1e-4)


@EVERY_ANCHOR
@pytest.mark.parametrize(
    "settings",
    [{"max_iter": 20}, {"tau": 5.0, "shots_weight": 0.4, "entropy_weight": 0.025, "max_iter": 7}],
)
def test_tim_adm(problem, anchors, settings):
    x, s, y = anchored(problem, anchors)
    z = truth.tim_adm(x, s, y, K, **settings)
    agrees(fitted("tim-adm", problem, {"anchors": anchors, **settings}), z, 1e-3)


@pytest.mark.parametrize(
    ("name", "alpha"), [("tim-gd", 1.0), ("alpha-tim", 1.5), ("alpha-tim", 7.0)]
)
def test_tim_by_gradients(problem, name, alpha):
    x, _, s, y, _ = problem
    x, s = x[:40, :9], s[:, :9]
    x, s = unit(x), unit(s)
    given = {"tau": 10.0, "shots_weight": 0.7, "entropy_weight": 0.4, "alpha": alpha}

    def loss(w):
        return truth.tim_loss(w, x, s, y, **given)

    w = truth.adam(loss, truth.class_means(s, y, K), rate=0.01, steps=6)
    z = truth.softmax(truth.tim_logits(x, w, 10.0))
    model = METHODS[name](device="cpu", rate=0.01, max_iter=6, **given)
    agrees(model.fit(x, support_features=s, support_labels=y), z, 1e-3)


def test_finetuning(problem):
    x, _, s, y, _ = problem
    x, s = unit(x[:40, :9]), unit(s[:, :9])
    start = truth.class_means(s, y, K)
    w = truth.adam(lambda w: truth.finetuning_loss(w, x, s, y, tau=4.0), start, rate=0.01, steps=6)
    z = truth.softmax(-4.0 * truth.distances(x, w))
    model = METHODS["transductive-finetuning"](device="cpu", tau=4.0, rate=0.01, max_iter=6)
    agrees(model.fit(x, support_features=s, support_labels=y), z, 1e-3)


@EVERY_ANCHOR
@pytest.mark.parametrize("settings", [{}, {"rate": 0.4, "max_iter": 3, "max_scalings": 5}])
def test_pt_map(problem, anchors, settings):
    x, s, y = anchored(problem, anchors)
    z = truth.pt_map(x, s, y, K, **settings)
    agrees(fitted("pt-map", problem, {"anchors": anchors, **settings}), z, 2e-3)


@pytest.mark.parametrize("kind", [list, np.float32])
def test_pt_map_with_the_shares_of_the_classes(problem, kind):
    x, _, s, y, labels = problem
    shares = np.bincount(labels, minlength=K) + np.arange(K)  # of any scale, and uneven
    given = kind(shares) if kind is list else shares.astype(kind)
    z = truth.pt_map(x, s, y, K, shares=shares)
    model = fitted("pt-map", problem, {"class_prior": given})
    agrees(model, z, 2e-3)
    np.testing.assert_allclose(
        model.label_distributions_.sum(0), len(x) * shares / shares.sum(), rtol=0.02
    )
    assert not model.assumes_balanced
    rare = fitted("pt-map", problem, {"class_prior": [1, 1e-300, *shares[2:]]})
    np.testing.assert_allclose(rare.label_distributions_.sum(1), 1, atol=1e-5)
    assert fitted("pt-map", problem, {}).assumes_balanced


@EVERY_ANCHOR
@pytest.mark.parametrize("c", [0.316, 1e4])
def test_logistic_regression(problem, anchors, c):
    x, s, y = anchored(problem, anchors)
    z = truth.logistic_regression(x, s, y, c)
    agrees(fitted("logistic-regression", problem, {"anchors": anchors, "c": c}), z, 1e-3)
