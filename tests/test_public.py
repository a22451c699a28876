"""What a user imports: its names, and that scikit-learn's tools take the estimator."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest

import transclip_fast
from tests.conftest import unit
from transclip_fast import InputError, TransCLIP
from transclip_fast.methods import StatA

sklearn = pytest.importorskip("sklearn")

from sklearn.base import BaseEstimator, clone, is_classifier  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.metrics import accuracy_score  # noqa: E402
from sklearn.model_selection import GridSearchCV  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import Normalizer  # noqa: E402
from sklearn.utils.estimator_checks import estimator_checks_generator  # noqa: E402


def test_public_names():
    names = ["InputError", "NeighborGraph", "TransCLIP", "__version__", "build_graph"]
    assert sorted(dir(transclip_fast)) == sorted(
        [*names, "encode_images", "fit_head", "load_features"]
    )
    for name in dir(transclip_fast):
        assert getattr(transclip_fast, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'linear_map'"):
        transclip_fast.linear_map  # noqa: B018


def test_importing_is_light():
    code = (
        "import sys, transclip_fast; print([m for m in ('torch', 'pyarrow') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_clone_and_parameters():
    model = TransCLIP(kl_weight=0.3, device="cpu")
    copy = clone(model)
    assert copy is not model
    assert copy.get_params() == model.get_params()
    assert copy.set_params(kl_weight=0.7).kl_weight == 0.7
    with pytest.raises(ValueError, match="no parameter 'kl'"):
        model.set_params(kl=1)
    assert is_classifier(model)


def test_fit_predict_and_score(problem):
    features, prototypes, labels = problem()
    model = TransCLIP(device="cpu")
    found = model.fit_predict(features, labels, text_features=prototypes)
    np.testing.assert_array_equal(found, model.transduction_)
    np.testing.assert_array_equal(model.classes_, np.arange(6))
    assert model.n_features_in_ == features.shape[1]
    predicted = model.predict(features)
    np.testing.assert_array_equal(predicted, model.predict_proba(features).argmax(1))
    assert model.score(features, labels) == np.mean(predicted == labels)
    with pytest.raises(InputError, match="y: expected 77 labels"):
        model.score(features, labels[:5])


def test_weights_of_a_score(problem):
    features, prototypes, labels = problem(noise=0.1)
    model = TransCLIP(device="cpu").fit(features, text_features=prototypes)
    weights = np.random.default_rng(0).integers(0, 3, 77)
    expected = accuracy_score(labels, model.predict(features), sample_weight=weights)
    assert 0 < expected < 1
    assert model.score(features, labels, sample_weight=weights) == pytest.approx(expected)
    assert model.score(features, labels, np.ones(77)) == model.score(features, labels)
    steps = make_pipeline(Normalizer(), model)
    assert steps.score(features, labels, sample_weight=weights) == pytest.approx(expected, abs=0.02)
    with pytest.raises(InputError, match="^sample_weight: expected 77 weights"):
        model.score(features, labels, sample_weight=weights[:5])
    for wrong in (np.zeros(77), -np.ones(77), np.full(77, np.nan), np.full(77, np.inf)):
        with pytest.raises(InputError, match="^sample_weight: weights are finite numbers >= 0"):
            model.score(features, labels, sample_weight=wrong)


def test_before_a_fit(problem):
    features, _, _ = problem()
    with pytest.raises(NotFittedError, match="call fit first") as found:
        TransCLIP().predict(features)
    for error in (found.value, pickle.loads(pickle.dumps(found.value))):  # noqa: S301
        assert isinstance(error, InputError | NotFittedError)
        assert str(error) == "predict_proba: call fit first"
    code = (
        "import sys, numpy, transclip_fast as t\n"
        "try: t.TransCLIP().predict(numpy.eye(3))\n"
        "except t.InputError as error: print(type(error).__name__, 'sklearn' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["InputError", "False"]


def test_a_single_row(problem):
    features, prototypes, _ = problem()
    model = TransCLIP(device="cpu").fit(features, text_features=prototypes)
    with pytest.raises(InputError, match=r"^X: .* got shape \(33,\); .*reshape\(1, -1\)"):
        model.predict(features[0])
    np.testing.assert_array_equal(
        model.predict(features[0].reshape(1, -1)), model.predict(features)[:1]
    )


def test_the_second_argument_may_be_texts(problem):
    features, prototypes, _ = problem()
    named = TransCLIP(device="cpu").fit(features, text_features=prototypes)
    found = TransCLIP(device="cpu").fit(features, prototypes)
    np.testing.assert_array_equal(found.label_distributions_, named.label_distributions_)
    methods = [StatA(device="cpu").fit(features, prototypes), StatA(device="cpu")]
    methods[1].fit(features, text_features=prototypes)
    np.testing.assert_array_equal(*(method.label_distributions_ for method in methods))


@pytest.mark.parametrize("unknown", [-1, np.nan])
@pytest.mark.parametrize("column", [False, True])
def test_labels_of_some_rows_as_y_are_not_ignored_in_silence(problem, unknown, column):
    features, prototypes, labels = problem()
    some = np.where(np.arange(77) % 5, unknown, labels)
    y = some[:, None] if column else some
    with pytest.warns(UserWarning, match="^y: 61 labels are .* give known_labels=y"):
        model = TransCLIP(device="cpu").fit(features, y, text_features=prototypes)
    plain = TransCLIP(device="cpu").fit(features, text_features=prototypes)
    np.testing.assert_array_equal(model.label_distributions_, plain.label_distributions_)
    known = TransCLIP(device="cpu").fit(features, y, text_features=prototypes, known_labels=y)
    assert (known.transduction_[::5] == labels[::5]).all()
    with pytest.warns(UserWarning, match="^y: 61 labels .* as support_features and support_labels"):
        StatA(device="cpu").fit(features, y, text_features=prototypes)


def test_labels_in_any_form_are_no_texts(problem):
    features, _, labels = problem()
    prior = np.eye(6, dtype=np.float32)[labels]
    expected = TransCLIP(device="cpu").fit(features, prior=prior).label_distributions_
    for y in (labels, labels[:, None], prior, [str(label) for label in labels]):
        found = TransCLIP(device="cpu").fit(features, y, prior=prior)
        np.testing.assert_array_equal(found.label_distributions_, expected)


def test_y_that_is_neither_labels_nor_texts(problem):
    features, prototypes, labels = problem()
    for y in (prototypes[:, :32], np.stack([prototypes] * 2), labels[:5], 1.0):
        shape = str(np.shape(y)).replace("(", r"\(").replace(")", r"\)")
        message = rf"^y: expected 77 labels.* texts \(classes, 33\), got shape {shape}; give texts"
        for model in (TransCLIP(device="cpu"), StatA(device="cpu")):
            with pytest.raises(InputError, match=message):
                model.fit(features, y)
        with pytest.raises(InputError, match=message):
            TransCLIP(device="cpu").fit(features, y, text_features=prototypes)
    with pytest.raises(InputError, match="^y: .* rows of different lengths"):
        TransCLIP(device="cpu").fit(features, [[1.0, 0.0], [1.0]])


def test_grid_search(problem):
    features, prototypes, labels = problem(n=120)
    grid = {"kl_weight": [0.0, 1.0], "inner_iter": [1, 5]}
    search = GridSearchCV(TransCLIP(device="cpu"), grid, cv=2)
    search.fit(features, labels, text_features=prototypes)
    scores = search.cv_results_["mean_test_score"]
    assert search.best_score_ == scores.max()
    halves = [np.arange(120) % 2 == i for i in (0, 1)]
    assert search.best_params_["kl_weight"] in (0.0, 1.0)
    assert search.predict(features[halves[0]]).shape == (60,)


def test_pipeline(problem):
    features, prototypes, labels = problem()
    steps = make_pipeline(Normalizer(), TransCLIP(device="cpu"))
    steps.fit(3 * features, labels, transclip__text_features=prototypes)
    plain = TransCLIP(device="cpu").fit(Normalizer().transform(features), text_features=prototypes)
    np.testing.assert_array_equal(steps[-1].transduction_, plain.transduction_)
    assert steps.score(features, labels) == plain.score(features, labels)


class WithTexts(TransCLIP, BaseEstimator):
    """TransCLIP with three texts of its own: scikit-learn's checks know images and labels only."""

    def fit(self, X, y=None, **arrays):
        shape = np.asarray(X).shape
        d = max(1, shape[1]) if len(shape) == 2 else 1
        texts = np.random.default_rng(0).normal(size=(3, d))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* rows were not unit vectors")
            return super().fit(X, y, text_features=unit(texts), **arrays)

    def predict_proba(self, X, **arrays):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* rows were not unit vectors")
            return super().predict_proba(X, **arrays)

    def predict(self, X, **arrays):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* rows were not unit vectors")
            return super().predict(X, **arrays)


IGNORED = "y is ignored: labels are positions in the list of texts"
WORDS = "refused in one line of our own words"
NOT_APPLICABLE = {
    "check_classifiers_one_label": IGNORED,
    "check_classifiers_classes": IGNORED,
    "check_classifiers_train": IGNORED,
    "check_classifiers_regression_target": IGNORED,
    "check_supervised_y_no_nan": IGNORED,
    "check_supervised_y_2d": IGNORED,
    "check_estimators_dtypes": "has a row of zeros, which has no direction",
    "check_dtype_object": "features are floats, never objects",
    "check_n_features_in_after_fitting": WORDS,
    "check_complex_data": WORDS,
    "check_estimators_empty_data_messages": WORDS,
    "check_fit2d_predict1d": WORDS,
    "check_estimator_sparse_tag": WORDS,
    "check_estimator_sparse_array": WORDS,
    "check_estimator_sparse_matrix": WORDS,
}


CHECKS = estimator_checks_generator(
    WithTexts(device="cpu"), expected_failed_checks=NOT_APPLICABLE, mark="xfail"
)


@pytest.mark.parametrize(
    ("estimator", "check"), list(CHECKS), ids=lambda x: getattr(x, "func", type(x)).__name__
)
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)
