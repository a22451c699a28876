"""Few-shot beyond the ordinary: the published code's graph, and shots of every kind."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from tests.agreement import assert_agrees
from tests.conftest import make_problem
from tests.ordered_sums import OrderedSums
from tests.solver.test_loop import few_shot_problem
from transclip_fast import TransCLIP
from transclip_fast.data.npy_shards import Shard, StoredRows
from transclip_fast.graph.build import build_graph
from transclip_fast.solver.support import enough, support_messages
from transclip_fast.store.checkpoint import FileCheckpoint

FORMS = [{"assignments": "dense"}] + [
    {"candidates": 6, "rank": 6, "backend": backend} for backend in ("torch", "numba")
]


def split(problem, shots, n=90, k=6, **options):
    """Queries, prototypes, and as many shots of each class as asked for, unit rows float32."""
    features, prototypes, labels = problem(n=n, k=k, **options)
    rows = np.concatenate([np.flatnonzero(labels == c)[:m] for c, m in enumerate(shots)])
    queries = np.setdiff1d(np.arange(n), rows)
    return features[queries], prototypes, features[rows], labels[rows]


@st.composite
def counts(draw):
    """Shots of each of six classes, of some none, of all together at least one."""
    return draw(st.lists(st.integers(0, 5), min_size=6, max_size=6).filter(any))


@pytest.mark.filterwarnings("ignore:support_labels. zero-shot labels match")
@settings(max_examples=25, deadline=None)
@given(shots=counts(), gamma=st.sampled_from((0.0, *reference.GAMMAS)), seed=st.integers(0, 99))
def test_unbalanced_shots_and_classes_without(shots, gamma, seed):
    features, prototypes, support, labels = split(make_problem, shots, seed=seed)
    model = TransCLIP(device="cpu", gamma=gamma)
    model.fit(features, prototypes, support_features=support, support_labels=labels)
    assert_agrees(model, reference.few_shot(features, prototypes, support, labels, gamma))


@pytest.mark.parametrize("shots", [(1, 1, 1, 1, 1, 1), (4, 4, 4, 4, 4, 9), (5, 4, 6, 4, 7, 4)])
def test_the_best_gamma_s_own_run_is_returned(problem, shots):
    features, prototypes, support, labels = split(problem, shots, noise=0.05)
    held = reference.unit(features[::2] + 0.01).astype(np.float32)
    truth = (held @ prototypes.T).argmax(1)
    shots = {"support_features": support, "support_labels": labels}
    chosen = TransCLIP(device="cpu").fit(
        features, prototypes, **shots, validation_features=held, validation_labels=truth
    )
    run = reference.few_shot(features, prototypes, support, labels, validation=(held, truth))
    assert chosen.gamma_ == run.gamma
    assert_agrees(chosen, run)
    alone = TransCLIP(device="cpu", gamma=chosen.gamma_).fit(features, prototypes, **shots)
    for name in ("label_distributions_", "means_", "variances_", "objective_"):
        np.testing.assert_array_equal(getattr(chosen, name), getattr(alone, name))


def test_equally_good_gammas_the_first(problem):
    features, prototypes, support, labels = split(problem, (2,) * 6)
    model = TransCLIP(device="cpu").fit(
        features,
        prototypes,
        support_features=support,
        support_labels=labels,
        validation_features=features[:1],
        validation_labels=[5],  # of all runs, none gives it that label, or each does
    )
    runs = [reference.few_shot(features, prototypes, support, labels, g) for g in reference.GAMMAS]
    assert len({run.z[0].argmax() == 5 for run in runs}) == 1
    assert model.gamma_ == 0.002


@pytest.mark.parametrize("shots", [(2,) * 6, (4, 7, 4, 4, 5, 6)])
def test_a_shot_weighs_a_sixteenth_of_its_class_by_default(problem, shots):
    features, prototypes, support, labels = split(problem, shots)
    given = {"support_features": support, "support_labels": labels}
    model = TransCLIP(device="cpu").fit(features, prototypes, **given)
    # In the likelihood term a shot weighs 50 gamma N / M, where a query weighs 1.
    weight = 50 * model.gamma_ * len(features) / len(labels)
    assert weight == pytest.approx(len(features) / 6 / 16)
    run = reference.few_shot(features, prototypes, support, labels, model.gamma_)
    assert_agrees(model, run)


def test_shots_that_are_queries_too(problem):
    features, prototypes, labels = problem()
    model = TransCLIP(device="cpu", gamma=0.02)
    shots = {"support_features": features[:9], "support_labels": labels[:9]}
    model.fit(features, prototypes, **shots)
    run = reference.few_shot(features, prototypes, features[:9], labels[:9], 0.02)
    assert_agrees(model, run)


def test_a_cost_of_the_shots_is_resumed(problem, tmp_path):
    features, prototypes, support, labels = split(problem, (4,) * 6)
    shots = {"support_features": support, "support_labels": labels}
    values = {"device": "cpu", "gamma": 0.02, "class_cost": True}
    expected = TransCLIP(**values).fit(features, prototypes, **shots)

    def checkpoint(name, identity):
        return FileCheckpoint(tmp_path / "out", name, identity, 0.0)

    def stop(seen):
        if seen.steps == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TransCLIP(**values).fit(features, prototypes, **shots, progress=stop, checkpoint=checkpoint)
    resumed = TransCLIP(**values).fit(features, prototypes, **shots, checkpoint=checkpoint)
    for name in ("transduction_", "objective_", "class_costs_"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(expected, name))


# -- few or uneven shots


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("class_cost", ["auto", True, False])
@pytest.mark.parametrize("shots", [(1, 0, 0, 0, 0, 0), (3, 0, 1, 0, 2, 0), (3, 9, 9, 9, 9, 9)])
def test_too_few_shots_are_zero_shot(problem, form, class_cost, shots):
    """Validation rows or not; each shot weighs as a query of known class."""
    features, prototypes, support, labels = split(problem, shots)
    model = TransCLIP(device="cpu", class_cost=class_cost, **form)
    given = {"support_features": support, "support_labels": labels}
    model.fit(features, prototypes, **given)
    parameters = reference.Parameters(class_cost=class_cost)
    run = reference.few_shot(features, prototypes, support, labels, parameters=parameters)
    assert (model.gamma_, run.gamma, model.kl_weight_) == (None, None, 1.0)
    assert_agrees(model, run)
    none = reference.zero_shot(features, prototypes, parameters)
    assert np.abs(run.z - none.z).max() > 1e-4
    again = TransCLIP(device="cpu", class_cost=class_cost, **form)
    validation = {"validation_features": features[:9], "validation_labels": np.arange(9) % 6}
    again.fit(features, prototypes, **given, **validation)
    np.testing.assert_array_equal(again.objective_, model.objective_)


@pytest.mark.parametrize("class_cost", [True, False])
def test_too_few_shots_of_a_given_prior(problem, class_cost):
    features, prototypes, support, labels = split(problem, (3, 0, 1, 0, 2, 0))
    log_y = reference.log_prior(features.astype(float), prototypes.astype(float))
    log_y[:30, 2] = -np.inf
    log_y = reference.log_softmax(log_y)
    known = np.where(np.arange(len(features)) < 5, 2, -1)
    run = reference.solve(
        features,
        log_y,
        support=support,
        labels=labels,
        known=known,
        parameters=reference.Parameters(class_cost=class_cost),
    )
    for form in FORMS:
        model = TransCLIP(device="cpu", class_cost=class_cost, **form).fit(
            features,
            prior=np.exp(log_y),
            support_features=support,
            support_labels=labels,
            known_labels=known,
        )
        assert_agrees(model, run)


def test_too_few_shots_streamed_and_with_a_kl_weight(problem, tmp_path):
    features, prototypes, support, labels = split(problem, (3, 0, 1, 0, 2, 0))
    np.save(tmp_path / "rows.npy", features)
    values = {"device": "cpu", "assignments": "sparse", "class_cost": True, "kl_weight": 0.7}
    shots = {"support_features": support, "support_labels": labels}
    held = TransCLIP(**values).fit(features, prototypes, **shots)
    rows = StoredRows([Shard.find(tmp_path / "rows.npy")])
    streamed = TransCLIP(**values).fit(rows, prototypes, **shots)
    assert held.kl_weight_ == 0.7
    np.testing.assert_array_equal(streamed.objective_, held.objective_)
    np.testing.assert_array_equal(streamed.transduction_, held.transduction_)


@pytest.mark.parametrize(
    ("shots", "expected"),
    [
        ((1, 1, 1), True),
        ((4, 4, 9), True),
        ((3, 3, 9), False),
        ((0, 0, 9), False),
        ((0, 0, 1), False),
    ],
)
def test_enough(shots, expected):
    labels = torch.repeat_interleave(torch.tensor(shots))
    assert enough(labels, 3) == expected


# -- priors and arrays


@pytest.mark.parametrize("few_shot", [False, True])
def test_probabilities_of_the_texts_are_the_texts(problem, few_shot):
    features, prototypes, support, labels = few_shot_problem(problem)
    shots = {"support_features": support, "support_labels": labels} if few_shot else {}
    log_y = reference.log_prior(features.astype(float), prototypes.astype(float))
    model = TransCLIP(device="cpu", gamma=0.02)
    text = model.fit(features, prototypes, **shots).label_distributions_
    for prior in ({"prior": np.exp(log_y)}, {"prior_logits": log_y + 3}):
        other = TransCLIP(device="cpu", gamma=0.02).fit(features, **prior, **shots)
        np.testing.assert_allclose(other.label_distributions_, text, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(other.transduction_, model.transduction_)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("prior", ["prior", "prior_logits", "prototypes", None])
def test_no_argument_is_ever_modified(problem, prior, scale):
    """Read-only arrays, some of which must be normalised, are the same bytes afterwards."""
    features, prototypes, support, labels = few_shot_problem(problem)
    log_y = reference.log_prior(features.astype(float), prototypes.astype(float))
    arrays = {
        "X": features * np.float32(scale),
        "text_features": prototypes * np.float32(scale),
        "support_features": support * np.float32(scale),
        "support_labels": labels,
        "validation_features": features[:20] * np.float32(scale),
        "validation_labels": log_y[:20].argmax(1),
        "prior": np.exp(log_y),
        "prior_logits": log_y,
        "prototypes": (prototypes + prototypes[::-1] / 9) * np.float32(scale),
    }
    others = {"prior", "prior_logits", "prototypes"} - {prior}
    arrays = {name: array for name, array in arrays.items() if name not in others}
    graph = build_graph(features)
    for array in (*arrays.values(), graph.neighbors, graph.similarities):
        array.setflags(write=False)
    before = {name: array.tobytes() for name, array in arrays.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*rows were not unit vectors")
        model = TransCLIP(device="cpu", assignments="dense").fit(**arrays, graph=graph)
        TransCLIP(device="cpu", assignments="sparse").fit(**arrays, graph=graph)
    assert {name: array.tobytes() for name, array in arrays.items()} == before
    for name in ("label_distributions_", "means_", "zero_shot_confidences_"):
        result = getattr(model, name)
        assert not any(np.shares_memory(result, array) for array in arrays.values()), name


# -- labels that contradict the prior


@pytest.mark.parametrize("shots", [4, 16])
@pytest.mark.parametrize("kind", ["right", "shifted", "blurred texts"])
def test_labels_in_another_order(golden, kind, shots):
    """Shots and validation rows warn where classes are mixed up, not where texts are poor."""
    features, truth = golden["image_features"].astype(np.float32), golden["labels"]
    texts, rng = golden["text_features"].astype(np.float32), np.random.default_rng(shots)
    if kind == "blurred texts":
        noise = reference.unit(rng.normal(size=texts.shape))
        hard = [reference.unit(texts + amount * noise) for amount in np.linspace(0, 3, 31)]
        correct = [((features @ t.T).argmax(1) == truth).mean() for t in hard]
        texts = hard[int(np.abs(np.array(correct) - 0.1).argmin())]
    rows = np.concatenate([rng.permutation(np.flatnonzero(truth == k))[:shots] for k in range(19)])
    given = (truth[rows] + (kind == "shifted")) % 19
    others = np.setdiff1d(np.arange(len(features)), rows)
    labelled = {"support_features": features[rows], "support_labels": given}
    labelled |= {"validation_features": features[rows], "validation_labels": given}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = TransCLIP(device="cpu", gamma=0.02, max_iter=0, inner_iter=1)
        model.fit(features[others[::2]], texts, **labelled)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (2 if kind == "shifted" else 0), messages
    for message, name in zip(messages, ("support", "validation"), strict=False):
        assert message.startswith(f"{name}_labels: zero-shot labels match on ")
        assert "\n" not in message


def test_a_given_prior_in_another_order(golden):
    features, truth = golden["image_features"].astype(np.float32), golden["labels"]
    prior = 0.9 * np.eye(19)[truth[100:]] + 0.1 / 19
    model = TransCLIP(device="cpu", gamma=0.02, max_iter=0, inner_iter=1)
    shots = {"support_features": features[:100], "support_labels": truth[:100]}
    model.fit(features[100:], prior=prior, **shots)
    with pytest.warns(UserWarning, match="^support_labels: zero-shot labels match on"):
        model.fit(features[100:], prior=np.roll(prior, 1, axis=1), **shots)


# -- golden features


@pytest.mark.parametrize("shots", [(2, 2), (5, 4), (5, 0)])
def test_golden_few_shot(golden, shots):
    """Enough shots of which validation rows choose gamma, and none of every other class."""
    features, labels = golden["image_features"].astype(np.float32), golden["labels"]
    texts, rng = golden["text_features"].astype(np.float32), np.random.default_rng(shots[0])
    order = rng.permutation(len(features))
    rows = np.concatenate([order[labels[order] == k][: shots[k % 2]] for k in range(19)])
    rest = np.setdiff1d(order, rows)
    held, queries = rest[::9], rest[1::7]
    validation = features[held], labels[held]
    model = TransCLIP(device="cpu").fit(
        features[queries],
        texts,
        support_features=features[rows],
        support_labels=labels[rows],
        validation_features=validation[0],
        validation_labels=validation[1],
    )
    parameters = reference.Parameters()
    run = reference.few_shot(
        features[queries], texts, features[rows], labels[rows], None, validation, parameters
    )
    assert model.gamma_ == run.gamma
    np.testing.assert_array_equal(model.transduction_, run.z.argmax(1))
    assert np.abs(model.label_distributions_ - run.z).max() < 1e-4


def test_messages_are_summed_in_the_order_of_the_shots():
    """Some queries are the neighbour of many shots of a class, and some lists are not full."""
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(-1, 7, (60, 4)), rng.integers(0, 3, 60)
    weights = rng.normal(size=(60, 4))
    truth = np.zeros((7, 3))
    for row, label, values in zip(ids, labels, weights, strict=True):
        for i, weight in zip(row, values, strict=True):
            truth[i, label] += weight * (i >= 0)
    with OrderedSums():
        found = support_messages(*map(torch.from_numpy, (ids, weights, labels)), (7, 3))
    dense = torch.zeros(7, 3)
    found.add_to(dense, slice(0, 7))
    np.testing.assert_allclose(dense, truth, rtol=1e-6)
