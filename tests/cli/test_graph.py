"""`graph`: its folder, and `solve --graph`."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from tests.cli.test_solve import read
from transclip_fast.cli import graph as graph_command
from transclip_fast.graph import exact, list_search
from transclip_fast.store.arrays import array_sha256
from transclip_fast.store.checkpoint import FileCheckpoint


@pytest.fixture
def graph(save, arrays, succeeds, tmp_path):
    """A graph folder of the features in features.npz."""
    succeeds("graph", save(arrays), "--out", tmp_path / "graph")
    return tmp_path / "graph"


def test_contents(graph, arrays):
    x = arrays["image_features"].astype(np.float64)
    similarities = x @ x.T
    np.fill_diagonal(similarities, -np.inf)
    neighbors = np.load(graph / "neighbors.npy")
    assert neighbors.dtype == np.int64
    np.testing.assert_array_equal(neighbors, np.argsort(-similarities, axis=1)[:, :3])
    expected = np.take_along_axis(similarities, neighbors, 1)
    np.testing.assert_allclose(np.load(graph / "similarities.npy"), expected, atol=1e-6)
    manifest = json.loads((graph / "manifest.json").read_text())
    assert manifest["features_sha256"] == array_sha256(arrays["image_features"])
    assert (manifest["n_rows"], manifest["n_neighbors"], manifest["recall"]) == (77, 3, 1.0)
    assert manifest["search"] == "exact"


def test_json(save, arrays, succeeds, tmp_path):
    out = succeeds("graph", save(arrays), "--out", tmp_path / "graph", "--json")
    assert json.loads(out) == json.loads((tmp_path / "graph" / "manifest.json").read_text())


def test_solve_takes_it(graph, solved, succeeds, tmp_path):
    out = tmp_path / "reused"
    succeeds("solve", tmp_path / "features.npz", "--graph", graph, "--out", out)
    run, table = read(out)
    fresh, expected = read(solved)
    assert table.equals(expected)
    assert run["objective"] == fresh["objective"]
    assert run["graph"] == fresh["graph"]
    assert (out / "mixture.safetensors").read_bytes() == (
        solved / "mixture.safetensors"
    ).read_bytes()


def test_longer_lists_are_cut(save, arrays, solved, succeeds, tmp_path):
    file = save(arrays)
    succeeds("graph", file, "--out", tmp_path / "graph", "--n-neighbors", 7)
    succeeds("solve", file, "--graph", tmp_path / "graph", "--out", tmp_path / "reused")
    assert read(tmp_path / "reused")[1].equals(read(solved)[1])


def test_fewer_rows_than_neighbours(save, cli, tmp_path):
    file = save({"image_features": np.eye(3), "text_features": np.eye(3)[:2]})
    ran = cli("graph", file, "--out", tmp_path / "graph", "--n-neighbors", 5)
    assert (ran.code, ran.err.count("\n")) == (0, 1)
    assert ran.err.startswith("warning: n_neighbors: 5 is not below the number of rows, 3")
    neighbors = np.load(tmp_path / "graph" / "neighbors.npy")
    np.testing.assert_array_equal((neighbors >= 0).sum(1), [2, 2, 2])
    ran = cli("solve", file, "--graph", tmp_path / "graph", "--out", tmp_path / "result")
    assert ran.code == 0


def test_of_other_features(graph, arrays, save, refused, tmp_path):
    arrays["image_features"] = arrays["image_features"][::-1]
    message = refused("solve", save(arrays), "--graph", graph, "--out", tmp_path / "result")
    assert f"{graph}: was built from other features; build it again" in message


def array(name, change):
    def spoil(folder):
        np.save(folder / name, change(np.load(folder / name)))

    return spoil


def changed(index, value):
    def change(values):
        values[index] = value
        return values

    return change


TAMPERED = {
    "truncated": (
        lambda f: (f / "neighbors.npy").write_bytes((f / "neighbors.npy").read_bytes()[:-40]),
        "neighbors.npy: damaged or truncated",
    ),
    "missing": (lambda f: (f / "similarities.npy").unlink(), "similarities.npy: no such file"),
    "id too high": (array("neighbors.npy", changed((4, 1), 77)), "row 4 has an impossible"),
    "id too low": (array("neighbors.npy", changed((5, 2), -2)), "row 5 has an impossible"),
    "itself": (array("neighbors.npy", changed((6, 0), 6)), "row 6 has an impossible"),
    "NaN": (array("similarities.npy", changed((7, 0), np.nan)), "row 7 has an impossible"),
    "float ids": (array("neighbors.npy", lambda a: a.astype(float)), "must be integers"),
    "strings": (array("similarities.npy", lambda a: a.astype("U5")), "expected floats"),
    "few rows": (array("neighbors.npy", lambda a: a[:-1]), "differ in shape"),
    "manifest": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json: expected"),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_tampered(kind, graph, refused, tmp_path):
    spoil, expected = TAMPERED[kind]
    spoil(graph)
    file = tmp_path / "features.npz"
    message = refused("solve", file, "--graph", graph, "--out", tmp_path / "result")
    assert message.startswith(f"error: {graph}")
    assert expected in message


def test_short_lists(graph, refused, tmp_path):
    message = refused("solve", tmp_path / "features.npz", "--graph", graph, "--n-neighbors", 4,
                      "--out", tmp_path / "result")  # fmt: skip
    assert "lists have 3 neighbours, 4 are needed" in message


@pytest.mark.parametrize(
    ("row", "expected"), [(np.nan, "row 2 contains NaN"), (0, "row 2 is all zero")]
)
def test_bad_rows(row, expected, arrays, save, refused, tmp_path):
    arrays["image_features"][2] = row
    message = refused("graph", save(arrays), "--out", tmp_path / "graph")
    assert f"features.npz: image_features: {expected}" in message


@pytest.mark.parametrize("index", [None, "IVF8,Flat"])
def test_approximate(index, save, arrays, succeeds, tmp_path):
    """Its recall and index are in the manifest, in run.json and on screen."""
    features, folder = save(arrays), tmp_path / "graph"
    search = ("--search", "faiss", "--recall", 0.9, *(("--index", index) if index else ()))
    shown = succeeds("graph", features, *search, "--out", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["search"] == "faiss"
    assert manifest["recall"] >= 0.9
    assert manifest["index"] == index or index is None
    lists = f"{manifest['probes']} of {manifest['lists']} lists a row"
    assert f"faiss, {manifest['index']}, {lists}" in shown
    assert f"recall {manifest['recall']:.4f} on 77 rows" in shown
    succeeds("solve", features, "--graph", folder, "--out", tmp_path / "given")
    succeeds("solve", features, *search, "--out", tmp_path / "made")
    given, made = (
        json.loads((tmp_path / name / "run.json").read_text())["graph"]
        for name in ("given", "made")
    )
    assert given == made
    assert {name: manifest[name] for name in given if name != "n_neighbors"} == {
        name: value for name, value in given.items() if name != "n_neighbors"
    }


def test_rows_of_a_comparison_by_an_index_that_was_replaced_are_not_kept(
    save, arrays, done, cli, tmp_path
):
    pytest.importorskip("faiss")
    features, index = save(arrays), tmp_path / "image.index"
    search = "--search", "faiss", "--index", "Flat", "--save-index", index
    done("graph", features, *search, "--out", tmp_path / "graph")
    command = "compare", features, "--methods", "stata", "--out", tmp_path / "table.md"
    for time, anew in ((1, False), (1, False), (2, True)):
        os.utime(index, (time, time))
        ran = cli(*command, "--index", index)
        assert (ran.code, "begins anew" in ran.err) == (0, anew)


def test_a_saved_index_is_searched_again(save, arrays, succeeds, refused, tmp_path):
    features, index = save(arrays), tmp_path / "image.index"
    search = ("--search", "faiss", "--save-index", index)
    succeeds("graph", features, *search, "--out", tmp_path / "first")
    succeeds("graph", features, "--index", index, "--out", tmp_path / "second")
    for name in ("neighbors.npy", "similarities.npy"):
        first, second = ((tmp_path / run / name).read_bytes() for run in ("first", "second"))
        assert first == second
    manifest = json.loads((tmp_path / "second" / "manifest.json").read_text())
    assert manifest["index"] == str(index)
    arrays["image_features"] = arrays["image_features"][::-1]
    message = refused("graph", save(arrays), "--index", index, "--out", tmp_path / "third")
    assert f"{index}: holds other rows than the features, or in another order" in message
    for place in ("third/x.index", "third"):
        message = refused("graph", features, "--search", "faiss", "--save-index", tmp_path / place,
                          "--out", tmp_path / "third")  # fmt: skip
        assert "is in --out, which is replaced" in message
    missing = tmp_path / "none.index"
    message = refused("graph", features, "--index", missing, "--out", tmp_path / "third")
    assert f"{missing}: no such file" in message


@pytest.mark.parametrize("search", ["exact", "faiss"])
def test_a_killed_search_goes_on(search, save, arrays, cli, succeeds, tmp_path, monkeypatch):
    monkeypatch.setattr(graph_command, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(exact, "STEP_ROWS", 30)
    monkeypatch.setitem(exact.PANEL_ROWS, "cpu", 15)
    monkeypatch.setattr(list_search, "BATCH_BLOCKS", 2)
    command = ("graph", save(arrays), "--search", search, "--out")
    succeeds(*command, tmp_path / "whole")
    keep, kept = FileCheckpoint.keep, []

    def killed(self, state):
        keep(self, state)
        kept.append(state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FileCheckpoint, "keep", killed)
        assert cli(*command, tmp_path / "graph").code != 0
    assert not (tmp_path / "graph").exists()
    assert (tmp_path / ".graph.search.npz").exists()
    succeeds(*command, tmp_path / "graph")
    assert not (tmp_path / ".graph.search.npz").exists()
    for name in ("neighbors.npy", "similarities.npy"):
        assert (tmp_path / "graph" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_shards_are_read_where_they_are(arrays, succeeds, tmp_path):
    """The same graph from one file and from three, one of them empty."""
    features = arrays["image_features"]
    np.save(tmp_path / "images.npy", features)
    (tmp_path / "folder" / "img_emb").mkdir(parents=True)
    for number, part in enumerate((features[:30], features[:0], features[30:])):
        np.save(tmp_path / "folder" / "img_emb" / f"img_emb_{number}.npy", part)
    succeeds("graph", tmp_path / "images.npy", "--out", tmp_path / "one")
    succeeds("graph", tmp_path / "folder", "--out", tmp_path / "three")
    for name in ("neighbors.npy", "similarities.npy"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
