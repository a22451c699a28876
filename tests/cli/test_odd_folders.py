"""Results, graphs and feature folders that were changed: one line and exit code 2."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.cli.conftest import DEEP

RUNS = [
    {"n_classes": -6}, {"n_classes": True}, {"n_classes": 6.0}, {"config": []}, {"maps": []},
    {"config": {"likelihood_weight": 1e999, "kl_weight": 1}},
    {"config": {"likelihood_weight": 10**400, "kl_weight": 1}},
    {"config": {"likelihood_weight": True, "kl_weight": 1}},
    {"config": {"likelihood_weight": 1, "kl_weight": -1}}, {"sha256": 3}, {"sha256": {}},
    {"maps": {"image_map": 3}}, {"class_names": {}}, {"class_names": "abcdef"},
]  # fmt: skip


@pytest.mark.parametrize("change", RUNS)
def test_run_json(change, solved, save, arrays, refused, tmp_path):
    run = json.loads((solved / "run.json").read_text())
    (solved / "run.json").write_text(json.dumps(run | change))
    message = refused("predict", solved, save(arrays), "--out", tmp_path / "more")
    assert "run.json" in message or "predictions" in message or "mixture" in message


@pytest.mark.parametrize("text", [DEEP, '{"n_classes": 6, "n_classes": 6}', '{"a": "\\udfff"}'])
def test_texts_of_run_json(text, solved, refused):
    (solved / "run.json").write_text(text)
    assert "run.json: cannot be read as JSON" in refused("evaluate", solved)


@pytest.mark.parametrize(
    ("command", "name"), [("evaluate", "predictions.parquet"), ("predict", "mixture.safetensors")]
)
def test_a_result_that_was_changed_is_refused(
    command, name, solved, save, arrays, refused, tmp_path
):
    if name.endswith("parquet"):
        table = pq.read_table(solved / name)
        pq.write_table(table.take(list(range(76, -1, -1))), solved / name)
    else:
        content = bytearray((solved / name).read_bytes())
        content[-6] ^= 1  # of a variance
        (solved / name).write_bytes(content)
    more = [save(arrays), "--out", tmp_path / "more"] if command == "predict" else []
    assert f"{name}: differs from its run.json" in refused(command, solved, *more)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda x: np.where(np.arange(3) == 1, x + np.float32(0.01), x),
            "differ from its manifest",
        ),
        (lambda x: x[:, ::-1], "differ from its manifest"),
        (lambda x: x.view(">f4"), "bytes in another order"),
    ],
)
def test_a_graph_that_was_changed_is_refused(
    change, expected, save, arrays, succeeds, refused, tmp_path
):
    file = save(arrays)
    succeeds("graph", file, "--out", tmp_path / "graph")
    similarities = tmp_path / "graph/similarities.npy"
    np.save(similarities, change(np.load(similarities)))
    message = refused("solve", file, "--graph", tmp_path / "graph", "--out", tmp_path / "result")
    assert expected in message


GRAPHS = [
    {"search": 3}, {"search": None}, {"recall": "1"}, {"recall": -1}, {"recall": 1e999},
    {"probes": 3}, {"recall_rows": 3}, {"probes": "a", "lists": 3}, {"index": ["a"]},
    {"recall_rows": 3, "weight_error": [1]}, {"recall_rows": -3, "weight_error": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("change", GRAPHS)
def test_manifests_of_graphs(change, save, arrays, succeeds, refused, tmp_path):
    file = save(arrays)
    succeeds("graph", file, "--out", tmp_path / "graph")
    manifest = json.loads((tmp_path / "graph/manifest.json").read_text())
    (tmp_path / "graph/manifest.json").write_text(json.dumps(manifest | change))
    message = refused("solve", file, "--graph", tmp_path / "graph", "--out", tmp_path / "result")
    assert "manifest.json: " in message


FOLDER = {
    "shards.pop": (lambda m: m.pop("shards"), "shards is missing"),
    "shards": (lambda m: m.update(shards=None), "shards is None"),
    "complete": (lambda m: m.update(complete="yes"), "complete is 'yes'"),
    "config": (lambda m: m.update(config=[]), "config is []"),
    "model": (lambda m: m["config"].update(model=3), "model is 3"),
}


def test_a_valid_folder(folder, succeeds, tmp_path):
    succeeds("solve", folder, "--out", tmp_path / "result")


@pytest.mark.parametrize("kind", FOLDER)
def test_manifests_of_folders(kind, folder, refused, tmp_path):
    change, expected = FOLDER[kind]
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    message = refused("solve", folder, "--out", tmp_path / "result")
    assert f"manifest.json: {expected}" in message


def test_a_manifest_without_shards_skips_no_hash(folder, refused, tmp_path):
    rows = np.load(folder / "img_emb/img_emb_00000.npy")
    np.save(folder / "img_emb/img_emb_00000.npy", rows[::-1])
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["shards"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "manifest.json" in refused("solve", folder, "--out", tmp_path / "result")


def test_shards_of_no_numbers(folder, refused, tmp_path):
    (folder / "manifest.json").unlink()
    np.save(folder / "img_emb/img_emb_00001.npy", np.zeros((3, 33), "f4,f4"))
    (folder / "metadata/metadata_00000.parquet").unlink()
    message = refused("solve", folder, "--out", tmp_path / "result")
    assert "img_emb_00001.npy: expected numbers" in message
