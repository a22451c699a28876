"""Every parameter of the solver against the float64 reference."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from tests import reference
from tests.agreement import assert_agrees
from transclip_fast import InputError, TransCLIP
from transclip_fast.solver.loop import passes_before, solve
from transclip_fast.solver.parameters import Parameters

GAMMA = 0.02


def few_shot_problem(problem, seed=0):
    """Unbalanced shots, none of the last class."""
    features, prototypes, labels = problem(n=97, seed=seed)
    shots = np.concatenate([np.flatnonzero(labels == k)[:n] for k, n in enumerate((5, 1, 3, 2, 1))])
    queries = np.setdiff1d(np.arange(97), shots)
    return features[queries], prototypes, features[shots], labels[shots]


def fit_both(problem, few_shot, values, seed=0):
    """The model and the reference run, both with the given parameter values."""
    model, parameters = TransCLIP(device="cpu", **values), reference.Parameters(**values)
    if not few_shot:
        features, prototypes, _ = problem(seed=seed)
        model.fit(features, prototypes)
        return model, reference.zero_shot(features, prototypes, parameters)
    features, prototypes, support, labels = few_shot_problem(problem, seed)
    model.gamma = GAMMA
    model.fit(features, prototypes, support_features=support, support_labels=labels)
    return model, reference.few_shot(
        features, prototypes, support, labels, gamma=GAMMA, parameters=parameters
    )


@pytest.mark.parametrize("few_shot", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_defaults(problem, few_shot, seed):
    model, run = fit_both(problem, few_shot, {}, seed)
    assert_agrees(model, run)
    assert model.n_iter_ == 10
    assert len(model.objective_) == 11
    assert model.gamma_ == run.gamma
    assert model.kl_weight_ == (0.5 if few_shot else 1.0)


@pytest.mark.parametrize("few_shot", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        {"n_neighbors": 1},
        {"n_neighbors": 7},
        {"max_iter": 0},
        {"max_iter": 1},
        {"inner_iter": 1},
        {"inner_iter": 2},
        {"logit_scale": 30.0},
        {"kl_weight": 0.0},
        {"kl_weight": 0.3},
        {"likelihood_weight": 0.0},
        {"likelihood_weight": 0.1},
        {"likelihood_weight": 1.0},
        {"unit_means": False},
        {"update_means": False},
        {"update_variance": False},
        {"update_means": False, "update_variance": False},
        {"covariance": "isotropic"},
        {"graph_mode": "directed"},
        {"graph_mode": "directed", "n_neighbors": 5, "unit_means": False, "kl_weight": 0.7},
    ],
    ids=str,
)
def test_each_parameter(problem, few_shot, values):
    model, run = fit_both(problem, few_shot, values)
    _, default = fit_both(problem, few_shot, {})
    assert np.abs(run.z - default.z).max() > 1e-4  # the parameter does something here
    assert_agrees(model, run)


@pytest.mark.parametrize("few_shot", [False, True])
@pytest.mark.parametrize("clamp", [False, True])
def test_negative_similarities(few_shot, clamp):
    """Random directions have neighbours with negative cosines, and clamping drops those."""
    rng = np.random.default_rng(3)
    rows = reference.unit(rng.normal(size=(40, 4))).astype(np.float32)
    features, prototypes, support = rows[:30], rows[30:34], rows[34:]
    labels = np.array([0, 0, 1, 2, 2, 2])
    values = {"n_neighbors": 20, "logit_scale": 5.0, "clamp_similarity": clamp}
    model = TransCLIP(device="cpu", gamma=GAMMA, **values)
    parameters = reference.Parameters(**values)
    if few_shot:
        model.fit(features, prototypes, support_features=support, support_labels=labels)
        run = reference.few_shot(
            features, prototypes, support, labels, gamma=GAMMA, parameters=parameters
        )
    else:
        model.fit(features, prototypes)
        run = reference.zero_shot(features, prototypes, parameters)
    assert (model.graph_.similarities < 0).any()
    assert_agrees(model, run)


@pytest.mark.parametrize("few_shot", [False, True])
def test_objective_falls_with_plain_means(problem, few_shot):
    model, _ = fit_both(problem, few_shot, {"unit_means": False})
    assert np.diff(model.objective_).max() <= 1e-6 * len(model.transduction_)
    assert model.objective_[0] - model.objective_[-1] > 0.5


def test_tol_stops_when_the_objective_changes_less(problem):
    model, run = fit_both(problem, False, {"unit_means": False})
    changes = np.abs(np.diff(run.objective[:10])) / 77  # of steps 2 to 10
    model.tol = float(np.sqrt(changes[2] * changes[3]))  # first met by the 5th step
    assert changes[3] < 0.9 * model.tol < 0.8 * changes[2]
    features, prototypes, _ = problem()
    model.fit(features, prototypes)
    assert model.n_iter_ == 5
    assert_agrees(model, fit_both(problem, False, {"unit_means": False, "max_iter": 5})[1])


@pytest.mark.parametrize(
    ("few_shot", "class_cost", "more"),
    [(False, False, 0), (False, True, 1), (True, False, 0), (True, True, 2)],
)
def test_passes_over_the_features(problem, few_shot, class_cost, more, monkeypatch):
    """As `solve` says: before the first step, in each one, and at the end."""
    features, prototypes, labels = problem(n=2000)
    shots = {"support_features": features[:60], "support_labels": labels[:60]} if few_shot else {}
    model = TransCLIP(device="cpu", max_iter=2, class_cost=class_cost, gamma=GAMMA)
    read = []

    def counted(inputs, *rest, **options):
        inputs.features.on_read = read.append
        return solve(inputs, *rest, **options)

    monkeypatch.setattr("transclip_fast.solver.runs.solve", counted)
    model.fit(features, text_features=prototypes, **shots)
    passes = sum(read) / len(features)  # blocks of sums share some rows
    assert passes == pytest.approx(passes_before(linear=True) + 2 * (2 + 1) + more, abs=0.3)


def test_progress_reports_rows_and_steps(problem):
    features, prototypes, _ = problem()
    seen = []
    model = TransCLIP(device="cpu", max_iter=4).fit(features, prototypes, progress=seen.append)
    steps = [new for old, new in pairwise(seen) if new.steps > old.steps]
    assert [state.steps for state in steps] == [1, 2, 3, 4]
    assert [state.objective for state in steps] == [model.objective_[i] / 77 for i in range(4)]
    assert [state.rows for state in steps] == [77 * passes for passes in (4, 6, 8, 10)]
    assert seen[-1].rows == seen[-1].all_rows == 77 * 12
    assert all(old.rows <= new.rows for old, new in pairwise(seen))


def test_progress_tells_how_many_labels_a_step_changed(problem):
    features, prototypes, _ = problem(noise=0.1)
    seen = []
    TransCLIP(device="cpu", max_iter=1).fit(features, prototypes, progress=seen.append)
    # The sweeps of the first step, and those of a run without steps.
    labels = TransCLIP(device="cpu", max_iter=0).fit(features, prototypes).transduction_
    before = (features.astype(float) @ prototypes.T).argmax(1)
    assert seen[-1].changed == (labels != before).sum() > 0


def test_the_history_tells_how_many_labels_each_step_changed(problem):
    features, prototypes, _ = problem(noise=0.1)
    model = TransCLIP(device="cpu", max_iter=3, tol=0).fit(features, prototypes)
    # z after the update that step i begins with is that of a run that ends with step i - 1.
    labels = [(features.astype(float) @ prototypes.T).argmax(1)] + [
        TransCLIP(device="cpu", max_iter=n, tol=0).fit(features, prototypes).transduction_
        for n in range(4)
    ]
    assert model.changed_.tolist() == [int((a != b).sum()) for a, b in pairwise(labels)]
    assert model.changed_[0] > 0


def test_matmul_precision_is_highest_and_then_restored(problem):
    features, prototypes, _ = problem()
    seen = []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        TransCLIP(device="cpu", max_iter=1).fit(
            features,
            prototypes,
            progress=lambda _: seen.append(torch.get_float32_matmul_precision()),
        )
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_neighbors", 0),
        ("n_neighbors", 2.5),
        ("max_iter", -1),
        ("inner_iter", 0),
        ("tol", -1e-3),
        ("logit_scale", float("inf")),
        ("kl_weight", -0.5),
        ("likelihood_weight", float("nan")),
        ("covariance", "full"),
        ("graph_mode", "undirected"),
        ("n_neighbors", None),
        ("max_iter", None),
        ("tol", None),
        ("logit_scale", None),
        ("likelihood_weight", None),
    ],
)
def test_check_names_the_parameter_and_its_value(name, value):
    Parameters(n_neighbors=np.int64(3)).check()
    with pytest.raises(InputError, match=f"^{name} must be .*{value!r}$"):
        Parameters(**{name: value}).check()
