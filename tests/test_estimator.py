"""The estimator against the float64 reference: priors, few-shot, gamma, predict_proba, arrays."""

import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tests import reference
from tests.agreement import assert_agrees, zero_shot_log_prior
from tests.conftest import balanced, unit
from tests.solver.test_loop import few_shot_problem
from transclip_fast import InputError, TransCLIP
from transclip_fast.graph.build import build_graph
from transclip_fast.methods import METHODS


def fitted(*args, **kwargs):
    """A model with default parameters, fitted."""
    return TransCLIP(device="cpu").fit(*args, **kwargs)


def probabilities(n, k, seed=0):
    """Soft predictions (n, k) float32 that exclude some classes; no two are equally confident."""
    rng = np.random.default_rng(seed)
    scores = 2 * rng.normal(size=(n, k))
    scores[rng.random((n, k)) < 0.2] = -np.inf
    scores[:, 0] = rng.normal(size=n)  # never excluded
    return np.exp(reference.log_softmax(scores)).astype(np.float32)


def log_of(prior):
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(prior, np.float64))


def test_published_assignments(golden):
    expected = golden["official_assignments"]
    model = fitted(golden["image_features"], golden["text_features"])
    np.testing.assert_array_equal(model.transduction_, expected.argmax(1))
    assert np.abs(model.label_distributions_ - expected).max() <= 1e-4


# -- priors


@pytest.mark.parametrize("few_shot", [False, True])
def test_prior_as_probabilities_with_exact_zeros(problem, few_shot):
    features, prototypes, support, labels = few_shot_problem(problem)
    prior = probabilities(len(features), len(prototypes))
    assert (prior == 0).any()
    assert np.abs(prior.sum(1) - 1).max() < 1e-6
    shots = {"support": support, "labels": labels, "gamma": 0.02} if few_shot else {}
    model = TransCLIP(device="cpu", gamma=0.02)
    model.fit(
        features,
        prior=prior,
        support_features=support if few_shot else None,
        support_labels=labels if few_shot else None,
    )
    assert_agrees(model, reference.solve(features, log_of(prior), **shots))
    assert (model.label_distributions_[prior == 0] == 0).all()
    np.testing.assert_array_equal(model.zero_shot_labels_, prior.argmax(1))
    np.testing.assert_allclose(model.zero_shot_confidences_, prior.max(1), rtol=1e-6)


def test_prior_without_weight_excludes_nothing(problem):
    features, prototypes, _ = problem()
    prior = probabilities(len(features), len(prototypes))
    model = TransCLIP(device="cpu", kl_weight=0.0).fit(features, prior=prior)
    parameters = reference.Parameters(kl_weight=0.0)
    assert_agrees(model, reference.solve(features, log_of(prior), parameters=parameters))
    assert (model.label_distributions_ > 0).all()


def test_prior_rows_are_normalised(problem):
    features, prototypes, _ = problem()
    prior = probabilities(len(features), len(prototypes))
    model = fitted(features, prior=prior * np.float32(1.008))
    assert_agrees(model, reference.solve(features, log_of(prior)))


def test_prior_logits(problem):
    features, _, _ = problem()
    logits = 3 * np.random.default_rng(1).normal(size=(77, 6)).astype(np.float32) + 500
    model = fitted(features, prior_logits=logits)
    log_y = reference.log_softmax(logits.astype(np.float64))
    assert_agrees(model, reference.solve(features, log_y))


def test_prototypes_are_the_prior_and_text_only_the_zero_shot_column(problem):
    features, text, _ = problem()
    prototypes = unit(text + 0.05 * np.random.default_rng(1).normal(size=text.shape))
    prototypes = prototypes.astype(np.float32)
    model = fitted(features, text, prototypes=prototypes)
    assert_agrees(model, reference.zero_shot(features, prototypes))
    zero_shot = np.exp(zero_shot_log_prior(features, text))
    np.testing.assert_array_equal(model.zero_shot_labels_, zero_shot.argmax(1))
    np.testing.assert_allclose(model.zero_shot_confidences_, zero_shot.max(1), rtol=1e-5)
    assert (zero_shot_log_prior(features, prototypes).argmax(1) != zero_shot.argmax(1)).any()


def test_rows_off_the_sphere_are_normalised_with_a_warning(problem):
    features, prototypes, _ = problem()
    scales = np.random.default_rng(0).uniform(0.5, 20, size=(77, 1)).astype(np.float32)
    with pytest.warns(UserWarning, match="X: 77 of 77 rows were not unit vectors"):
        model = fitted(features * scales, prototypes)
    assert_agrees(model, reference.zero_shot(features, prototypes))


# -- few-shot


@pytest.mark.parametrize("gamma", [0.0, *reference.GAMMAS])
def test_few_shot_at_every_gamma(problem, gamma):
    features, prototypes, support, labels = few_shot_problem(problem)
    model = TransCLIP(device="cpu", gamma=gamma)
    model.fit(features, prototypes, support_features=support, support_labels=labels)
    run = reference.few_shot(features, prototypes, support, labels, gamma=gamma)
    assert_agrees(model, run)
    assert model.gamma_ == gamma


@pytest.mark.filterwarnings("ignore:.*_labels. zero-shot labels match")
def test_gamma_is_the_best_on_the_validation_rows(problem):
    chosen = set()
    for seed in range(12):
        features, prototypes, labels = problem(n=120, k=12, d=16, seed=seed, noise=0.05)
        shots = balanced(labels, 2)
        others = np.setdiff1d(np.random.default_rng(seed).permutation(120), shots)
        held, queries = np.split(np.random.default_rng(seed).permutation(others), [36])
        validation = features[held], labels[held].copy()
        if seed % 2:  # wrong shots: the less weight the better
            labels[shots] = np.roll(labels[shots], 1)
        model = fitted(
            features[queries],
            prototypes,
            support_features=features[shots],
            support_labels=labels[shots],
            validation_features=validation[0],
            validation_labels=validation[1],
        )
        run = reference.few_shot(
            features[queries], prototypes, features[shots], labels[shots], validation=validation
        )
        assert model.gamma_ == run.gamma
        assert_agrees(model, run)
        chosen.add(run.gamma)
    assert len(chosen) > 1, chosen


def test_validation_chooses_nothing_where_gamma_is_given(problem):
    features, prototypes, support, labels = few_shot_problem(problem)
    shots = {"support_features": support, "support_labels": labels}
    model = TransCLIP(device="cpu", gamma=0.2)
    model.fit(
        features, prototypes, **shots, validation_features=support, validation_labels=labels
    )  # fmt: skip
    assert model.gamma_ == 0.2
    assert_agrees(model, reference.few_shot(features, prototypes, support, labels, gamma=0.2))


# -- new rows


@pytest.mark.parametrize("few_shot", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_predict_proba(problem, few_shot, linear):
    features, prototypes, support, labels = few_shot_problem(problem)
    new, _, _ = problem(n=30, seed=1)
    given, given_new = probabilities(len(features), 6), probabilities(30, 6, seed=1)
    shots = {"support_features": support, "support_labels": labels} if few_shot else {}
    model = TransCLIP(device="cpu", gamma=0.01)
    if linear:
        model.fit(features, prototypes, **shots)
        z, log_y = model.predict_proba(new), zero_shot_log_prior(new, prototypes)
    else:
        model.fit(features, prior=given, **shots)
        z, log_y = model.predict_proba(new, prior=given_new), log_of(given_new)
    own = zero_shot_log_prior(features, prototypes) if linear else log_of(given)
    shots = {"support": support, "labels": labels, "gamma": 0.01} if few_shot else {}
    run = reference.solve(features, own, **shots)
    expected = reference.predict(new, run, log_y, 0.5 if few_shot else 1.0)
    assert z.dtype == np.float32
    np.testing.assert_allclose(z, expected, rtol=0, atol=1e-5)
    if not linear:
        logits = log_of(given_new).clip(-1000)
        np.testing.assert_allclose(model.predict_proba(new, prior_logits=logits), z, atol=1e-6)


def test_new_rows_are_those_of_the_fit(problem):
    """Whatever parameters are set later; with a prior they are scored with one, too."""
    features, prototypes, labels = problem()
    model = fitted(features, prototypes)
    before = model.predict_proba(features)
    model.set_params(likelihood_weight=5.0, kl_weight=0.1)
    np.testing.assert_array_equal(model.predict_proba(features), before)
    prior = probabilities(77, 6)
    given = fitted(features, prototypes, prior=prior)
    expected = (given.predict(features, prior=prior) == labels).mean()
    assert given.score(features, labels, prior=prior) == pytest.approx(expected)


def test_predict_proba_errors(problem):
    features, prototypes, _ = problem()
    prior = probabilities(77, 6)
    with pytest.raises(InputError, match="call fit first"):
        TransCLIP().predict_proba(features)
    linear = fitted(features, prototypes)
    with pytest.raises(InputError, match="prior from texts or prototypes; give none here"):
        linear.predict_proba(features, prior=prior)
    with pytest.raises(InputError, match=r"^X: has 32 columns, expected 33"):
        linear.predict_proba(unit(features[:, :32]))
    given = fitted(features, prototypes, prior=prior)
    with pytest.raises(InputError, match="give prior or prior_logits again"):
        given.predict_proba(features)
    with pytest.raises(InputError, match="has 5 classes, the fit 6"):
        given.predict_proba(features, prior=probabilities(77, 5))
    with pytest.raises(InputError, match="give one of prior and prior_logits, not both"):
        given.predict_proba(features, prior=prior, prior_logits=prior)
    with pytest.raises(InputError, match="^tensors: call fit first"):
        TransCLIP().tensors()


# -- arrays


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_arrays_of_any_float_type(problem, kind, dtype):
    features, prototypes, support, labels = few_shot_problem(problem)
    arrays = [a.astype(dtype) for a in (features, prototypes, support)]
    run = reference.few_shot(*arrays, labels, gamma=0.02)
    given = [*arrays, labels]
    if kind == "torch":
        given = [torch.from_numpy(a) for a in given]
        given[0].requires_grad_()
    else:
        for a in given:
            a.setflags(write=False)
    before = [a.detach().numpy().copy() if kind == "torch" else a.copy() for a in given]
    model = TransCLIP(device="cpu", gamma=0.02)
    model.fit(given[0], given[1], support_features=given[2], support_labels=given[3])
    assert_agrees(model, run)
    for a, b in zip(given, before, strict=True):
        np.testing.assert_array_equal(a.detach().numpy() if kind == "torch" else a, b)


@pytest.mark.parametrize("name", ["prior", "prior_logits"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_priors_of_any_float_type_are_not_modified(problem, name, dtype):
    features, _, _ = problem()
    prior = probabilities(77, 6).astype(dtype) * (4 if name == "prior_logits" else 1)
    before = prior.copy()
    model = fitted(features, **{name: prior})
    np.testing.assert_array_equal(prior, before)
    log_y = log_of(prior / prior.astype(np.float64).sum(1, keepdims=True))
    if name == "prior_logits":
        log_y = reference.log_softmax(prior.astype(np.float64))
    assert_agrees(model, reference.solve(features, log_y))


@pytest.mark.parametrize("linear", [False, True])
def test_repeated_runs_are_bit_identical(problem, linear):
    features, prototypes, support, labels = few_shot_problem(problem)
    shots = {"support_features": support, "support_labels": labels}
    prior = {} if linear else {"prior": probabilities(len(features), 6)}
    model = TransCLIP(device="cpu", gamma=0.02)

    def result(rows):
        model.fit(rows, prototypes, **prior, **shots)
        return [getattr(model, name) for name in ("label_distributions_", "means_", "objective_")]

    shifted = np.empty(features.size + 1, np.float32)[1:].reshape(features.shape)
    shifted[:] = features
    first = result(features)
    for again in (result(features), result(shifted), result(np.asfortranarray(features))):
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)


# -- graphs


def test_a_given_graph_is_used_cut_to_its_best(problem):
    features, prototypes, _ = problem()
    graph = build_graph(features, 9)
    for array in (graph.neighbors, graph.similarities):
        array.setflags(write=False)
    run = reference.zero_shot(features, prototypes)
    assert_agrees(fitted(features, prototypes, graph=graph), run)
    seen = []
    model = fitted(features, prototypes, graph=lambda rows: seen.append(rows) or graph)
    assert_agrees(model, run)
    np.testing.assert_array_equal(seen[0][:], features)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no text features and no prior"),
        ({"prior": 1, "prototypes": 1}, "give one of prior, prior_logits and prototypes"),
        ({"text": 1, "support_features": 1}, "support_features and support_labels come together"),
        ({"text": 1, "support_labels": 1}, "support_features and support_labels come together"),
        ({"text": 1, "validation_labels": 1}, "validation_features and validation_labels come"),
        ({"prior": 1, "text": 5}, "^text_features: has 5 classes, the prior 6$"),
        ({"text": 1, "graph": 1}, "^graph: lists have 2 neighbours, 3 are needed"),
    ],
)
def test_incomplete_or_contradicting_arguments(problem, arguments, message):
    features, prototypes, support, labels = few_shot_problem(problem)
    text = prototypes[: arguments.get("text", 0)] if arguments.get("text", 0) > 1 else prototypes
    values = {
        "text": text,
        "prior": probabilities(len(features), 6),
        "prototypes": prototypes,
        "support_features": support,
        "support_labels": np.arange(len(support)) % 6,
        "validation_labels": labels,
        "graph": build_graph(features, 2),
    }
    given = {name: values[name] for name in arguments}
    text = given.pop("text", None)
    with pytest.raises(InputError, match=message) as error:
        fitted(features, text, **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", ["100", None, [1.0]])
def test_parameters_are_checked_before_arrays(problem, scale):
    features, prototypes, _ = problem()
    with pytest.raises(InputError, match="logit_scale must be a finite number >= 0"):
        TransCLIP(device="cpu", logit_scale=scale).fit(features, prototypes)


def test_text_features_of_different_lengths(problem):
    features, _, _ = problem()
    with pytest.raises(InputError, match="^text_features: .* rows of different lengths"):
        TransCLIP(device="cpu").fit(features, text_features=[[1.0, 0.0], [1.0]])


@pytest.mark.parametrize("gamma", [-0.1, float("nan"), float("inf")])
def test_gamma_out_of_range(gamma):
    with pytest.raises(InputError, match="gamma must be a finite number >= 0"):
        TransCLIP(gamma=gamma).check()


def test_unknown_device(problem):
    features, prototypes, _ = problem()
    with pytest.raises(InputError, match="device 'abacus' cannot be used"):
        TransCLIP(device="abacus").fit(features, prototypes)


@pytest.mark.parametrize(
    ("name", "value"),
    [("assignments", "tall"), ("precision", "bfloat16"), ("backend", "cuda")],
)
def test_what_is_not_there_yet_says_so(problem, name, value):
    features, prototypes, _ = problem()
    with pytest.raises(InputError, match=f"{name} must be one of .*, got {value!r}"):
        TransCLIP(**{name: value}).fit(features, prototypes)


@pytest.mark.parametrize("device", ["meta", "cuda:99", "abacus", None, 1.5, ["cpu"]])
def test_devices_that_are_none(problem, device):
    features, prototypes, _ = problem()
    with pytest.raises(InputError, match=rf"device {re.escape(repr(device))} cannot be used"):
        TransCLIP(device=device).fit(features, prototypes)


@pytest.mark.parametrize("assignments", ["dense", "sparse"])
def test_inference_mode_and_another_default_type(problem, assignments):
    """What people have around an encoder changes nothing."""
    features, prototypes, _ = problem(n=1200)
    model = TransCLIP(device="cpu", assignments=assignments).fit(features, prototypes)
    new = model.predict_proba(features[:9])
    with torch.inference_mode():
        inside = TransCLIP(device="cpu", assignments=assignments).fit(features, prototypes)
        np.testing.assert_array_equal(inside.predict_proba(features[:9]), new)
    try:
        torch.set_default_dtype(torch.float64)
        double = TransCLIP(device="cpu", assignments=assignments).fit(features, prototypes)
    finally:
        torch.set_default_dtype(torch.float32)
    for other in (inside, double):
        np.testing.assert_array_equal(other.transduction_, model.transduction_)
        np.testing.assert_allclose(other.means_, model.means_, atol=1e-6)


def test_verbose_shows_a_bar_and_still_reports(problem, monkeypatch):
    shown, reported = [], []

    @contextmanager
    def bar(name, unit):
        yield lambda done, total, **figures: shown.append((name, unit, done, total, figures))

    monkeypatch.setattr("transclip_fast.estimator.progress_bar", bar)
    features, prototypes, _ = problem()
    model = TransCLIP(device="cpu", verbose=True)
    model.fit(features, text_features=prototypes, progress=reported.append)
    assert len(shown) == len(reported) > 10
    name, unit, done, total, figures = shown[-1]
    assert (name, unit, done) == ("solve", "rows", total)
    assert figures["step"] == "10/10"
    shown.clear()
    TransCLIP(device="cpu").fit(features, text_features=prototypes)
    assert shown == []


@pytest.mark.parametrize("method", [TransCLIP, METHODS["laplacianshot"]])
def test_warnings_are_about_the_line_that_called(method, problem):
    features, prototypes, labels = problem()
    shots = {"support_features": 2 * features, "support_labels": labels}
    with pytest.warns(UserWarning, match="unit vectors") as found:
        method(device="cpu").fit(3 * features, 4 * prototypes, **shots)
    assert {warning.filename for warning in found} == {__file__}
    about = {str(warning.message).partition(":")[0] for warning in found}
    assert about >= {"X", "support_features"}
