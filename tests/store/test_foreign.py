"""Folders of few-shot caches as published code writes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conftest import unit
from transclip_fast import InputError, TransCLIP
from transclip_fast.store.features import load_features

N, V, K, D = 60, 12, 6, 33
SHOTS = (1, 4)


@pytest.fixture
def problem_parts(problem):
    """Queries, validation rows, prototypes and supports by shots, each with its labels."""
    features, prototypes, labels = problem(n=N + V + K * sum(SHOTS))
    parts = np.split(np.arange(len(features)), [N, N + V, N + V + K * SHOTS[0]])
    test, val, *supports = ((features[rows], labels[rows]) for rows in parts)
    return test, val, prototypes, dict(zip(SHOTS, supports, strict=True))


def half(array):
    return torch.from_numpy(np.ascontiguousarray(array)).half()


@pytest.fixture
def tip_adapter(problem_parts, tmp_path):
    """What Tip-Adapter leaves, with APE's text weights: keys (d, M), one-hot values, (d, K)."""
    test, val, prototypes, supports = problem_parts
    folder = tmp_path / "caches"
    folder.mkdir()
    for split, (rows, labels) in (("test", test), ("val", val)):
        torch.save(half(rows), folder / f"{split}_f.pt")
        torch.save(torch.from_numpy(labels), folder / f"{split}_l.pt")
    for shots, (rows, labels) in supports.items():
        torch.save(half(rows).permute(1, 0), folder / f"keys_{shots}shots.pt")
        hot = torch.nn.functional.one_hot(torch.from_numpy(labels)).half()
        torch.save(hot, folder / f"values_{shots}shots.pt")
    torch.save(half(prototypes).T, folder / "text_weights_cupl_t.pt")
    torch.save(torch.nn.Parameter(half(supports[4][0])), folder / "best_F_4shots.pt")
    return folder


def assert_same(array, expected):
    np.testing.assert_array_equal(np.asarray(array, float), np.asarray(expected, float))


def assert_is(features, test, val, prototypes, support=None):
    """The arrays are those of the problem, rounded to half precision."""
    given = {"image": test, "validation": val, "support": support}
    for name, part in given.items():
        labels = "labels" if name == "image" else f"{name}_labels"
        if part is None:
            assert features.get(f"{name}_features") is features.get(labels) is None
        else:
            assert_same(features.get(f"{name}_features"), half(part[0]))
            assert_same(features.get(labels), part[1])
    assert_same(features.get("text_features"), half(prototypes))


@pytest.mark.parametrize("shots", [0, *SHOTS])
def test_tip_adapter(shots, tip_adapter, problem_parts):
    *parts, supports = problem_parts
    features = load_features(tip_adapter, shots=shots)
    assert_is(features, *parts, supports.get(shots))
    assert features.origins["image_features"] == str(tip_adapter / "test_f.pt")
    if shots:
        assert features.origins["support_labels"] == str(tip_adapter / f"values_{shots}shots.pt")


def test_one_support_needs_no_number(tip_adapter, problem_parts):
    (tip_adapter / "keys_1shots.pt").unlink()
    *parts, supports = problem_parts
    assert_is(load_features(tip_adapter), *parts, supports[4])
    (tip_adapter / "keys_4shots.pt").unlink()
    assert_is(load_features(tip_adapter), *parts)


def test_transclip(tip_adapter, problem_parts):
    """Keys with a leading axis of views, texts one a row."""
    *parts, supports = problem_parts
    torch.save(half(supports[1][0])[None], tip_adapter / "keys_1shots.pt")
    (tip_adapter / "text_weights_cupl_t.pt").unlink()
    torch.save(half(parts[2]), tip_adapter / "text_features.pt")
    assert_is(load_features(tip_adapter, shots=1), *parts, supports[1])


def test_several_views_become_their_unit_mean(tip_adapter, problem_parts):
    rows = half(problem_parts[3][1][0]).float()
    views = torch.stack([rows, rows.flip(1), rows.roll(1, 1)])
    views = torch.nn.functional.normalize(views, dim=-1).half()
    torch.save(views, tip_adapter / "keys_1shots.pt")
    found = load_features(tip_adapter, shots=1).get("support_features")
    expected = unit(views.double().mean(0).numpy())
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("classes_first", [False, True])
def test_texts_of_several_templates(classes_first, tip_adapter, problem_parts, tmp_path):
    """Their axis is that of a .npy, and no mean is taken of rows that are not unit rows."""
    texts = torch.stack([half(problem_parts[2]), 3 * half(problem_parts[2]).roll(1, 1)])
    (tip_adapter / "text_weights_cupl_t.pt").unlink()
    file = tip_adapter / "text_features.pt"
    torch.save(texts.swapaxes(0, 1).contiguous() if classes_first else texts, file)
    (tmp_path / "names.txt").write_text("\n".join("abcdef"))
    features = load_features(tip_adapter, {"class_names": tmp_path / "names.txt"}, shots=0)
    assert features.n_classes == K
    for found, expected in zip(features.get("text_features"), texts, strict=True):
        assert_same(found, expected)
    if classes_first:
        with pytest.warns(UserWarning, match="is taken as 6 templates of 2 classes"):
            load_features(tip_adapter, shots=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_as_many_shots_as_dimensions(transposed, tip_adapter, problem):
    """(d, d): the side of unit length is the row of a shot."""
    rows, _, labels = problem(n=D)
    keys = half(rows)
    torch.save(keys.T if transposed else keys, tip_adapter / "keys_1shots.pt")
    hot = torch.nn.functional.one_hot(torch.from_numpy(labels), K).half()
    torch.save(hot, tip_adapter / "values_1shots.pt")
    assert_same(load_features(tip_adapter, shots=1).get("support_features"), keys)


@pytest.mark.parametrize("of_norm_1", ["neither", "both"])
def test_square_texts_whose_rows_nothing_tells(of_norm_1, problem_parts, tmp_path):
    """In a .npy a row is a class, as everywhere."""
    np.save(tmp_path / "X.npy", problem_parts[0][0])
    texts = torch.eye(D) if of_norm_1 == "both" else torch.rand(D, D)
    torch.save(texts, tmp_path / "text_features.pt")
    with pytest.raises(InputError, match=f"text_features.pt: is {D} x {D}, so that rows cannot"):
        load_features(tmp_path / "X.npy", {"text_features": tmp_path / "text_features.pt"})
    np.save(tmp_path / "text_features.npy", texts.numpy())
    files = {"text_features": tmp_path / "text_features.npy"}
    assert_same(load_features(tmp_path / "X.npy", files).get("text_features"), texts)


def test_rs_transclip(problem_parts, tmp_path):
    test, _, prototypes, _ = problem_parts
    for name, array in (("images", half(test[0])), ("texts_a_photo_of_a", half(prototypes))):
        torch.save(array, tmp_path / f"{name}.pt")
    torch.save(torch.from_numpy(test[1]), tmp_path / "classes.pt")
    assert_is(load_features(tmp_path), test, None, prototypes)


@pytest.mark.parametrize("kind", ["prior", "prior_logits"])
def test_logits_that_are_probabilities(kind, tip_adapter, problem_parts):
    scores = torch.from_numpy(problem_parts[0][0] @ problem_parts[2].T)
    array = (20 * scores).softmax(1) if kind == "prior" else 20 * scores
    torch.save(array, tip_adapter / "logits.pt")
    features = load_features(tip_adapter, shots=0)
    assert_same(features.get(kind), array)
    assert features.origins[kind] == str(tip_adapter / "logits.pt")
    (other,) = {"prior", "prior_logits"} - {kind}
    assert features.get(other) is None
    with_prototypes = load_features(
        tip_adapter, {"prototypes": tip_adapter / "text_weights_cupl_t.pt"}, shots=0
    )
    assert with_prototypes.get(kind) is None


def test_single_files_of_the_layout(tip_adapter, problem_parts):
    """Named one by one they are turned as in the folder."""
    *parts, supports = problem_parts
    given = {
        "labels": "test_l.pt",
        "text_features": "text_weights_cupl_t.pt",
        "support_features": "keys_4shots.pt",
        "support_labels": "values_4shots.pt",
        "validation_features": "val_f.pt",
        "validation_labels": "val_l.pt",
    }
    files = {name: tip_adapter / file for name, file in given.items()}
    assert_is(load_features(tip_adapter / "test_f.pt", files), *parts, supports[4])
    # In the folder itself, without being asked which of its supports or texts.
    torch.save(torch.ones(D, K), tip_adapter / "text_weights_other.pt")
    assert_is(load_features(tip_adapter, files), *parts, supports[4])


def test_fits(tip_adapter, problem_parts):
    test, val, prototypes, supports = problem_parts
    loaded = load_features(tip_adapter, shots=4).arrays
    loaded.pop("labels")
    model = TransCLIP(device="cpu").fit(loaded.pop("image_features"), **loaded)
    shots = half(supports[4][0]), supports[4][1]
    expected = TransCLIP(device="cpu").fit(
        half(test[0]),
        half(prototypes),
        support_features=shots[0],
        support_labels=shots[1],
        validation_features=half(val[0]),
        validation_labels=val[1],
    )
    assert model.gamma_ == expected.gamma_
    np.testing.assert_array_equal(model.label_distributions_, expected.label_distributions_)


BAD = {
    "several supports": ({}, None, "has supports of 1, 4 shots; name one with --shots, or 0"),
    "no such support": ({}, 16, "has no keys_16shots.pt"),
    "half a support": ({"values_4shots.pt": None}, 4, "has no values_4shots.pt"),
    "several texts": (
        {"text_features.pt": torch.ones(K, D)},
        1,
        "has text_features.pt and text_weights_cupl_t.pt; name one with --text-features",
    ),
    "several queries": ({"images.pt": torch.ones(K, D)}, 1, "and images.pt; name one as FEATURES"),
    "not one-hot": ({"values_1shots.pt": torch.ones(6, K)}, 1, "row 0 is not one-hot"),
    "nothing hot": ({"values_1shots.pt": torch.zeros(6, K)}, 1, "row 0 is not one-hot"),
    "pickled": ({"test_f.pt": slice(3)}, 1, "test_f.pt: damaged, or holds pickled"),
    "no queries": ({"test_f.pt": None}, 1, r"has keys_1shots.pt, but no test_f.pt with the fea"),
    "flat": ({"test_f.pt": torch.ones(5)}, 1, "test_f.pt: expected a non-empty"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_folders(kind, tip_adapter):
    change, shots, expected = BAD[kind]
    for name, array in change.items():
        if array is None:
            (tip_adapter / name).unlink()
        else:
            torch.save(array, tip_adapter / name)
    with pytest.raises(InputError, match=expected) as error:
        load_features(tip_adapter, shots=shots)
    assert "\n" not in str(error.value)
    assert str(tip_adapter) in str(error.value)


def test_shots_of_something_else(problem_parts, tmp_path):
    np.save(tmp_path / "x.npy", problem_parts[0][0])
    with pytest.raises(InputError, match=r"x\.npy: has no keys_\*shots\.pt to choose from"):
        load_features(tmp_path / "x.npy", shots=4)


def test_shots_and_a_support(tip_adapter):
    support = {"support_features": tip_adapter / "keys_1shots.pt"}
    with pytest.raises(InputError, match="give --shots or the files of the support, not both"):
        load_features(tip_adapter, support, shots=4)


def test_a_link_that_leads_out(tip_adapter, tmp_path):
    (tip_adapter / "val_l.pt").rename(tmp_path / "val_l.pt")
    (tip_adapter / "val_l.pt").symlink_to(tmp_path / "val_l.pt")
    with pytest.raises(InputError, match="leads out of"):
        load_features(tip_adapter, shots=0)
