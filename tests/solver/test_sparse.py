"""Sparse assignments through the whole solver: nothing dropped, and only the smallest dropped."""

import sys

import numpy as np
import pytest
import torch
from scipy import sparse

from tests import reference
from tests.agreement import assert_agrees
from tests.solver.test_loop import GAMMA, few_shot_problem
from transclip_fast import InputError, TransCLIP
from transclip_fast.ops.torch_backend import TorchOps
from transclip_fast.solver import layout
from transclip_fast.solver import truncation as truncation_module
from transclip_fast.solver.truncation import choose_truncation, needed_candidates

BACKENDS = ("torch", "numba")
pytestmark = pytest.mark.filterwarnings("ignore:sparse assignments keep")


def everything(k, **values):
    """A sparse model that keeps all K classes."""
    return TransCLIP(assignments="sparse", candidates=k, rank=k, device="cpu", **values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("few_shot", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"max_iter": 0},
        {"kl_weight": 0.0},
        {"logit_scale": 30.0, "n_neighbors": 7},
        {"unit_means": False, "likelihood_weight": 0.1},
        {"graph_mode": "directed", "covariance": "isotropic"},
        {"update_means": False, "update_variance": False},
    ],
    ids=str,
)
def test_all_classes_kept_is_the_dense_method(problem, backend, few_shot, values):
    parameters = reference.Parameters(**values)
    model = everything(6, backend=backend, **values)
    if few_shot:
        features, prototypes, support, labels = few_shot_problem(problem)
        model.gamma = GAMMA
        model.fit(features, prototypes, support_features=support, support_labels=labels)
        run = reference.few_shot(features, prototypes, support, labels, GAMMA, None, parameters)
    else:
        features, prototypes, _ = problem()
        model.fit(features, prototypes)
        run = reference.zero_shot(features, prototypes, parameters)
    assert model.backend_ == backend
    assert model.truncation_["floor"] == 0
    assert_agrees(model, run)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("logits", [False, True])
def test_given_priors(problem, backend, logits):
    features, prototypes, _ = problem()
    log_prior = reference.log_prior(features.astype(np.float64), prototypes.astype(np.float64))
    log_prior[5, 2:] = -np.inf
    log_prior = reference.log_softmax(log_prior)
    given = {"prior_logits": log_prior} if logits else {"prior": np.exp(log_prior)}
    if logits:
        given["prior_logits"] = np.where(np.isfinite(log_prior), log_prior, -1e4)
    model = everything(6, backend=backend).fit(features, **given)
    dense = TransCLIP(device="cpu", assignments="dense").fit(features, **given)
    found = model.label_distributions_.toarray()
    np.testing.assert_allclose(found, dense.label_distributions_, atol=1e-5)
    np.testing.assert_allclose(model.objective_, dense.objective_, rtol=1e-5)
    np.testing.assert_array_equal(model.zero_shot_labels_, dense.zero_shot_labels_)
    np.testing.assert_allclose(model.zero_shot_confidences_, dense.zero_shot_confidences_, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("candidates", "rank"), [(None, None), (8, 4)])
def test_golden_labels_are_the_dense_ones(golden, backend, candidates, rank):
    features, text = golden["image_features"], golden["text_features"]
    model = TransCLIP(
        device="cpu", assignments="sparse", candidates=candidates, rank=rank, backend=backend
    ).fit(features, text)
    expected = golden["official_assignments"].argmax(1)
    if candidates is None:
        np.testing.assert_array_equal(model.transduction_, expected)
    else:
        assert (model.transduction_ == expected).mean() >= 0.999


@pytest.mark.parametrize("logit_scale", [30.0, 100.0])
def test_real_features_with_more_classes(golden_dir, logit_scale):
    """Pets and dtd together: 84 classes, prototypes from the validation images."""
    features, prototypes = [], []
    for name in ("oxford_pets", "dtd"):
        with np.load(golden_dir / f"{name}_vitb32.npz", allow_pickle=False) as file:
            rows, labels = file["val_features"].astype(np.float32), file["val_labels"]
            features.append(file["test_features"].astype(np.float32))
        prototypes += [rows[labels == k].mean(0) for k in range(labels.max() + 1)]
    features, prototypes = np.concatenate(features), reference.unit(np.array(prototypes))
    dense = TransCLIP(device="cpu", logit_scale=logit_scale, assignments="dense")
    dense.fit(features, prototypes)
    model = TransCLIP(device="cpu", logit_scale=logit_scale, candidates=32)
    model.fit(features, prototypes, graph=dense.graph_)
    assert (model.transduction_ == dense.transduction_).mean() >= 0.999
    assert model.truncation_["mean_bound"] < 1e-4
    np.testing.assert_allclose(model.variances_, dense.variances_, rtol=1e-2)


@pytest.fixture
def soft(problem):
    """A problem of 60 classes whose rows spread over many."""
    return problem(n=300, k=60, d=40, noise=0.1)[:2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_csr(soft, backend):
    model = TransCLIP(device="cpu", candidates=20, rank=9, backend=backend).fit(*soft)
    z = model.label_distributions_
    assert isinstance(z, sparse.csr_array)
    assert z.shape == (300, 60)
    assert z.dtype == np.float32
    assert z.has_canonical_format
    assert np.diff(z.indptr).max() == 9
    assert (z.data > 0).all()
    mass = z.sum(1)
    assert (mass <= 1 + 1e-5).all()
    assert (mass > 0.3).all()
    np.testing.assert_array_equal(model.transduction_, z.toarray().argmax(1))


def test_backends_agree(soft):
    models = [
        TransCLIP(device="cpu", candidates=20, rank=9, backend=backend).fit(*soft)
        for backend in BACKENDS
    ]
    first, second = (model.label_distributions_.toarray() for model in models)
    np.testing.assert_allclose(first, second, atol=1e-5)
    np.testing.assert_allclose(models[0].objective_, models[1].objective_, rtol=1e-6)
    for name in ("tail_mass", "largest_bound", "mean_bound"):
        assert models[0].truncation_[name] == pytest.approx(models[1].truncation_[name], rel=1e-3)


def test_what_truncation_lost_is_reported(soft):
    dense = TransCLIP(device="cpu", assignments="dense").fit(*soft)
    tails = []
    for candidates in (10, 20, 40):
        model = TransCLIP(device="cpu", candidates=candidates).fit(*soft, graph=dense.graph_)
        found = model.truncation_
        assert found["candidates"] == found["rank"] == candidates
        assert 0 < found["mean_bound"] <= found["largest_bound"] <= 1
        tails.append(found["tail_mass"])
    assert tails[0] > tails[1] > tails[2] > 0
    assert dense.truncation_ is None


def test_much_dropped_is_reported(soft):
    with pytest.warns(UserWarning, match=r"sparse assignments keep \d+ % of the mass only; raise"):
        model = TransCLIP(device="cpu", candidates=5).fit(*soft)
    dropped = 1 - model.label_distributions_.sum(1).mean()
    assert model.truncation_["mean_dropped"] == pytest.approx(dropped, rel=1e-5)


def test_the_tail_keeps_means_and_variances(soft):
    """Without it the variance would be off by the dropped share of the squares."""
    dense = TransCLIP(device="cpu", assignments="dense", max_iter=1).fit(*soft)
    model = TransCLIP(device="cpu", candidates=20, max_iter=1).fit(*soft)
    dropped = 1 - model.label_distributions_.sum(1).mean()
    assert dropped > 0.01
    np.testing.assert_allclose(model.variances_, dense.variances_, rtol=0.02)


def test_measured_candidates():
    """As many as the mean row needs, within what there is room for; for few rows what is small."""
    mass = 0.5 ** np.arange(1, 301)
    sharp = torch.from_numpy(np.log(mass))[None].repeat(3, 1)
    flat = torch.full((3, 300), -np.log(300.0))
    for sample, n_rows, most, expected in (
        (sharp, 10**6, 128, 32),
        (flat, 10**6, 128, 128),
        (flat, 1000, 699, 300),
        (flat, 10**6, 40, 40),
        (flat[:, :7], 10**6, 128, 7),
    ):
        assert needed_candidates(sample, n_rows, most) == expected


@pytest.mark.parametrize(("kl_weight", "expected"), [(1.0, 32), (0.1, 64), (0.0, 128)])
def test_candidates_are_measured_on_the_weighted_prior(kl_weight, expected, monkeypatch):
    monkeypatch.setattr(truncation_module, "FREE_LIST_BYTES", 1)
    log_prior = np.log(0.5 ** np.arange(1, 301))[None].repeat(50, 0)
    sample = torch.from_numpy(reference.log_softmax(log_prior)).float()
    found = choose_truncation(kl_weight * sample, 50, most=128)
    assert found.candidates == expected


def test_auto_is_dense_where_that_is_faster(problem, monkeypatch):
    features, prototypes, _ = problem()
    assert TransCLIP(device="cpu").fit(features, prototypes).truncation_ is None
    monkeypatch.setattr(layout, "DENSE_ENTRIES", 0)
    monkeypatch.setitem(layout.DENSE_CLASSES, "cpu", 5)
    model = TransCLIP(device="cpu").fit(features, prototypes)
    assert model.truncation_ is not None
    assert model.backend_ == "numba"
    assert (
        TransCLIP(device="cpu", assignments="dense").fit(features, prototypes).backend_ == "torch"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"candidates": 0}, "candidates must be a whole number >= 1, got 0"),
        ({"rank": 2.5}, "rank must be a whole number >= 1, got 2.5"),
        ({"candidates": 3, "rank": 4}, "rank=4 is more than candidates=3"),
        ({"assignments": "dense", "rank": 4}, "rank: dense assignments keep every class"),
        ({"assignments": "dense", "backend": "numba"}, "backend='numba' has no dense assignments"),
    ],
    ids=str,
)
def test_bad_parameters(problem, values, message):
    features, prototypes, _ = problem()
    with pytest.raises(InputError, match=message):
        TransCLIP(device="cpu", **values).fit(features, prototypes)


def test_without_numba(soft, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(InputError, match="backend='numba': .*pip install numba"):
        TransCLIP(device="cpu", candidates=20, backend="numba").fit(*soft)
    model = TransCLIP(device="cpu", candidates=20)
    with pytest.warns(UserWarning, match="computed in torch, slower: .*pip install numba"):
        model.fit(*soft)
    assert model.backend_ == "torch"


def test_threads_of_torch_are_as_before(soft):
    before = torch.get_num_threads()
    seen = []
    model = TransCLIP(device="cpu", candidates=20, max_iter=2)
    model.fit(*soft, progress=lambda _: seen.append(torch.get_num_threads()))
    assert torch.get_num_threads() == before
    assert set(seen) == {1}


def test_the_bound_is_that_of_the_last_sweep(problem, monkeypatch):
    """A backend may leave it out everywhere else."""
    features, prototypes, _ = problem()
    settings = {"device": "cpu", "backend": "torch", "candidates": 3, "rank": 3}
    expected = TransCLIP(**settings).fit(features, prototypes).truncation_
    sweep, seen = TorchOps.sweep, []

    def lazy(self, base, z, *, out, bounded=True):
        seen.append(bounded)
        sweep(self, base, z, out=out, bounded=bounded)
        if not bounded:
            out.bound.fill_(torch.nan)
        return out

    monkeypatch.setattr(TorchOps, "sweep", lazy)
    assert TransCLIP(**settings).fit(features, prototypes).truncation_ == expected
    assert expected["largest_bound"] > 0
    assert seen == [False] * (len(seen) - 1) + [True]
