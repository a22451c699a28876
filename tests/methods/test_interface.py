"""What every method shares: its arrays, settings, choice, invariances and refusals."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch

from tests.conftest import balanced, make_problem
from tests.kernels.pretend_gpu import PretendGpu
from transclip_fast import InputError, TransCLIP, build_graph
from transclip_fast.methods import METHODS, StatA

pytestmark = pytest.mark.usefixtures("one_thread")

K = 5
FAST = {
    "em-dirichlet": {"max_iter": 3},
    "hard-em-dirichlet": {"max_iter": 3},
    "tim-adm": {"max_iter": 20},
    "tim-gd": {"max_iter": 20},
    "alpha-tim": {"max_iter": 20, "alpha": 2.0},
}
EVERY_METHOD = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def arrays():
    """Arguments of `fit` but the graph."""
    x, t, labels = make_problem(n=93, k=K, d=21, seed=1, noise=0.06)
    shots = balanced(labels, 2)
    others = np.setdiff1d(np.arange(len(x)), shots)
    return {
        "X": x[others],
        "text_features": t,
        "support_features": x[shots],
        "support_labels": labels[shots],
    }


def fit(name, arrays, **settings):
    return METHODS[name](device="cpu", **FAST.get(name, {}), **settings).fit(**arrays)


@EVERY_METHOD
def test_the_order_of_rows_does_not_matter(name, arrays):
    order = np.random.default_rng(0).permutation(len(arrays["X"]))
    one, other = fit(name, arrays), fit(name, {**arrays, "X": arrays["X"][order]})
    np.testing.assert_allclose(
        other.label_distributions_, one.label_distributions_[order], atol=2e-4
    )


@EVERY_METHOD
def test_the_order_of_classes_does_not_matter(name, arrays):
    order = np.random.default_rng(0).permutation(K)
    changed = {
        **arrays,
        "text_features": arrays["text_features"][order],
        "support_labels": np.argsort(order)[arrays["support_labels"]],
    }
    one, other = fit(name, arrays), fit(name, changed)
    np.testing.assert_allclose(
        other.label_distributions_, one.label_distributions_[:, order], atol=2e-4
    )
    np.testing.assert_array_equal(order[other.transduction_], one.transduction_)


@EVERY_METHOD
def test_arrays_of_any_kind_are_not_modified(name, arrays, tmp_path):
    expected = fit(name, arrays).label_distributions_
    np.save(tmp_path / "x.npy", arrays["X"])
    streamed = {**arrays, "X": np.load(tmp_path / "x.npy", mmap_mode="r")}
    tensors = {key: torch.from_numpy(array.copy()) for key, array in arrays.items()}
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    for given in (streamed, tensors):
        np.testing.assert_allclose(fit(name, given).label_distributions_, expected, atol=1e-5)
    assert all(torch.equal(tensors[key], tensor) for key, tensor in before.items())


@EVERY_METHOD
def test_another_default_type_changes_nothing(name, arrays):
    expected = fit(name, arrays).label_distributions_
    try:
        for dtype in (torch.float16, torch.float64):
            torch.set_default_dtype(dtype)
            np.testing.assert_array_equal(fit(name, arrays).label_distributions_, expected)
    finally:
        torch.set_default_dtype(torch.float32)


@EVERY_METHOD
def test_few_rows(name, arrays):
    few = {**arrays, "X": arrays["X"][:K]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a graph with too few rows
        model = fit(name, few)
    assert np.isfinite(model.label_distributions_).all()
    np.testing.assert_allclose(model.label_distributions_.sum(1), 1, atol=1e-5)


@EVERY_METHOD
def test_a_class_that_no_row_has(name, arrays):
    # Two texts are far from all rows: nothing underflows to NaN.
    d = arrays["X"].shape[1]
    far = -np.eye(2, d, dtype=np.float32)
    shots = np.concatenate([arrays["support_features"], far])
    labels = np.concatenate([arrays["support_labels"], [K, K + 1]])
    changed = {
        "X": arrays["X"],
        "text_features": np.concatenate([arrays["text_features"], far]),
        "support_features": shots,
        "support_labels": labels,
    }
    model = fit(name, changed)
    assert np.isfinite(model.label_distributions_).all()
    if not model.balanced:
        assert (model.transduction_ < K).all()


def test_validation_rows_choose_the_first_best_of_the_grid(arrays):
    x = arrays["X"]
    truth = np.random.default_rng(0).integers(K, size=11)
    given = {**arrays, "validation_features": x[:11], "validation_labels": truth}
    grid = METHODS["bd-cspn"].grid
    best, runs = (-1.0, None), 0
    for values in itertools.product(*(setting.values for setting in grid.values())):
        settings = dict(zip(grid, values, strict=True))
        found = fit("bd-cspn", arrays, **settings)
        score = (found.transduction_[:11] == truth).mean()
        best, runs = max(best, (score, settings), key=lambda pair: pair[0]), runs + 1
    model = fit("bd-cspn", given)
    assert model.chosen_.values == best[1]
    assert model.chosen_.runs == runs == 55
    one = fit("bd-cspn", given, n_rows=3)
    assert (one.chosen_.values["n_rows"], one.chosen_.runs) == (3, 5)
    assert fit("bd-cspn", arrays).chosen_.values == {"n_rows": 8, "eps": 10.0}


def test_transclip_says_what_it_chose(arrays):
    given = {
        **arrays,
        "validation_features": arrays["X"][:9],
        "validation_labels": np.arange(9) % K,
    }
    model = TransCLIP(device="cpu").fit(**given)
    assert model.chosen_.values == {"gamma": model.gamma_, "kl_weight": 0.5}
    assert model.chosen_.runs == 4


def test_progress_and_graph(arrays):
    graph, seen = build_graph(arrays["X"], 5), []
    given = StatA(device="cpu", max_iter=2).fit(
        **arrays, graph=graph, progress=lambda *step: seen.append(step)
    )
    own = StatA(device="cpu", max_iter=2).fit(**arrays)
    np.testing.assert_array_equal(given.label_distributions_, own.label_distributions_)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert repr(StatA(alpha=2)) == "StatA(anchors='texts', alpha=2.0)"


def test_without_texts_the_shots_tell_the_classes(arrays):
    given = {key: array for key, array in arrays.items() if key != "text_features"}
    model = fit("laplacianshot", given)
    np.testing.assert_array_equal(
        model.label_distributions_, fit("laplacianshot", arrays).label_distributions_
    )


@EVERY_METHOD
def test_arrays_on_a_gpu(name, arrays):
    given = {**arrays, "validation_features": arrays["X"][:9], "validation_labels": [0, 1, 2] * 3}
    settings = METHODS[name].grid.keys() - {"max_iter", "alpha"}
    settings = {setting: METHODS[name].grid[setting].default for setting in settings}
    expected = fit(name, given, **settings).label_distributions_
    with PretendGpu():
        there = {key: torch.as_tensor(array).to("cuda") for key, array in given.items()}
        found = fit(name, there, **settings).label_distributions_
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("name", "settings", "sizes"),
    [
        ("em-dirichlet", {}, (50, 2000, 0)),  # (K, K) arrays
        ("tim-adm", {}, (50, 500, 20_000)),  # (M, K) arrays
        ("bd-cspn", {"n_rows": 1000}, (1000, 200, 200)),  # rows that join a class
        ("zlap", {"n_labels": 1000, "anchors": "shots"}, (1500, 5, 1000)),  # edges
        ("ecalp", {"n_shots": 1000}, (1500, 5, 1000)),
        ("stata", {"n_neighbors": 1000}, (1500, 5, 0)),
    ],
)
def test_memory_of_arrays_other_than_those_of_rows_and_classes(name, settings, sizes, monkeypatch):
    """A fit with N, K and M that takes most for these is refused before it makes them."""
    n, k, m = sizes
    draw, method = np.random.default_rng(0), METHODS[name]
    monkeypatch.setattr(method, "solve", lambda *_: pytest.fail("fitted"))
    rows = [draw.normal(size=(size, 64)).astype(np.float32) for size in (n, k, m)]
    x, texts, shots = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rows)
    labelled = {"support_features": shots, "support_labels": np.arange(m) % k} if m else {}
    with pytest.raises(InputError, match=f"memory: {name} keeps .*; there are 1 GiB"):
        method(device="cpu", memory="1GiB", **settings).fit(x, text_features=texts, **labelled)


def replaced(arrays, **changes):
    return {k: v for k, v in {**arrays, **changes}.items() if v is not None}


def without_shots(arrays):
    return replaced(arrays, support_features=None, support_labels=None)


@pytest.mark.parametrize(
    ("name", "settings", "change", "message"),
    [
        ("bd-cspn", {}, without_shots, "bd-cspn with anchors 'shots' needs shots"),
        ("stata", {}, lambda a: replaced(a, text_features=None), "needs text_features"),
        (
            "tim-adm",
            {},
            lambda a: replaced(a, support_labels=np.minimum(a["support_labels"], K - 2)),
            f"class {K - 1} has no shot",
        ),
        (
            "tim-adm",
            {},
            lambda a: replaced(a, text_features=None, support_labels=9 + a["support_labels"]),
            "some class has no shot",
        ),
        ("zlap", {}, lambda a: replaced(a, text_features=a["text_features"][:1]), "only one"),
        (
            "zlap",
            {},
            lambda a: replaced(without_shots(a), text_features=None),
            "no text features and no shots",
        ),
        ("pt-map", {}, lambda a: replaced(a, X=a["X"][:3]), "3 rows for 5 classes"),
        ("pt-map", {"class_prior": [1, 2]}, dict, "class_prior: 2 shares for 5 classes"),
        ("zero-shot", {"memory": "1MiB"}, dict, "zero-shot keeps 1 arrays of"),
        ("zero-shot", {}, lambda a: replaced(a, X=a["X"] * np.nan), "X: row 0 contains NaN"),
        ("zlap", {}, lambda a: replaced(a, support_labels=None), "support_features and support_l"),
        ("bd-cspn", {"eps": 1000}, dict, "row 0 has no finite answer with n_rows 8, eps 1000"),
    ],
)
def test_refused_arrays(arrays, name, settings, change, message):
    with pytest.raises(InputError, match=message) as error:
        fit(name, change(arrays), **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("stata", {"anchors": "shots"}, "stata takes anchors texts, not shots"),
        ("bd-cspn", {"anchors": "images"}, "anchors must be one of shots, texts, both"),
        ("stata", {"beta": 1}, "stata has no setting 'beta'; its settings: alpha, n_neighbors"),
        ("zero-shot", {"tau": 1}, "its settings: none"),
        ("stata", {"n_neighbors": 2.5}, "n_neighbors must be a whole number, got 2.5"),
        ("stata", {"n_neighbors": 0}, "n_neighbors must be at least 1 and at most 1000, got 0"),
        ("stata", {"alpha": -1}, "alpha must be at least 0, got -1"),
        ("stata", {"alpha": float("nan")}, "alpha must be a number, got nan"),
        ("stata", {"alpha": True}, "alpha must be a number, got True"),
        ("zlap", {"alpha": 1}, "alpha must be at least 0 and at most 0.99, got 1"),
        ("pt-map", {"class_prior": [1, 0]}, "class_prior: class 1 has share 0, and needs one gre"),
        ("pt-map", {"class_prior": [np.nan]}, "class_prior: class 0 has share nan"),
        ("pt-map", {"class_prior": [[1, 2]]}, r"expected shares \(K,\), got shape \(1, 2\)"),
        ("pt-map", {"class_prior": "even"}, "class_prior: expected numbers"),
        ("stata", {"class_prior": [1, 2]}, "stata has no setting 'class_prior'"),
        ("stata", {"self": 1}, "stata has no setting 'self'"),
        ("pt-map", {"self": 1}, "pt-map has no setting 'self'"),
        ("stata", {"logit_scale": 0}, "logit_scale must be greater than 0"),
        ("stata", {"memory": "lots"}, "memory must be a size"),
    ],
)
def test_refused_settings(name, settings, message):
    with pytest.raises(InputError, match=message):
        METHODS[name](**settings)
