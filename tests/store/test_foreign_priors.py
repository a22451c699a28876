"""Priors that name some classes of each row, against loops, from every type of file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy import sparse

from tests import reference
from tests.agreement import assert_agrees
from transclip_fast import InputError, TransCLIP
from transclip_fast.data.priors import ListedPrior, as_log_probabilities
from transclip_fast.store.features import load_features

N, K, M = 77, 6, 3


@st.composite
def lists(draw):
    """Entries of some rows over some classes: class and probability, at most 1 in all."""
    k = draw(st.integers(1, 7))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        classes = draw(st.lists(st.integers(0, k - 1), unique=True, max_size=k))
        weights = [draw(st.integers(0, 9)) for _ in classes]
        mass = 1.0 if len(classes) == k else draw(st.sampled_from((0.2, 0.9, 1.0, 1.004)))
        total = max(sum(weights), 1)
        rows.append([(c, mass * w / total) for c, w in zip(classes, weights, strict=True)])
    return k, rows


def spread(k, rows):
    """The whole prior (N, K), row by row."""
    whole = np.zeros((len(rows), k))
    for i, entries in enumerate(rows):
        named = {c: value for c, value in entries if value > 0}
        rest = max(1 - sum(named.values()), 1e-6) if len(named) < k else 0.0
        for c in range(k):
            if c in named:
                whole[i, c] = named[c] * min(1.0, (1 - rest) / sum(named.values()))
            else:
                whole[i, c] = rest / (k - len(named))
    return whole


@settings(max_examples=60, deadline=None)
@given(lists())
def test_against_loops(problem):
    k, rows = problem
    offsets = np.cumsum([0, *map(len, rows)])
    classes = np.array([c for entries in rows for c, _ in entries], int)
    values = np.array([value for entries in rows for _, value in entries], float)
    found = ListedPrior(offsets, classes, values).dense("prior", rows=len(rows), n_classes=k)
    expected = spread(k, rows)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)
    if np.allclose(expected.sum(1), 1):
        log_y = as_log_probabilities(found, "prior", rows=len(rows))
        assert log_y.isfinite().all() or (expected == 0).any()


def largest(prior, m=M):
    """The m largest classes of each row and their probabilities."""
    classes = np.argsort(-prior, axis=1)[:, :m]
    return classes, np.take_along_axis(prior, classes, 1)


@pytest.fixture
def soft(problem):
    """Features, prototypes and a soft prior (N, K) with no zeros."""
    features, prototypes, _ = problem()
    scores = 2 * np.random.default_rng(0).normal(size=(N, K))
    return features, prototypes, np.exp(reference.log_softmax(scores)).astype(np.float32)


def written(kind, folder, classes, values):
    """The lists in a file of that kind."""
    file = folder / f"prior.{kind.rpartition(' ')[2]}"
    arrays = {"prior_indices": classes, "prior_values": values}
    tensors = {name: torch.from_numpy(array).contiguous() for name, array in arrays.items()}
    if kind == "csr npz":
        offsets = np.arange(len(classes) + 1) * classes.shape[1]
        csr = sparse.csr_array((values.ravel(), classes.ravel(), offsets), shape=(len(classes), K))
        sparse.save_npz(file, csr)
    elif kind == "npz":
        np.savez(file, **arrays)
    elif kind == "pt":
        torch.save(tensors, file)
    else:
        save_file(tensors, file)
    return file


@pytest.mark.parametrize("kind", ["npz", "pt", "safetensors", "csr npz"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_from_files(kind, dtype, soft, tmp_path):
    features, prototypes, prior = soft
    classes, values = largest(prior)
    values = values.astype(dtype)
    np.savez(tmp_path / "features.npz", image_features=features, text_features=prototypes)
    file = written(kind, tmp_path, classes, values)
    found = load_features(tmp_path / "features.npz", {"prior": file}).get("prior")
    rows = [
        list(zip(c, v, strict=True)) for c, v in zip(classes, values.astype(float), strict=True)
    ]
    np.testing.assert_allclose(found, spread(K, rows), rtol=2e-6)
    model = TransCLIP(device="cpu").fit(features, prior=found)
    assert_agrees(model, reference.solve(features, np.log(np.asarray(found, float))))


def test_inside_features(soft, tmp_path):
    features, _, prior = soft
    classes, values = largest(prior)
    given = {"image_features": features, "prior_indices": classes, "prior_values": values}
    np.savez(tmp_path / "a.npz", **given, class_names=list("abcdef"))
    found = load_features(tmp_path / "a.npz")
    assert found.origins["prior"].endswith("a.npz: prior")
    np.testing.assert_allclose(found.get("prior").sum(1), 1, atol=1e-6)
    np.savez(tmp_path / "b.npz", **given)
    with pytest.raises(InputError, match=r"b\.npz: prior: does not say how many classes"):
        load_features(tmp_path / "b.npz")
    assert load_features(tmp_path / "b.npz", n_classes=9).get("prior").shape == (N, 9)


def test_scipy_s_own_array_in_python(soft):
    features, _, prior = soft
    classes, values = largest(prior)
    listed = np.zeros_like(prior)
    np.put_along_axis(listed, classes, values, 1)
    whole = TransCLIP(device="cpu").fit(
        features,
        prior=spread(K, [[(c, v) for c, v in enumerate(row)] for row in listed.astype(float)]),
    )
    for array in (sparse.csr_array(listed), sparse.coo_matrix(listed)):
        model = TransCLIP(device="cpu").fit(features, prior=array)
        np.testing.assert_allclose(
            model.label_distributions_, whole.label_distributions_, atol=1e-6
        )


def test_all_classes_listed_is_the_whole_prior(soft, tmp_path):
    features, _, prior = soft
    file = written("npz", tmp_path, *largest(prior, K))
    np.save(tmp_path / "x.npy", features)
    found = load_features(tmp_path / "x.npy", {"prior": file}, n_classes=K).get("prior")
    np.testing.assert_allclose(found, prior, rtol=1e-6)


BAD = {
    "index K": ({"prior_indices": (4, 1, K)}, r"row 4 names class 6, outside 0 \.\. 5"),
    "negative index": ({"prior_indices": (5, 0, -1)}, "row 5 names class -1, outside"),
    "fraction": ({"prior_indices": (6, 0, 1.5)}, r"row 6 names class 1\.5, outside"),
    "twice": ({"prior_indices": (7, slice(None), 2)}, "row 7 names class 2 twice"),
    "negative": ({"prior_values": (8, 1, -0.1)}, "row 8 has a negative probability"),
    "NaN": ({"prior_values": (9, 2, np.nan)}, "row 9 contains a value that is not finite"),
    "heavy": ({"prior_values": (3, slice(None), 0.5)}, r"row 3 sums to 1\.5, more than 1"),
    "rows": ({"prior_indices": None, "prior_values": None}, "has 76 rows, expected 77"),
    "one alone": ({"prior_values": ...}, "prior_indices and prior_values come together"),
    "shapes": (
        {"prior_values": None},
        r"has shape \(77, 3\), prior_values \(76, 3\); give both",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_lists(kind, soft, tmp_path):
    features, prototypes, prior = soft
    arrays = dict(zip(("prior_indices", "prior_values"), largest(prior), strict=True))
    change, expected = BAD[kind]
    for name, what in change.items():
        if what is ...:
            del arrays[name]
        elif what is None:
            arrays[name] = arrays[name][:-1]
        else:
            arrays[name] = arrays[name].astype(float)
            arrays[name][what[0], what[1]] = what[2]
    np.savez(tmp_path / "features.npz", image_features=features, text_features=prototypes)
    np.savez(tmp_path / "prior.npz", **arrays)
    with pytest.raises(InputError, match=expected) as error:
        load_features(tmp_path / "features.npz", {"prior": tmp_path / "prior.npz"})
    assert str(error.value).startswith(f"{tmp_path / 'prior.npz'}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": b"csc"}, "sparse array in another format"),
        ({"shape": np.array([N])}, r"shape must be \(rows, classes\)"),
        ({"indptr": np.arange(N + 1)}, "indices and values do not fit each other"),
        ({"indptr": np.zeros((N + 1, 2))}, "indices and values do not fit each other"),
        ({"indices": np.zeros(3, int)}, "indices and values do not fit each other"),
        ({"data": np.array(["a"] * 3 * N)}, "expected numbers"),
    ],
)
def test_bad_csr(change, expected, soft, tmp_path):
    features, prototypes, prior = soft
    np.savez(tmp_path / "features.npz", image_features=features, text_features=prototypes)
    with np.load(written("csr npz", tmp_path, *largest(prior))) as file:
        np.savez(tmp_path / "prior.npz", **(dict(file) | change))
    with pytest.raises(InputError, match=rf"prior\.npz: .*{expected}"):
        load_features(tmp_path / "features.npz", {"prior": tmp_path / "prior.npz"})


def test_two_priors_in_one_file(soft, tmp_path):
    features, _, prior = soft
    classes, values = largest(prior)
    arrays = {"prior": prior, "prior_indices": classes, "prior_values": values}
    np.savez(tmp_path / "a.npz", image_features=features, **arrays)
    with pytest.raises(InputError, match="has prior and prior_indices; leave one of them out"):
        load_features(tmp_path / "a.npz")
