"""Whole fits: on the kernels alone, against the reference, and the same twice."""

import numpy as np
import pytest

from tests import reference
from tests.ordered_sums import OrderedSums
from transclip_fast import TransCLIP, build_graph
from transclip_fast.kernels import messages
from transclip_fast.ops.torch_backend import TorchOps

STEPS = {"max_iter": 2, "inner_iter": 2}
OVERRIDDEN = ("start", "score", "sweep", "class_sums", "row_energies")


@pytest.fixture(autouse=True)
def no_torch_operations(monkeypatch):
    """The torch operations raise: nothing may fall back to them."""

    def refuse(*_, **__):
        raise AssertionError("a torch operation was called")

    for name in OVERRIDDEN:
        monkeypatch.setattr(TorchOps, name, refuse)


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch):
    """The interpreter's time is that of the programs, whatever their size."""
    monkeypatch.setattr(messages, "LAUNCHES", {16: (64, 1), 32: (64, 1)})


def whole(model):
    z = model.label_distributions_
    return z if isinstance(z, np.ndarray) else z.toarray()


def on_kernels(**values):
    return TransCLIP(device="cpu", backend="triton", **{**STEPS, **values})


def test_zero_shot(problem):
    features, prototypes, _ = problem(n=40)
    run = reference.zero_shot(features, prototypes, reference.Parameters(**STEPS))
    model = on_kernels().fit(features, prototypes)
    again = on_kernels().fit(features, prototypes)
    assert model.backend_ == "triton"
    # What is below 1e-4 is left out.
    np.testing.assert_allclose(whole(model), run.z, atol=2e-4)
    np.testing.assert_array_equal(model.transduction_, run.z.argmax(1))
    np.testing.assert_allclose(model.variances_, run.variances, rtol=1e-3)
    for name in ("means_", "variances_", "objective_", "zero_shot_confidences_"):
        np.testing.assert_array_equal(getattr(model, name), getattr(again, name))
    np.testing.assert_array_equal(whole(model), whole(again))


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_class_cost(problem, precision):
    features, prototypes, _ = problem(n=40)
    run = reference.zero_shot(features, prototypes, reference.Parameters(class_cost=True, **STEPS))
    model = on_kernels(class_cost=True, precision=precision).fit(features, prototypes)
    atol = 2e-4 if precision == "float32" else 0.02
    np.testing.assert_allclose(whole(model), run.z, atol=atol)


def test_known_labels(problem):
    features, prototypes, labels = problem(n=40)
    known = np.where(np.arange(40) < 6, (labels + 1) % 6, -1)
    parameters = reference.Parameters(class_cost=True, **STEPS)
    run = reference.zero_shot(features, prototypes, parameters, known)
    model = on_kernels(class_cost=True).fit(features, prototypes, known_labels=known)
    np.testing.assert_allclose(whole(model), run.z, atol=2e-4)
    np.testing.assert_array_equal(whole(model)[:6], np.eye(6)[known[:6]])


def test_few_shot(problem):
    """With sums in a fixed order: on a GPU two runs give the same bits."""
    features, prototypes, labels = problem(n=40)
    queries, shots, classes = features[10:], features[:10], labels[:10]
    parameters = reference.Parameters(**STEPS)
    run = reference.few_shot(queries, prototypes, shots, classes, gamma=0.02, parameters=parameters)
    model, graph = on_kernels(gamma=0.02), build_graph(queries, 3)
    with OrderedSums():
        model.fit(queries, prototypes, support_features=shots, support_labels=classes, graph=graph)
    np.testing.assert_allclose(whole(model), run.z, atol=2e-4)


@pytest.mark.parametrize("kind", ["prior", "prior_logits"])
def test_given_prior(problem, kind):
    """Probabilities in rows, logits in columns, as some files have them."""
    features, prototypes, _ = problem(n=40)
    log_y = reference.log_prior(features.astype(np.float64), prototypes.astype(np.float64))
    log_y[:20, 2] = -80
    log_y = reference.log_softmax(log_y)
    run = reference.solve(features, log_y, parameters=reference.Parameters(**STEPS))
    given = np.asarray(log_y, order="F") if kind == "prior_logits" else np.exp(log_y)
    model = on_kernels().fit(features, **{kind: given})
    np.testing.assert_allclose(whole(model), run.z, atol=2e-4)


def test_golden_rows(golden):
    """Every 32nd row of each golden set, of all classes, in one outer step of one sweep."""
    features = golden["image_features"][::32].astype(np.float32)
    texts = golden["text_features"].astype(np.float32)
    run = reference.zero_shot(features, texts, reference.Parameters(max_iter=1, inner_iter=1))
    model = on_kernels(max_iter=1, inner_iter=1).fit(features, texts)
    np.testing.assert_array_equal(model.transduction_, run.z.argmax(1))
    np.testing.assert_allclose(whole(model), run.z, atol=5e-4)


def test_float16(problem):
    features, prototypes, _ = problem(n=40)
    run = reference.zero_shot(features, prototypes, reference.Parameters(**STEPS))
    model = on_kernels(precision="float16").fit(features, prototypes)
    np.testing.assert_array_equal(model.transduction_, run.z.argmax(1))
    np.testing.assert_allclose(whole(model), run.z, atol=0.02)


@pytest.mark.filterwarnings("ignore:n_neighbors")
def test_one_row_and_one_class():
    row = np.ones((1, 4), np.float32) / 2
    model = on_kernels().fit(row, row)
    assert model.transduction_.tolist() == [0]
    np.testing.assert_allclose(whole(model), 1)
