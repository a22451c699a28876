"""Few of the classes present: the class cost against the float64 reference."""

from itertools import pairwise
from math import exp, log

import numpy as np
import pytest
import torch

from tests import reference
from tests.agreement import assert_agrees
from tests.conftest import unit
from transclip_fast import InputError, TransCLIP
from transclip_fast.data.npy_shards import Shard, StoredRows
from transclip_fast.ops.numba_backend import NumbaOps
from transclip_fast.ops.torch_backend import TorchOps
from transclip_fast.solver import loop, state
from transclip_fast.solver.class_cost import (
    ClassCost,
    agreement,
    effective_classes,
    sharpness,
)
from transclip_fast.solver.sharpened import sharpen
from transclip_fast.store.checkpoint import FileCheckpoint
from transclip_fast.types import Assignments

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def few():
    """Maker of rows of 3 of 20 classes: features (N, d), prototypes (K, d), labels (N,)."""

    def make(n=90, k=20, seed=0, noise=0.1):
        draw = np.random.default_rng(seed)
        prototypes = unit(0.5 * draw.normal(size=(k, 24)) + 1)
        labels = draw.integers(3, size=n)
        centres = unit(prototypes + 0.3 * unit(draw.normal(size=(k, 24))))
        features = unit(centres[labels] + noise * draw.normal(size=(n, 24)))
        return features.astype(np.float32), prototypes.astype(np.float32), labels

    return make


def zero_shot_classes(features, prototypes, logit_scale=100.0):
    """K_eff of zero-shot by the reference."""
    features = features.astype(float)
    log_y = reference.log_prior(features, prototypes.astype(float), logit_scale)
    graph = reference.knn_weights(features, features, 3, True, False)
    sharp = reference.sharpness(log_y, graph) * log_y
    return reference.effective_classes(np.exp(reference.log_softmax(sharp)))


def everything(backend, **values):
    """A model that keeps all 20 classes, with dense assignments where no backend is named."""
    if backend is None:
        return TransCLIP(device="cpu", assignments="dense", **values)
    return TransCLIP(device="cpu", candidates=20, rank=20, backend=backend, **values)


@pytest.mark.parametrize("backend", [None, "torch", "numba"])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"max_iter": 0},
        {"logit_scale": 30.0, "inner_iter": 2},
        {"kl_weight": 0.5, "unit_means": False, "likelihood_weight": 0.1},
        {"update_means": False, "covariance": "isotropic", "graph_mode": "directed"},
    ],
    ids=str,
)
def test_is_the_reference(few, backend, values):
    features, prototypes, _ = few()
    model = everything(backend, class_cost=True, **values).fit(features, prototypes)
    run = reference.zero_shot(features, prototypes, reference.Parameters(class_cost=True, **values))
    assert_agrees(model, run)
    other = reference.zero_shot(
        features, prototypes, reference.Parameters(class_cost=False, **values)
    )
    assert np.abs(run.z - other.z).max() > 1e-4


@pytest.mark.parametrize("backend", [None, "torch", "numba"])
def test_priors_of_other_methods(few, backend):
    features, prototypes, _ = few()
    log_y = reference.log_prior(features.astype(float), prototypes.astype(float))
    log_y[7, 4:] = -np.inf
    log_y = reference.log_softmax(log_y)
    model = everything(backend, class_cost=True).fit(features, prior=np.exp(log_y))
    run = reference.solve(features, log_y, parameters=reference.Parameters(class_cost=True))
    assert_agrees(model, run)


def test_few_shot(few):
    """Two shots of each of 20 classes, queries of three: charged only if asked for."""
    features, prototypes, _ = few()
    labels = np.repeat(np.arange(20), 2)
    noise = np.random.default_rng(0).normal(size=(40, 24))
    support = unit(prototypes[labels] + 0.05 * noise).astype(np.float32)
    shots, runs = {"support_features": support, "support_labels": labels}, {}
    for charged in (True, False):
        runs[charged] = reference.few_shot(
            features,
            prototypes,
            support,
            labels,
            0.02,
            parameters=reference.Parameters(class_cost=charged),
        )
        for backend in (None, "torch", "numba"):
            model = everything(backend, class_cost=charged, gamma=0.02)
            assert_agrees(model.fit(features, prototypes, **shots), runs[charged])
    assert np.abs(runs[True].z - runs[False].z).max() > 0.01
    auto = TransCLIP(device="cpu", gamma=0.02).fit(features, prototypes, **shots)
    assert auto.class_costs_ is None


def test_auto_charges_below_four_fifths_of_the_classes(few, problem):
    model = TransCLIP(device="cpu")
    features, prototypes, _ = few()
    model.fit(features, prototypes)
    effective = zero_shot_classes(features, prototypes)
    assert effective < 0.8 * 20
    assert model.n_effective_classes_ == pytest.approx(effective, rel=1e-5)
    assert model.class_costs_.shape == (20,)
    for other in (TransCLIP(device="cpu", class_cost=True), TransCLIP(device="cpu")):
        other.fit(features, prototypes)
        np.testing.assert_array_equal(other.label_distributions_, model.label_distributions_)

    features, prototypes, _ = problem(n=200, noise=0.01)
    model.fit(features, prototypes)
    assert model.n_effective_classes_ > 0.8 * 6
    assert model.class_costs_ is None
    off = TransCLIP(device="cpu", class_cost=False).fit(features, prototypes)
    np.testing.assert_array_equal(off.label_distributions_, model.label_distributions_)


def test_constants_by_hand():
    """64 rows over 4 of 20 classes at d = 256: beta is 1 row, and 64 / 32 rows a class are full."""
    cost = ClassCost.of(4.0, 64, 20, 256)
    assert cost.beta == pytest.approx(1)
    assert cost.weight == pytest.approx(0.75 * 120 / 2)
    half = ClassCost.of(4.0, 16, 20, 256)  # half of 32 rows: half of the second 60
    assert half.weight == pytest.approx(0.75**1.5 * 90 / 2)
    assert ClassCost.of(16.0, 64, 20, 256).weight == 0  # nothing where "auto" begins
    many = ClassCost.of(4.0, 8000, 20, 256)
    assert many.beta == pytest.approx(0.05 * 2000)


def test_effective_classes_by_hand():
    assert effective_classes(torch.tensor([3.0, 3.0, 0.0]).double()) == pytest.approx(2)
    entropy = -(0.75 * log(0.75) + 0.25 * log(0.25))
    assert effective_classes(torch.tensor([6.0, 2.0]).double()) == pytest.approx(exp(entropy))


def test_sharpness_by_hand():
    """Two classes at odds 1 : e^-x have the odds e^-Tx, and a confidence of 1 / (1 + e^-Tx)."""
    log_y_hat = torch.tensor([[0.0, -0.4, -torch.inf]]).expand(5, 3).log_softmax(1)
    assert sharpness(log_y_hat, 1 / (1 + exp(-1.0))) == pytest.approx(2.5, rel=1e-5)
    assert sharpness(log_y_hat, 0.55) == 1  # it is more confident already
    assert sharpness(log_y_hat, 1.0) == pytest.approx(16)
    assert sharpness(log_y_hat, float("nan")) == 1  # no row has a neighbour


def test_agreement_by_hand():
    """Of three neighbours that there are, two have the label of their row."""
    found = agreement(torch.tensor([4, 0]), torch.tensor([[4, 4], [-1, 4]]))
    assert found == pytest.approx(2 / 3)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_sharpened_assignments(form):
    values = torch.tensor([[0.6, 0.3, 0.1], [1.0, 0.0, 0.0], [0.5, 1e-30, 0.5]])
    classes = None if form == "dense" else torch.tensor([[4, 2, 0], [1, 0, 0], [3, 2, 1]]).int()
    z = Assignments(values.clone(), classes, 5, torch.zeros(3))
    sharpen(z, 3.0)
    expected = values.double() ** 3
    torch.testing.assert_close(z.values.double(), expected / expected.sum(1, True))
    assert torch.equal(z.values > 0, values > 0)  # what underflows stays in use


def test_sharpened_lists_count_what_they_dropped():
    """0.4 as four classes of 0.1, which the list has, too; nothing; 0.1, less than the list has."""
    values = torch.tensor([[0.5, 0.1], [1.0, 0.0], [0.7, 0.2]])
    z = Assignments(values, torch.tensor([[4, 2], [1, 0], [3, 0]]).int(), 9, torch.zeros(3))
    expected = torch.tensor([[0.25, 0.01], [0.3, 0.0], [0.49, 0.04]])
    expected /= torch.tensor([[0.3], [0.3], [0.54]])
    torch.testing.assert_close(sharpen(z, 2.0).values, expected)


@pytest.mark.parametrize("kept", [1000, 32])
def test_a_soft_text_of_many_classes_is_sharpened(kept):
    """0.001^16 is below float32."""
    classes = None if kept == 1000 else torch.arange(32, dtype=torch.int32).repeat(3, 1)
    z = Assignments(torch.full((3, kept), 1e-3), classes, 1000, torch.zeros(3))
    torch.testing.assert_close(sharpen(z, 16.0).values, torch.full((3, kept), 1e-3))


def test_soft_text_counts_no_absent_classes(golden):
    """5 of 19 classes: divided by three, logits spread over nearly all, and few are charged for."""
    labels, text = golden["labels"], golden["text_features"]
    rows = np.isin(labels, [0, 4, 9, 13, 17])
    features = golden["image_features"][rows].astype(np.float32)
    for scale in (100.0, 33.0):
        model = TransCLIP(device="cpu", logit_scale=scale).fit(features, text)
        zero_shot = np.mean(model.zero_shot_labels_ == labels[rows])
        assert np.mean(model.transduction_ == labels[rows]) > zero_shot
        assert model.n_effective_classes_ < 0.8 * 19
        assert model.class_costs_.max() > 30


def test_the_tangent_bounds_the_cost():
    """The cost is concave in the masses: where the bound falls, so does the cost."""
    draw = torch.Generator().manual_seed(0)
    cost = ClassCost(50.0, 3.0)
    for _ in range(20):
        here, there = 10 * torch.rand(2, 7, generator=draw, dtype=torch.float64)
        bound = cost.total(here) + (cost.tangent(here) * (there - here)).sum()
        assert cost.total(there) <= bound + 1e-9
    here = torch.rand(7, generator=draw, dtype=torch.float64).requires_grad_()
    cost.total(here).backward()
    torch.testing.assert_close(here.grad, cost.tangent(here.detach()))


@pytest.mark.parametrize("seed", range(3))
def test_the_objective_does_not_rise(few, seed):
    features, prototypes, _ = few(seed=seed)
    model = TransCLIP(device="cpu", class_cost=True, unit_means=False, clamp_similarity=True)
    model.fit(features, prototypes)
    assert np.diff(model.objective_).max() <= 1e-6 * len(features)
    assert model.objective_[0] - model.objective_[-1] > 0.1


@pytest.mark.parametrize("logit_scale", [30.0, 100.0])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_short_lists_count_what_they_leave_out(problem, backend, logit_scale):
    """K_eff of lists of 8 of 60 classes is that of the whole prior, within its sample."""
    features, prototypes, _ = problem(n=700, k=60, d=40)
    model = TransCLIP(
        device="cpu", candidates=8, backend=backend, logit_scale=logit_scale, max_iter=1
    )
    with pytest.warns(UserWarning, match="raise candidates"):
        model.fit(features, prototypes)
    expected = zero_shot_classes(features, prototypes, logit_scale)
    assert model.n_effective_classes_ == pytest.approx(expected, rel=0.01)


def test_real_rows_sparse_and_dense(golden):
    """Five of nineteen classes: the same labels, and they gain where the published method loses."""
    labels, text = golden["labels"], golden["text_features"]
    rows = np.isin(labels, [0, 4, 9, 13, 17])
    features = golden["image_features"][rows].astype(np.float32)
    dense = TransCLIP(device="cpu").fit(features, text)
    model = TransCLIP(device="cpu", assignments="sparse").fit(features, text)
    assert dense.class_costs_ is not None
    assert (model.transduction_ == dense.transduction_).mean() >= 0.999
    published = TransCLIP(device="cpu", class_cost=False).fit(features, text)
    right = {
        name: np.mean(found == labels[rows])
        for name, found in (
            ("zero-shot", dense.zero_shot_labels_),
            ("published", published.transduction_),
            ("charged", dense.transduction_),
        )
    }
    assert right["published"] < right["zero-shot"] < right["charged"]


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_absent_classes_leave_the_lists(few, backend, monkeypatch):
    """From some step on only a few of 200 classes are scored, with the result of scoring all."""
    features, prototypes, _ = few(n=300, k=200, noise=0.02)
    scored = []
    own = TorchOps.score if backend == "torch" else NumbaOps.score

    def score(self, features, score, *, out):
        scored.append((len(score.offset), out.values.shape[1]))
        return own(self, features, score, out=out)

    monkeypatch.setattr(TorchOps if backend == "torch" else NumbaOps, "score", score)
    values = {"device": "cpu", "class_cost": True, "backend": backend, "candidates": 64}
    model = TransCLIP(**values).fit(features, prototypes)
    assert scored[0] == (200, 64)
    assert scored[-1][0] < 40
    assert scored[-1][1] == min(scored[-1][0], 64)
    assert all(2 * new <= old for (old, _), (new, _) in pairwise(scored) if new != old)

    monkeypatch.setattr(loop, "drop_absent_classes", lambda state: None)
    whole = TransCLIP(**values).fit(features, prototypes)
    assert scored[-1] == (200, 64)
    z, expected = (run.label_distributions_.toarray() for run in (model, whole))
    assert z.shape == (300, 200)
    # Of each row an absent class holds less than 1e-4, all of them together a little more.
    np.testing.assert_allclose(z, expected, atol=1e-3)
    np.testing.assert_array_equal(model.transduction_, whole.transduction_)
    used = np.unique(whole.transduction_)
    np.testing.assert_allclose(model.means_[used], whole.means_[used], atol=1e-3)
    np.testing.assert_allclose(model.class_costs_, whole.class_costs_, atol=0.1)
    np.testing.assert_allclose(model.objective_, whole.objective_, rtol=1e-3)


def test_a_cost_of_few_nats_drops_nothing(few, monkeypatch):
    """Such a class may come back."""
    features, prototypes, _ = few(n=300, k=200, noise=0.02)
    dropped, keep = [], state.keep_classes
    monkeypatch.setattr(state, "keep_classes", lambda *a: dropped.append(1) or keep(*a))
    model = TransCLIP(device="cpu", class_cost=True, candidates=64)
    model.fit(features, prototypes)
    assert dropped
    dropped.clear()
    monkeypatch.setattr(state, "ABSENT_NATS", 1e3)
    model.fit(features, prototypes)
    assert not dropped


def test_many_classes_leave_a_long_list():
    """Blocks of rows are longer after most of 12,000 classes have left."""
    draw = np.random.default_rng(0)
    prototypes = unit(draw.normal(size=(12_000, 64))).astype(np.float32)
    labels = draw.integers(20, size=600)
    features = unit(prototypes[labels] + 0.05 * draw.normal(size=(600, 64))).astype(np.float32)
    values = {"device": "cpu", "assignments": "sparse", "max_iter": 3}
    models = [
        TransCLIP(**values, backend=backend).fit(features, prototypes)
        for backend in ("torch", "numba")
    ]
    for model in models:
        np.testing.assert_array_equal(model.transduction_, labels)
    np.testing.assert_allclose(models[0].means_[:20], models[1].means_[:20], atol=1e-5)


@pytest.mark.parametrize("k", [20, 200])
def test_streamed_and_resumed_runs_have_the_same_bits(few, tmp_path, k):
    features, prototypes, _ = few(n=120, k=k, noise=0.02)
    np.save(tmp_path / "rows.npy", features)
    values = {"assignments": "sparse", "class_cost": True, "device": "cpu"}
    expected = TransCLIP(**values).fit(features, prototypes)
    streamed = TransCLIP(**values)
    streamed.fit(StoredRows([Shard.find(tmp_path / "rows.npy")]), prototypes)
    assert_same_run(streamed, expected)

    class Killed(Exception):
        pass

    def checkpoint(name, identity):
        return FileCheckpoint(tmp_path / "out", name, identity, 0.0)

    def kill(seen):
        if seen.steps == 4:
            raise Killed

    with pytest.raises(Killed):
        TransCLIP(**values).fit(features, prototypes, progress=kill, checkpoint=checkpoint)
    steps = []
    resumed = TransCLIP(**values).fit(
        features, prototypes, checkpoint=checkpoint, progress=lambda seen: steps.append(seen.steps)
    )
    assert min(step for step in steps if step) >= 3
    assert_same_run(resumed, expected)


def assert_same_run(model, expected):
    for name in ("transduction_", "means_", "variances_", "objective_", "class_costs_"):
        np.testing.assert_array_equal(getattr(model, name), getattr(expected, name))


def test_new_rows_are_charged_too(few):
    features, prototypes, _ = few()
    model = TransCLIP(device="cpu", class_cost=True).fit(features[:60], prototypes)
    log_y = reference.log_prior(features[60:].astype(float), prototypes.astype(float))
    g = reference.log_gaussian(features[60:].astype(float), model.means_, model.variances_)
    expected = np.exp(reference.log_softmax(g / 50 + log_y - model.class_costs_))
    np.testing.assert_allclose(model.predict_proba(features[60:]), expected, atol=1e-5)


@pytest.mark.parametrize("value", ["on", 1, None, 0.5])
def test_bad_values(value):
    with pytest.raises(InputError, match="class_cost must be 'auto', True or False"):
        TransCLIP(class_cost=value).check()


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_lists_of_few_classes_drop_nothing(few, backend):
    """Rare classes live on masses below the floor: with lists of all 20 they keep them."""
    features, prototypes, _ = few(n=64, noise=0.2)
    values = {"device": "cpu", "class_cost": True}
    dense = TransCLIP(**values, assignments="dense").fit(features, prototypes)
    model = TransCLIP(**values, assignments="sparse", backend=backend).fit(features, prototypes)
    assert model.truncation_["floor"] == 0
    found = model.label_distributions_.toarray()
    np.testing.assert_allclose(found, dense.label_distributions_, atol=1e-5)
