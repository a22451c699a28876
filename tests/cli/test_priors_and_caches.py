"""`solve` and `predict` on sparse priors, folders of few-shot caches and linear maps."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import balanced
from transclip_fast import TransCLIP
from transclip_fast.store.linear_maps import linear_map


def confidences(folder):
    return pq.read_table(folder / "predictions.parquet")["confidence"].to_numpy()


def run_of(folder):
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


@pytest.fixture
def listed(arrays, tmp_path):
    """A file with the three largest classes of each row of a prior, and the prior."""
    prior = np.full((77, 6), 0.02) + 0.88 * np.eye(6)[arrays["labels"]]
    prior += 0.01 * np.random.default_rng(0).random((77, 6))
    prior /= prior.sum(1, keepdims=True)
    classes = np.argsort(-prior, axis=1)[:, :3]
    values = np.take_along_axis(prior, classes, 1)
    np.savez(tmp_path / "listed.npz", prior_indices=classes, prior_values=values)
    rest = (1 - values.sum(1, keepdims=True)) / 3
    whole = np.repeat(rest, 6, axis=1)
    np.put_along_axis(whole, classes, values, 1)
    return tmp_path / "listed.npz", whole


def test_sparse_prior(listed, arrays, save, succeeds, tmp_path):
    file, whole = listed
    succeeds("solve", save(arrays), "--prior", file, "--out", tmp_path / "a")
    features = arrays["image_features"]
    expected = TransCLIP().fit(features, prior=whole).label_distributions_.max(1)
    np.testing.assert_allclose(confidences(tmp_path / "a"), expected, atol=1e-6)
    # New rows with a sparse prior of their own, which cannot say how many classes there are.
    np.save(tmp_path / "new.npy", features)
    given = ("predict", tmp_path / "a", tmp_path / "new.npy", "--out", tmp_path / "b")
    succeeds(*given, "--prior", file)
    model = TransCLIP().fit(features, prior=whole)
    expected = model.predict_proba(features, prior=whole).max(1)
    np.testing.assert_allclose(confidences(tmp_path / "b"), expected, atol=1e-6)


def test_index_beyond_the_classes(listed, arrays, save, refused, tmp_path):
    with np.load(listed[0]) as file:
        classes, values = file["prior_indices"], file["prior_values"]
    classes[5, 2] = 6
    np.savez(listed[0], prior_indices=classes, prior_values=values)
    message = refused(
        "solve", save(arrays), "--prior", listed[0], "--out", tmp_path / "result"
    )  # fmt: skip
    assert message.startswith(f"error: {listed[0]}: row 5 names class 6, outside 0 .. 5")


@pytest.fixture
def caches(problem, tmp_path):
    """A folder as Tip-Adapter leaves it, with supports of 1 and 2 shots."""
    features, prototypes, labels = problem(n=130)
    folder = tmp_path / "caches"
    folder.mkdir()
    parts = [np.arange(80), np.arange(80, 100), balanced(labels, 1), balanced(labels, 2)]
    for split, rows in zip(("test", "val"), parts, strict=False):
        torch.save(torch.from_numpy(features[rows]).half(), folder / f"{split}_f.pt")
        torch.save(torch.from_numpy(labels[rows]), folder / f"{split}_l.pt")
    for shots, rows in zip((1, 2), parts[2:], strict=True):
        torch.save(torch.from_numpy(features[rows]).half().T, folder / f"keys_{shots}shots.pt")
        hot = torch.nn.functional.one_hot(torch.from_numpy(labels[rows]), 6).half()
        torch.save(hot, folder / f"values_{shots}shots.pt")
    torch.save(torch.from_numpy(prototypes).half().T, folder / "text_weights_template.pt")
    return folder


def test_caches(caches, cli, succeeds, refused, tmp_path):
    def loaded(name):
        return torch.load(caches / name, weights_only=True)

    assert "supports of 1, 2 shots; name one with --shots" in refused(
        "solve", caches, "--out", tmp_path / "a"
    )
    assert "has no keys_16shots.pt" in refused(
        "solve", caches, "--shots", 16, "--out", tmp_path / "a"
    )
    planned = json.loads(succeeds("plan", caches, "--shots", 2, "--json"))
    assert planned["size"]["labelled"] == 2 * 6 + 20  # shots and validation rows
    out = succeeds("solve", caches, "--shots", 2, "--out", tmp_path / "a")
    model = TransCLIP().fit(
        loaded("test_f.pt"),
        text_features=loaded("text_weights_template.pt").T,
        support_features=loaded("keys_2shots.pt").T,
        support_labels=loaded("values_2shots.pt").argmax(1),
        validation_features=loaded("val_f.pt"),
        validation_labels=loaded("val_l.pt"),
    )
    run = run_of(tmp_path / "a")
    assert run["config"]["gamma"] == model.gamma_
    assert f"few-shot, gamma {model.gamma_} chosen on the validation rows" in out
    assert run["accuracy"] == round(
        100 * np.mean(model.transduction_ == loaded("test_l.pt").numpy()), 4
    )
    np.testing.assert_array_equal(confidences(tmp_path / "a"), model.label_distributions_.max(1))
    assert cli("solve", caches, "--shots", 0, "--out", tmp_path / "b").code == 0
    assert run_of(tmp_path / "b")["config"]["gamma"] is None
    # Which support makes no difference to these.
    succeeds("graph", caches, "--out", tmp_path / "graph")
    succeeds("predict", tmp_path / "b", caches, "--out", tmp_path / "c")
    (caches / "text_weights_template.pt").unlink()
    assert "text" in refused("solve", caches, "--shots", 2, "--out", tmp_path / "d")
    command = ("solve", caches, "--shots", 2, "--method", "laplacianshot", "--out", tmp_path / "d")
    assert cli(*command).code == 0
    assert run_of(tmp_path / "d")["zero_shot_from"] == "shots"


def test_maps(arrays, save, succeeds, refused, tmp_path):
    draw = np.random.default_rng(0)
    maps = {name: np.eye(33) + 0.02 * draw.normal(size=(33, 33)) for name in ("text", "image")}
    options = []
    for name, matrix in maps.items():
        np.save(tmp_path / f"{name}_map.npy", matrix)
        options += [f"--{name}-map", tmp_path / f"{name}_map.npy"]
    file = save(arrays)
    succeeds("solve", file, *options, "--out", tmp_path / "a")
    rows = linear_map(arrays["image_features"], maps["image"])
    model = TransCLIP().fit(rows, text_features=linear_map(arrays["text_features"], maps["text"]))
    np.testing.assert_array_equal(confidences(tmp_path / "a"), model.label_distributions_.max(1))
    assert run_of(tmp_path / "a")["maps"].keys() == {"text_map", "image_map"}
    # New rows go through the same map, or are refused.
    succeeds("predict", tmp_path / "a", file, *options[2:], "--out", tmp_path / "b")
    np.testing.assert_allclose(
        confidences(tmp_path / "b"), model.predict_proba(rows).max(1), atol=1e-6
    )
    other = ("predict", tmp_path / "a", file, "--out", tmp_path / "c")
    expected = "was solved with an image map; give the same --image-map"
    assert expected in refused(*other)
    assert expected in refused(*other, "--image-map", tmp_path / "text_map.npy")
    succeeds("solve", file, *options[:2], "--out", tmp_path / "d")
    other = ("predict", tmp_path / "d", file, "--out", tmp_path / "c", *options[2:])
    assert "was solved without an image map; leave out --image-map" in refused(*other)


def test_maps_that_are_none(arrays, save, refused, tmp_path):
    torch.save(slice(3), tmp_path / "map.pt")
    given = ("solve", save(arrays), "--out", tmp_path / "a", "--text-map")
    assert "map.pt: damaged, or holds pickled Python objects" in refused(
        *given, tmp_path / "map.pt"
    )
    np.save(tmp_path / "map.npy", np.eye(5))
    message = refused(*given, tmp_path / "map.npy")
    assert "map.npy: has 5 columns, expected 33, those of" in message
