"""Folders and files that commit 5f1950e wrote open with the values they hold, see v0/README.md."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import unit
from transclip_fast.heads.files import read_head
from transclip_fast.store.feature_writer import FeatureWriter
from transclip_fast.store.features import load_features
from transclip_fast.store.graphs import load_graph
from transclip_fast.store.results import load_mixture, load_result
from transclip_fast.store.row_table import RowTable
from transclip_fast.store.tensors import read_tensors, write_tensors

N, K, D, SHARD_ROWS = 12, 6, 384, 5
CLASS_NAMES = ["airport", "beach", "bridge", "commercial", "desert", "farmland"]
KEYS = [f"{name}_{i:02}.png" for name in CLASS_NAMES for i in (1, 2)]
LABELS = {
    "dense": [5, 4, 0, 0, 3, 3, 4, 3, 2, 2, 3, 3],
    "sparse": [5, 5, 0, 0, 3, 3, 4, 1, 2, 2, 3, 3],
    "predicted": [5, 4, 0, 0, 3, 3, 4, 3, 2, 2, 3, 3],
    "on_head": [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5],
}
ZERO_SHOT = {name: [4] * N for name in LABELS} | {"on_head": LABELS["on_head"]}
SPARSE = ("--assignments", "sparse", "--candidates", 4, "--rank", 3)
SHA256 = "ebe19b2202c52a32a2877320dce7036fd76718ecf068b31d05f5b6d846b5724e"
MIXTURES = {"dense": {"prior_weights"}, "on_head": {"prior_weights", "zero_shot_weights"}}


def shards(folder, kind):
    """All shards of a kind, as numpy reads them."""
    return np.concatenate([np.load(file) for file in sorted((folder / kind).glob("*.npy"))])


def table_of(folder):
    return pq.read_table(folder / "predictions.parquet")


def same_predictions(found, expected):
    """Labels and keys are equal, confidences up to the rounding of another machine."""
    for name in ("row", "source_row", "key", "label", "label_name", "zero_shot_label"):
        assert found[name].to_pylist() == expected[name].to_pylist()
    np.testing.assert_allclose(found["confidence"], expected["confidence"], atol=1e-2)
    np.testing.assert_allclose(
        found["zero_shot_confidence"], expected["zero_shot_confidence"], atol=1e-4
    )


def test_features(v0):
    folder = v0 / "features"
    found = load_features(folder, local=True)
    assert found.get("image_features").shape == (N, D)
    np.testing.assert_array_equal(found.get("image_features"), shards(folder, "img_emb"))
    assert found.get("local_features").shape == (N, 2 * 2 * D)
    np.testing.assert_array_equal(found.get("local_features"), shards(folder, "local_emb"))
    np.testing.assert_array_equal(found.get("text_features"), np.load(folder / "prototypes.npy"))
    assert found.class_names == CLASS_NAMES
    assert found.keys == KEYS
    assert found.source_rows.tolist() == list(range(N))
    assert found.get("labels") is None
    assert found.encoder == {"model": "ViT-S-32", "weights": "none", "quick_gelu": False}
    assert found.sha256() == SHA256
    assert load_features(folder).get("local_features") is None


def test_a_feature_folder_is_continued(v0):
    """Its shards count as written, and labels that became known reach its metadata."""
    folder = v0 / "features"
    manifest = json.loads((folder / "manifest.json").read_text())
    keys = [*KEYS, "zz_broken.png"]
    table = RowTable(keys, [f"imgs/{key}" for key in keys], np.arange(N + 1) % K)
    writer = FeatureWriter(folder, manifest["config"], table)
    assert writer.complete
    assert not writer.missing()
    assert [failure.key for failure in writer.failures()] == ["zz_broken.png"]
    assert writer.has_prototypes(
        {name: manifest[name] for name in ("class_names", "templates", "prompts_sha256")}
    )
    found = load_features(folder)
    assert found.get("labels").tolist() == [row % K for row in range(N)]
    assert found.sha256() == SHA256


def test_a_features_file(v0):
    with np.load(v0 / "shots.npz") as file:
        arrays = dict(file)
    found = load_features(v0 / "shots.npz")
    assert found.class_names == arrays.pop("class_names").tolist() == CLASS_NAMES
    assert found.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.get(name), array)


def test_graph(v0):
    graph = load_graph(v0 / "graph", SHA256)
    np.testing.assert_array_equal(graph.neighbors, np.load(v0 / "graph/neighbors.npy"))
    np.testing.assert_array_equal(graph.similarities, np.load(v0 / "graph/similarities.npy"))
    assert graph.neighbors.shape == (N, 3)
    assert graph.info["recall"] == 1.0
    rows = unit(shards(v0 / "features", "img_emb").astype(float))
    cosines = (rows @ rows.T)[np.arange(N)[:, None], graph.neighbors]
    np.testing.assert_allclose(graph.similarities, cosines, atol=2e-3)


@pytest.mark.parametrize("kind", LABELS)
def test_results(kind, v0):
    found, held = load_result(v0 / kind), table_of(v0 / kind)
    assert found.run["class_names"] == CLASS_NAMES
    assert found.labels("label").tolist() == held["label"].to_pylist() == LABELS[kind]
    assert found.labels("zero_shot_label").tolist() == ZERO_SHOT[kind]
    names = found.predictions["label_name"].to_pylist()
    assert names == [CLASS_NAMES[label] for label in LABELS[kind]]


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures(kind, v0):
    mixture, weights = load_mixture(v0 / kind)
    assert mixture.means.shape == (K, D)
    assert mixture.variances.shape == (D,)
    assert weights.keys() == MIXTURES[kind]
    np.testing.assert_allclose(mixture.means.norm(dim=1), 1, atol=1e-6)


@pytest.mark.parametrize(("kind", "options"), [("dense", ()), ("sparse", SPARSE)])
def test_the_old_features_and_graph_are_solved(kind, options, v0, cli, tmp_path):
    out = tmp_path / "out"
    ran = cli(
        "solve",
        v0 / "features",
        "--graph",
        v0 / "graph",
        "--class-cost",
        "off",
        "--out",
        out,
        *options,
    )
    assert ran.code == 0
    earlier = load_result(v0 / kind).run["warnings"]
    now = [text.replace("got no query", "got no image") for text in earlier]  # the words of today
    now.append("the weights are random (--pretrained none): the labels mean nothing")
    assert load_result(out).run["warnings"] == now
    same_predictions(table_of(out), table_of(v0 / kind))


def test_an_old_result_predicts(v0, done, tmp_path):
    done("predict", v0 / "dense", v0 / "features", "--out", tmp_path / "out")
    same_predictions(table_of(tmp_path / "out"), table_of(v0 / "predicted"))
    done("predict", v0 / "on_head", v0 / "shots.npz", "--out", tmp_path / "out")
    found, solved = table_of(tmp_path / "out"), table_of(v0 / "on_head")
    assert found["zero_shot_label"].to_pylist() == solved["zero_shot_label"].to_pylist()


@pytest.mark.parametrize("kind", LABELS)
def test_an_old_result_is_evaluated(kind, v0, done, tmp_path):
    truth = np.array([label if row < 9 else (label + 1) % K for row, label in
                      enumerate(LABELS[kind])])  # fmt: skip
    np.save(tmp_path / "labels.npy", truth)
    labels = ("--labels", tmp_path / "labels.npy")
    assert json.loads(done("evaluate", v0 / kind, *labels, "--json"))["accuracy"] == 75.0


@pytest.mark.parametrize("name", ["taskres", "tip-adapter"])
def test_heads(name, v0):
    stored = read_head(v0 / f"{name}.safetensors")
    tensors, metadata = read_tensors(v0 / f"{name}.safetensors")
    held = json.loads(metadata["transclip_fast.head"])
    assert stored.name == held["name"] == name
    assert stored.class_names == CLASS_NAMES
    assert stored.head.parameters == held["parameters"]
    shots = load_features(v0 / "shots.npz")
    rows = torch.from_numpy(unit(shots.get("image_features").astype(np.float32)))
    expected = 100 * rows @ tensors["text"].T
    if name == "tip-adapter":
        keys = torch.from_numpy(shots.get("support_features")).float()
        np.testing.assert_allclose(tensors["cache.features"], keys, atol=1e-3)
        hot = torch.nn.functional.one_hot(torch.from_numpy(shots.get("support_labels")), K).float()
        expected += 1.17 * torch.exp(rows @ tensors["cache.features"].T - 1) @ hot
    np.testing.assert_allclose(stored.head.block_logits(rows), expected, atol=1e-3)


def test_an_old_head_is_solved_with(v0, done, tmp_path):
    done("solve", v0 / "shots.npz", "--head", v0 / "taskres.safetensors", "--out", tmp_path / "out")
    same_predictions(table_of(tmp_path / "out"), table_of(v0 / "on_head"))


def test_head_files_written_again(v0, tmp_path):
    """Tensors, metadata and size stay, so that an earlier version reads what this one writes."""
    for name in ("taskres", "tip-adapter"):
        old = v0 / f"{name}.safetensors"
        tensors, metadata = read_tensors(old)
        write_tensors(tmp_path / old.name, tensors, None, metadata=metadata)
        again, same = read_tensors(tmp_path / old.name)
        assert same == metadata
        assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
        assert (tmp_path / old.name).stat().st_size == old.stat().st_size
