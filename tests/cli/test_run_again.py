"""`run` again: stages that are there are kept, and what changed is done anew."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.cli.conftest import contents
from transclip_fast.cli.session import counted
from transclip_fast.store.features import load_features


def test_run_again_sorts_the_images_that_are_there_now(images, names, tiny, cli, tmp_path):
    command = (
        "run", images(5), "--classes", names, *tiny,
        "--out", tmp_path / "out", "--sort-into", tmp_path / "sorted",
    )  # fmt: skip
    ran = cli(*command)
    folders = len([path for path in (tmp_path / "sorted").iterdir() if path.is_dir()])
    line = f" images linked into {counted(folders, 'class folder')} of {tmp_path / 'sorted'}/"
    assert ran.out.splitlines()[-1] == f"5{line}"
    (tmp_path / "images/dog/001.png").unlink()
    again = cli(*command)
    assert (again.code, again.out.splitlines()[-1]) == (0, f"4{line}")
    links = [path for path in (tmp_path / "sorted").rglob("*") if path.is_symlink()]
    found = {path.resolve() for path in links}
    assert found == {path.resolve() for path in (tmp_path / "images").rglob("*.png")}
    inside = cli(*command[:-1], tmp_path / "images/sorted")
    assert (inside.code, inside.err.count("is in ")) == (2, 1)


def test_run_again_rejects_another_share(images, names, tiny, cli, tmp_path):
    command = ("run", images(10), "--classes", names, *tiny, "--out", tmp_path / "out")
    result = tmp_path / "out/result"
    for options, rejected in ((), 0), (("--reject", 0.2), 2), (("--reject", 0.5), 5), ((), 0):
        ran = cli(*command, *options)
        assert ran.code == 0
        assert (f"\n{rejected} labels rejected" in ran.out) == bool(rejected)
        table = pq.read_table(result / "predictions.parquet")
        assert ("rejected" in table.column_names) == bool(options)
        run = json.loads((result / "run.json").read_text())
        flag = [option for option in run["options"] if option["option"] == "--reject"]
        assert flag == [{"option": "--reject", "value": str(share)} for share in options[1:]]
        before = contents(result)
        assert cli(*command, *options).code == 0
        assert contents(result) == before  # and is not solved again


def test_a_run_that_is_done_removes_what_a_killed_one_left(images, names, tiny, cli, tmp_path):
    command = ("run", images(6), "--classes", names, *tiny, "--out", tmp_path / "out")
    assert cli(*command).code == 0
    whole = contents(tmp_path / "out")
    for name in (".result.replaced", ".graph.partial", "..result.graph.partial", ".result.graph"):
        (tmp_path / "out" / name).mkdir()
        (tmp_path / "out" / name / "manifest.json").write_text("{}")
    for name in (".result.lock", ".features.lock", ".result.solve-0.npz", ".graph.search.npz"):
        (tmp_path / "out" / name).touch()
    assert cli(*command).code == 0
    assert contents(tmp_path / "out") == whole


def test_run_again_after_images_changed(images, names, tiny, cli, tmp_path):
    """Added, removed, repaired: every file of every stage is that of one run, times aside."""
    command = ("run", images(12), "--classes", names, "--labels-from-folders", *tiny)
    broken = tmp_path / "images/dog/001.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:50])
    first = cli(*command, "--out", tmp_path / "out")
    assert "1 could not be read" in first.out
    broken.write_bytes(whole)
    (tmp_path / "images/cat/004.png").unlink()
    shutil.copy(broken, tmp_path / "images/cat/003.png")
    again = cli(*command, "--out", tmp_path / "out")
    assert again.code == 0
    assert "2 of 12 images encoded, 10 kept in " in again.out
    assert "no longer there lose their rows: 1 (cat/004.png)" in again.err
    assert cli(*command, "--out", tmp_path / "fresh").code == 0
    grown, fresh = contents(tmp_path / "out"), contents(tmp_path / "fresh")
    assert grown.keys() == fresh.keys()
    timed = {Path("graph/manifest.json"), Path("result/run.json"), Path("report.html")}
    assert {name for name in grown if grown[name] != fresh[name]} <= timed


@pytest.mark.parametrize("as_was", [True, False])
def test_images_compared_by_content(images, tiny, cli, tmp_path, as_was):
    command = ("encode", images(12), *tiny, "--out", tmp_path / "out", "--by-content")
    assert cli(*command).code == 0
    for file in (tmp_path / "images").rglob("*.png"):
        os.utime(file, (1, 1))
    if not as_was:
        shutil.copy(tmp_path / "images/cat/000.png", tmp_path / "images/cat/002.png")
    again = cli(*command).out
    assert ("1 of 12 images encoded, 11 kept" in again) != as_was
    assert ("0 of 12 images encoded, 12 kept" in again) == as_was


@pytest.mark.parametrize(
    "name", ["graph/neighbors.npy", "result/predictions.parquet", "result/mixture.safetensors"]
)
def test_a_damaged_stage_is_done_again(images, names, tiny, cli, tmp_path, name):
    command = ("run", images(12), "--classes", names, *tiny, "--out", tmp_path / "out")
    assert cli(*command).code == 0
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / name).write_bytes(b"")
    (tmp_path / "out/result/run.json").write_text("{}")
    assert cli(*command).code == 0
    assert contents(tmp_path / "out").keys() == whole.keys()
    assert (tmp_path / "out" / name).read_bytes() == whole[Path(name)]


def test_a_result_of_other_parameters_is_not_taken(images, names, tiny, cli, tmp_path):
    command = ("run", images(12), "--classes", names, *tiny, "--out", tmp_path / "out")
    assert cli(*command).code == 0
    features, result = tmp_path / "out/features", tmp_path / "out/result"
    assert cli("solve", features, "--kl-weight", 0.3, "--out", result).code == 0
    assert cli(*command).code == 0
    assert json.loads((result / "run.json").read_text())["config"]["kl_weight"] == 1
    assert cli("predict", result, features, "--out", tmp_path / "new").code == 0
    shutil.rmtree(result)
    (tmp_path / "new").rename(result)
    assert cli(*command).code == 0
    assert json.loads((result / "run.json").read_text())["kind"] == "solve"


def lists(folder):
    """The neighbours that a run solved with, and those in its graph folder."""
    used = pq.read_table(folder / "result/predictions.parquet")["neighbors"].to_pylist()
    found = np.load(folder / "graph/neighbors.npy").tolist()
    return used, [[neighbor for neighbor in row if neighbor >= 0] for row in found]


def test_a_result_of_another_search_is_not_taken(images, names, tiny, cli, tmp_path):
    command = ("run", images(12), "--classes", names, *tiny, "--out", tmp_path / "out")
    assert cli(*command).code == 0
    exact, _ = lists(tmp_path / "out")
    other = ("--index", "IVF4,Flat", "--recall", 0)
    assert cli(*command, *other).code == 0
    used, found = lists(tmp_path / "out")
    assert used == found
    assert used != exact
    run = json.loads((tmp_path / "out/result/run.json").read_text())
    assert (run["graph"]["search"], run["graph"]["index"]) == ("faiss", "IVF4,Flat")
    before = contents(tmp_path / "out")
    assert cli(*command, *other).code == 0
    assert contents(tmp_path / "out") == before
    assert cli(*command).code == 0
    assert lists(tmp_path / "out") == (exact, exact)


def test_a_result_of_another_version_is_solved_again(images, names, tiny, cli, tmp_path):
    command = ("run", images(12), "--classes", names, *tiny, "--out", tmp_path / "out")
    assert cli(*command).code == 0
    files = {name: tmp_path / "out" / name for name in ("result/run.json", "graph/manifest.json")}
    made = {name: json.loads(file.read_text()) for name, file in files.items()}
    run, manifest = made.values()
    del run["graph_sha256"], manifest["identity"]["version"]
    run["versions"]["transclip_fast"] = "0.0.9"
    for name, file in files.items():
        file.write_text(json.dumps(made[name]))
    again = cli(*command, "--json")
    assert again.code == 0
    assert "out/result: was solved by version 0.0.9; " in again.err
    run = json.loads(files["result/run.json"].read_text())
    assert any("version 0.0.9" in text for text in run["warnings"])
    assert run["seconds"].keys() >= {"graph", "solve"}
    assert run["graph_sha256"] == json.loads(files["graph/manifest.json"].read_text())["sha256"]
    assert cli(*command).err == ""


def test_other_classes_solve_again_from_the_same_features(images, names, tiny, cli, tmp_path):
    command = ("run", images(12), "--classes", names, *tiny, "--out", tmp_path / "out")
    assert cli(*command).code == 0
    before = (tmp_path / "out/features/img_emb/img_emb_00000.npy").stat().st_mtime_ns
    names.write_text("bird\nfish\nhorse\n")
    assert cli(*command).code == 0
    assert (tmp_path / "out/features/img_emb/img_emb_00000.npy").stat().st_mtime_ns == before
    run = json.loads((tmp_path / "out/result/run.json").read_text())
    assert run["class_names"] == ["bird", "fish", "horse"]


@pytest.mark.parametrize("change", ["renamed", "removed"])
def test_images_of_other_names_or_places_are_those_of_the_result(
    change, images, names, tiny, cli, tmp_path
):
    """Though the features are as before: those of the image that could not be read are none."""
    command = ("run", images(6), "--classes", names, *tiny, "--out", tmp_path / "out")
    broken = tmp_path / "images/cat/001.png"
    broken.write_bytes(b"no picture")
    assert cli(*command).code == 0
    before = (tmp_path / "out/features/img_emb/img_emb_00000.npy").read_bytes()
    if change == "renamed":
        (tmp_path / "images/dog/003.png").rename(tmp_path / "images/dog/004.png")
    else:
        broken.unlink()
    assert cli(*command).code == 0
    assert (tmp_path / "out/features/img_emb/img_emb_00000.npy").read_bytes() == before
    features = load_features(tmp_path / "out/features")
    table = pq.read_table(tmp_path / "out/result/predictions.parquet")
    assert table["key"].to_pylist() == features.keys
    assert table["source_row"].to_pylist() == features.source_rows.tolist()
    assert features.source_rows.tolist() == ([0, 2, 3, 4, 5, 6] if broken.exists() else [*range(6)])
    assert ("dog/004.png" in features.keys) == (change == "renamed")
    done = contents(tmp_path / "out/result")
    assert cli(*command).code == 0
    assert contents(tmp_path / "out/result") == done


@pytest.mark.parametrize(
    ("entry", "other"),
    [
        ("head", {"name": "taskres", "accuracy": None, "parameters": {}}),
        ("encoder", {"model": "tiny", "weights": "0" * 64}),
        ("features", "../elsewhere"),
        ("maps", {"text_map": "0" * 64}),
        ("method", "stata"),
    ],
)
def test_a_result_that_was_made_otherwise_is_not_taken(
    entry, other, images, names, tiny, cli, tmp_path
):
    """As by `solve` in the same place: the hashes of the arrays do not tell."""
    command = ("run", images(6), "--classes", names, *tiny, "--out", tmp_path / "out")
    assert cli(*command).code == 0
    file = tmp_path / "out/result/run.json"
    run = json.loads(file.read_text())
    file.write_text(json.dumps({**run, entry: other}))
    assert cli(*command).code == 0
    assert json.loads(file.read_text())[entry] == run[entry] != other
