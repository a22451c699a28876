"""Queries of known class against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from tests import reference
from tests.agreement import assert_agrees
from transclip_fast import InputError, TransCLIP
from transclip_fast.data.npy_shards import Shard, StoredRows
from transclip_fast.solver import known as module
from transclip_fast.store.checkpoint import FileCheckpoint

pytestmark = pytest.mark.usefixtures("one_thread")
FORMS = [{"assignments": "dense"}] + [
    {"candidates": 6, "rank": 6, "backend": backend} for backend in ("torch", "numba")
]


def labels_of(labels, rows, shift=0):
    """The labels (N,), or others, at some rows and -1 elsewhere."""
    known = np.full(len(labels), -1)
    known[rows] = (labels[rows] + shift) % 6
    return known


def assert_one_hot(model, known):
    z = model.label_distributions_
    z = z.toarray() if sparse.issparse(z) else z
    np.testing.assert_array_equal(z[known >= 0], np.eye(z.shape[1])[known[known >= 0]])


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"class_cost": True},
        {"max_iter": 0},
        {"kl_weight": 0.0, "inner_iter": 2},
        {"unit_means": False, "likelihood_weight": 0.1, "covariance": "isotropic"},
        {"class_cost": True, "update_means": False, "graph_mode": "directed"},
    ],
    ids=str,
)
def test_is_the_reference(problem, form, values):
    """Nine rows of other classes than theirs, so that they move their neighbours."""
    features, prototypes, labels = problem()
    known = labels_of(labels, np.arange(9), shift=1)
    model = TransCLIP(device="cpu", **form, **values)
    model.fit(features, prototypes, known_labels=known)
    parameters = reference.Parameters(**values)
    run = reference.zero_shot(features, prototypes, parameters, known)
    assert_agrees(model, run)
    assert_one_hot(model, known)
    other = reference.zero_shot(features, prototypes, parameters)
    assert np.abs(run.z - other.z)[9:].max() > 1e-4


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("class_cost", [True, False])
def test_classes_that_the_prior_excludes(problem, form, class_cost):
    """A class nobody expected: no row's prior has it, and the objective stays finite."""
    features, prototypes, labels = problem(n=61)
    log_y = reference.log_prior(features.astype(float), prototypes.astype(float))
    log_y[:, 2] = -np.inf
    log_y[5, [0, 4]] = -np.inf
    log_y = reference.log_softmax(log_y)
    rows = np.append(np.flatnonzero(labels == 2)[:4], [0, 5])
    known = labels_of(labels, rows)
    known[5] = 4
    model = TransCLIP(device="cpu", class_cost=class_cost, **form)
    model.fit(features, prior=np.exp(log_y), known_labels=known)
    run = reference.solve(
        features, log_y, known=known, parameters=reference.Parameters(class_cost=class_cost)
    )
    assert np.isfinite(run.objective).all()
    assert_agrees(model, run)
    assert_one_hot(model, known)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_all_rows_known(problem, form):
    features, prototypes, labels = problem(n=41)
    model = TransCLIP(device="cpu", **form).fit(features, prototypes, known_labels=labels)
    assert_agrees(model, reference.zero_shot(features, prototypes, known=labels))
    np.testing.assert_array_equal(model.transduction_, labels)
    assert_one_hot(model, labels)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_beside_shots(problem, form):
    features, prototypes, labels = problem(n=90)
    known = labels_of(labels[30:], np.arange(20, 25), shift=1)
    model = TransCLIP(device="cpu", gamma=0.02, **form)
    shots = {"support_features": features[:30], "support_labels": labels[:30]}
    model.fit(features[30:], prototypes, **shots, known_labels=known)
    log_y = reference.log_prior(features[30:].astype(float), prototypes.astype(float))
    run = reference.solve(
        features[30:], log_y, support=features[:30], labels=labels[:30], gamma=0.02, known=known
    )
    assert_agrees(model, run)


@pytest.mark.parametrize("weight", [1, 10])
def test_other_weights(problem, monkeypatch, weight):
    features, prototypes, labels = problem()
    known = labels_of(labels, np.arange(9), shift=1)
    monkeypatch.setattr("transclip_fast.solver.state.KNOWN_WEIGHT", weight)
    monkeypatch.setattr(reference, "KNOWN_WEIGHT", weight)
    model = TransCLIP(device="cpu").fit(features, prototypes, known_labels=known)
    assert_agrees(model, reference.zero_shot(features, prototypes, known=known))


def test_short_lists(problem):
    """Of forty classes the lists keep eight; a known class need not be among them."""
    features, prototypes, _ = problem(n=300, k=40)
    worst = (features @ prototypes.T).argmin(1)
    known = np.where(np.arange(300) % 10 == 0, worst, -1)
    for backend in ("torch", "numba"):
        model = TransCLIP(device="cpu", candidates=8, backend=backend)
        with pytest.warns(UserWarning, match="keep .* % of the mass"):
            model.fit(features, prototypes, known_labels=known)
        assert_one_hot(model, known)
        dropped = 1 - model.label_distributions_.sum(1)
        assert dropped[known >= 0].max() == 0


def test_moments_are_summed_in_pieces(problem, monkeypatch):
    features, prototypes, labels = problem()
    known = labels_of(labels, np.arange(0, 77, 3))
    whole = TransCLIP(device="cpu").fit(features, prototypes, known_labels=known)
    monkeypatch.setattr(module, "READ_ROWS", 5)
    pieces = TransCLIP(device="cpu").fit(features, prototypes, known_labels=known)
    np.testing.assert_allclose(pieces.objective_, whole.objective_, rtol=1e-9)


def test_none_known_is_the_published_method(problem):
    features, prototypes, _ = problem()
    expected = TransCLIP(device="cpu").fit(features, prototypes)
    with pytest.warns(UserWarning, match=r"^known_labels: no row has one; they change nothing$"):
        model = TransCLIP(device="cpu").fit(features, prototypes, known_labels=np.full(77, -1))
    assert_same_run(model, expected)


def test_streamed_and_resumed_runs_have_the_same_bits(problem, tmp_path):
    features, prototypes, labels = problem(n=120)
    np.save(tmp_path / "rows.npy", features)
    known = labels_of(labels, np.arange(0, 120, 11), shift=1)
    values = {"assignments": "sparse", "class_cost": True, "device": "cpu"}
    expected = TransCLIP(**values).fit(features, prototypes, known_labels=known)
    streamed = TransCLIP(**values)
    rows = StoredRows([Shard.find(tmp_path / "rows.npy")])
    streamed.fit(rows, prototypes, known_labels=known)
    assert_same_run(streamed, expected)

    class Killed(Exception):
        pass

    def checkpoint(name, identity):
        return FileCheckpoint(tmp_path / "out", name, identity, 0.0)

    def kill(seen):
        if seen.steps == 4:
            raise Killed

    how = {"known_labels": known, "checkpoint": checkpoint}
    with pytest.raises(Killed):
        TransCLIP(**values).fit(features, prototypes, progress=kill, **how)
    steps = []
    resumed = TransCLIP(**values).fit(
        features, prototypes, progress=lambda seen: steps.append(seen.steps), **how
    )
    assert min(step for step in steps if step) >= 3
    assert_same_run(resumed, expected)


def assert_same_run(model, expected):
    for name in ("transduction_", "means_", "variances_", "objective_"):
        np.testing.assert_array_equal(getattr(model, name), getattr(expected, name))


@pytest.mark.parametrize("class_cost", [True, False])
def test_the_objective_does_not_rise(problem, class_cost):
    features, prototypes, labels = problem()
    known = labels_of(labels, np.arange(9), shift=1)
    model = TransCLIP(
        device="cpu", class_cost=class_cost, unit_means=False, clamp_similarity=True
    ).fit(features, prototypes, known_labels=known)
    assert np.diff(model.objective_).max() <= 1e-6 * len(features)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (np.zeros(76, int), "known_labels: expected 77 labels, one a row, got shape (76,)"),
        (np.zeros((77, 2), int), "known_labels: row 0 is not one-hot"),
        (np.full(77, -2), "known_labels: row 0 has label -2, outside -1 .. 5; labels are pos"),
        (np.arange(77), "row 6 has label 6, outside -1 .. 5"),
        (np.full(77, 0.5), "known_labels: row 0 has label 0.5; labels are whole numbers"),
        (np.full(77, np.inf), "known_labels: row 0 has label inf"),
        (["cat"] * 77, "known_labels: expected numbers"),
    ],
)
def test_bad_labels(problem, known, message):
    features, prototypes, _ = problem()
    with pytest.raises(InputError) as caught:
        TransCLIP(device="cpu").fit(features, prototypes, known_labels=known)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_in_another_order(golden):
    features, truth = golden["image_features"].astype(np.float32), golden["labels"]
    known = np.where(np.arange(len(truth)) % 5 == 0, (truth + 1) % 19, -1)
    model = TransCLIP(device="cpu", max_iter=0, inner_iter=1)
    with pytest.warns(UserWarning, match="^known_labels: zero-shot labels match on"):
        model.fit(features, golden["text_features"], known_labels=known)
