"""The tasks of `bench.accuracy.rivals` are what their names say, and its tables what it found."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest

from bench import rival_tables, tables
from bench.accuracy import rivals
from bench.common import record
from tests.conftest import balanced
from transclip_fast.errors import InputError
from transclip_fast.methods import METHODS


def test_as_many_rows_of_each_class():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [9, 5, 7]))
    draw = rivals.balanced(labels, 3, np.random.default_rng(1))
    assert np.bincount(labels[draw.rows]).tolist() == [5, 5, 5]
    assert len(set(draw.rows)) == 15


@pytest.mark.parametrize("shots", [1, 16])
def test_shots_validation_rows_and_queries_are_different_images(shots, golden_dir, monkeypatch):
    monkeypatch.setenv("TRANSCLIP_GOLDEN", str(golden_dir))
    monkeypatch.setattr(rivals, "DRAWS", 2)
    tasks = [*rivals.tasks_with_text(shots)]
    for name in rivals.SETS:
        tasks += rivals.tasks_without_text(name, shots)
    assert len(tasks) == 2 * (3 + 3)
    for task in tasks:
        given, n_classes = task.arguments, task.labels.max() + 1
        assert len(given["X"]) == len(task.labels)
        rows = [given["X"]]
        for use, number in (("support", shots), ("validation", min(shots, 4))):
            sizes = np.bincount(given[f"{use}_labels"], minlength=n_classes)
            assert set(sizes) == {number}
            rows.append(given[f"{use}_features"])
        images = np.concatenate(rows)
        own = [len(np.unique(part, axis=0)) for part in rows]  # a set has a few images twice
        assert len(np.unique(images, axis=0)) >= sum(own) - 3
    first, second = (task.arguments["validation_features"] for task in tasks[:2])
    assert (first != second).any()


def task(problem, *, texts=True, shots=True):
    """A task of about 100 rows, with 4 shots of a class."""
    x, t, labels = problem(n=140, k=5, d=24, noise=0.06)
    chosen = balanced(labels, 4)
    others = np.setdiff1d(np.arange(140), chosen)
    found = {"X": x[others[20:]]}
    if texts:
        found["text_features"] = t
    if shots:
        for use, rows in (("support", chosen), ("validation", others[:20])):
            found |= rivals.labelled(use, x, labels, rows)
    return rivals.Task("made", found, labels[others[20:]])


@pytest.fixture
def quick(monkeypatch):
    """Few steps, and few methods."""
    names = ("zero-shot", "stata", "bd-cspn", "tim-adm", "logistic-regression")
    monkeypatch.setattr(rivals, "METHODS", {name: METHODS[name] for name in names})
    monkeypatch.setitem(rivals.THINNED, "bd-cspn", {"n_rows": (0, 2), "eps": (10.0,)})
    monkeypatch.setitem(rivals.THINNED["tim-adm"], "tau", (15.0,))


def test_settings_are_chosen_on_validation_rows_and_counted(problem, quick):
    given = task(problem)
    found = rivals.measure(given)
    runs = {arm: entry["runs"] for arm, entry in found.items()}
    assert runs == {
        ("zero-shot", "texts"): 1,
        ("stata", "texts"): 1,
        ("bd-cspn", "shots"): 2,
        ("bd-cspn", "both"): 2,
        ("tim-adm", "shots"): 1,
        ("tim-adm", "both"): 1,
        ("logistic-regression", "shots"): 7,
        ("logistic-regression", "both"): 7,
        ("transclip", "both"): 4,
    }
    best = rivals.Arm("bd-cspn", "shots")
    chosen = found[best]["chosen"]
    model = METHODS["bd-cspn"](anchors="shots", device="cpu", **chosen).fit(**given.arguments)
    right = 100 * (model.transduction_ == given.labels).mean()
    assert found[best]["accuracy"] == pytest.approx(right)
    assert found[rivals.Arm("tim-adm", "both")]["assumes_balanced"]
    assert not found[best]["assumes_balanced"]


def test_without_shots_and_without_texts(problem, quick):
    zero_shot = rivals.measure(task(problem, shots=False))
    assert {entry["runs"] for entry in zero_shot.values()} == {1}
    assert {arm.text for arm in zero_shot} == {"texts"}
    assert rivals.Arm(rivals.UNCHARGED, "texts") in zero_shot
    alone = rivals.measure(task(problem, texts=False))
    assert {arm.text for arm in alone} == {"shots"}
    assert {arm.method for arm in alone}.isdisjoint({"zero-shot", "stata"})
    assert alone[rivals.Arm(rivals.ON_LR, "shots")]["runs"] == 7 + 4
    assert alone[rivals.Arm("transclip", "shots")]["accuracy"] > 50


@pytest.fixture
def results(problem, quick, monkeypatch, tmp_path):
    """A folder with a clean line of each setting."""
    tasks = {
        rivals.ZERO_SHOT: task(problem, shots=False),
        rivals.WITH_TEXT: task(problem),
        rivals.WITHOUT_TEXT: task(problem, texts=False),
    }
    found = {key: lambda family=key[0]: iter([tasks[family]] * 2) for key in rivals.settings()}
    measured = {id(given): rivals.measure(given) for given in tasks.values()}
    monkeypatch.setattr(rivals, "measure", lambda given: measured[id(given)])
    monkeypatch.setattr(rivals, "settings", lambda: found)
    monkeypatch.setattr(rival_tables, "settings", lambda: found)
    monkeypatch.setattr(rivals, "record", partial(record, folder=tmp_path))
    assert rivals.main([], say=lambda _: None) == 0
    file = tmp_path / "rivals.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == len(found) == 15
    for row in rows:
        row["machine"] |= {"dirty": False, "commit": "abcdef123"}
        for method in row["methods"]:
            ahead = method["method"] == "stata" and row["setting"] == "long tail"
            method["accuracy"] = [91.0, 93.0] if ahead else [80.0, 82.0]
            if method["method"] == "transclip":
                method["accuracy"] = [90.0, 92.0]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_tables(results):
    short = rival_tables.short(results).splitlines()
    assert short[2].startswith("| transclip | 4 |  | **91.0** | 91.0 | **91.0** |")
    (line,) = (x for x in short if x.startswith("| tim-adm |"))
    assert line.startswith("| tim-adm | 1 | equal classes | 81.0 | 81.0 |")
    (line,) = (x for x in short if x.startswith("| stata |"))
    assert "| 81.0 | **92.0** | 81.0 |" in line
    assert line.endswith("|  |  |  |")  # without text
    text = "In 1 of 9 settings measured another method is ahead: long tail (stata 92.0, "
    assert rival_tables.lost(results) == f"{text}TransCLIP 91.0)."
    every = rival_tables.every(results)
    assert "| stata | texts | 1 |  | 81.00 (+0.0) | 92.00 (+11.0) | 81.00 (+0.0) |" in every
    assert "| bd-cspn | both | 2 |  | 81.00 (+0.0) |" in every
    assert f"| {rivals.ON_LR} | shots | 11 |  | 81.00 ± 1.41 |" in every
    file = results / "rivals.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[1:]))
    assert all("Not recorded" in block(results) for block in rival_tables.BLOCKS.values())


def test_costs_are_tabulated(tmp_path, monkeypatch):
    from bench.speed import methods

    monkeypatch.setattr(methods, "record", partial(record, folder=tmp_path))
    command = ["--queries", "200", "--classes", "9", "--dim", "16", "--methods", "stata", "zlap"]
    assert methods.main(command) == 0
    file = tmp_path / "methods.jsonl"
    file.write_text(file.read_text().replace('"dirty": true', '"dirty": false'))
    found = rival_tables.costs(tmp_path)
    assert "| 200 | 9 | 16 | stata | texts | " in found
    monkeypatch.setattr(methods, "MOST_BYTES", 1 << 20)
    with pytest.raises(InputError, match="memory: stata keeps 3 arrays"):
        methods.run_method("stata", 200, 9, 16)


def test_only_lines_of_a_clean_tree_count(results):
    file = results / "rivals.jsonl"
    file.write_text(file.read_text().replace('"dirty": false', '"dirty": true'))
    assert tables.newest("rivals", "family", folder=results) == []
    assert rival_tables.short(results) == rival_tables.NOTHING
