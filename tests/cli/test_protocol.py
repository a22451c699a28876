"""`protocol`: its tables are those of the library, and a killed one resumes."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.cli.conftest import contents
from tests.conftest import unit
from transclip_fast import TransCLIP
from transclip_fast.heads import fit_head
from transclip_fast.protocols.data import load_data, load_splits

QUICK = ("--head", "tip-adapter", "linear-probe", "--shots", 1, 4, "--seeds", 2)


def runs_of(folder):
    return pq.read_table(folder / "runs.parquet").to_pylist()


def accuracy(labels, truth):
    return round(100 * float((np.asarray(labels) == truth).mean()), 4)


def test_few_shot(pets, done, tmp_path):
    paths = pets("pets"), pets("dtd", k=4)
    out = done("protocol", "few-shot", *paths, *QUICK, "--out", tmp_path / "table", "--json")
    rows = runs_of(tmp_path / "table")
    assert len(rows) == 2 * 2 * 2 * 2
    assert len({tuple(row[c] for c in ("data", "head", "shots", "seed")) for row in rows}) == 16
    (data,) = load_data(paths[:1], pools=True)
    for n in (1, 4):
        shots, held_out = data.pools["support"].draw(n, 1), data.pools["validation"].draw(n, 1)
        head = fit_head(
            "tip-adapter",
            data.text,
            shots.features,
            shots.labels,
            validation_features=held_out.features,
            validation_labels=held_out.labels,
            seed=1,
        )
        model = TransCLIP().fit(data.features, data.text, **head.prior(data.features))
        (row,) = (
            row
            for row in rows
            if [row[c] for c in ("data", "head", "shots", "seed")] == ["pets", "tip-adapter", n, 1]
        )
        assert row["head_accuracy"] == accuracy(head.predict(data.features), data.labels)
        assert row["accuracy"] == accuracy(model.transduction_, data.labels)
        assert row["zero_shot_accuracy"] == accuracy(model.zero_shot_labels_, data.labels)
        chosen = head.parameters
        assert row["head_parameters"] == f"alpha {chosen['alpha']:g}, beta {chosen['beta']:g}"
    assert row["queries"] == 77
    table = pq.read_table(tmp_path / "table/table.parquet").to_pylist()
    assert json.loads(out)["table"] == table
    assert len(table) == 2 * 2 * 2 + 2 * 2
    of_seeds = [
        r["accuracy"]
        for r in rows
        if (r["data"], r["head"], r["shots"]) == ("pets", "tip-adapter", 4)
    ]
    (mean,) = (r for r in table if (r["data"], r["head"], r["shots"]) == ("pets", "tip-adapter", 4))
    assert mean["accuracy"] == pytest.approx(np.mean(of_seeds), abs=1e-4)
    text = (tmp_path / "table/table.md").read_text()
    assert f"| pets | tip-adapter | 4 | 2 | {mean['zero_shot_accuracy']:.2f} ± 0.00 |" in text


@pytest.mark.parametrize("command", ["few-shot", "base-to-new", "cross-dataset", "domains"])
def test_prompt_ensemble_is_the_zero_shot_row(command, pets, done, tmp_path):
    path = pets(support_features=None, support_labels=None)
    others = (pets("others"),) if command in ("cross-dataset", "domains") else ()
    done("protocol", command, path, *others, "--head", "prompt-ensemble", "--out", tmp_path / "t")
    (data,) = load_data(others or (path,), pools=False)
    targets = data.halves if command == "base-to-new" else [data]
    rows = runs_of(tmp_path / "t")
    assert len(rows) == len(targets)
    for row, target in zip(rows, targets, strict=True):
        model = TransCLIP().fit(target.features, target.text)
        right = accuracy(model.zero_shot_labels_, target.labels)
        assert row["zero_shot_accuracy"] == row["head_accuracy"] == right
        assert row["accuracy"] == accuracy(model.transduction_, target.labels)
        assert (row["shots"], row["seed"]) == (0, 0)


def test_transclip_fs_has_the_shots_itself(pets, done, tmp_path):
    path = pets()
    done(
        "protocol", "few-shot", path, "--head", "transclip-fs", "--shots", 2, "--seeds", 1,
        "--out", tmp_path / "table",
    )  # fmt: skip
    (data,), (row,) = load_data([path], pools=True), runs_of(tmp_path / "table")
    shots, held_out = data.pools["support"].draw(2, 0), data.pools["validation"].draw(2, 0)
    model = TransCLIP().fit(
        data.features,
        data.text,
        support_features=shots.features,
        support_labels=shots.labels,
        validation_features=held_out.features,
        validation_labels=held_out.labels,
    )
    assert row["accuracy"] == accuracy(model.transduction_, data.labels)
    assert row["head_accuracy"] is None
    assert row["head_parameters"] == f"gamma {model.gamma_:g}"


def test_transclip_fs_without_validation_rows_has_its_own_gamma(pets, done, tmp_path):
    path = pets(validation_features=None, validation_labels=None)
    done(
        "protocol", "few-shot", path, "--head", "transclip-fs", "--shots", 2, "--seeds", 1,
        "--out", tmp_path / "table",
    )  # fmt: skip
    (data,), (row,) = load_data([path], pools=True), runs_of(tmp_path / "table")
    shots = data.pools["support"].draw(2, 0)
    support = {"support_features": shots.features, "support_labels": shots.labels}
    model = TransCLIP().fit(data.features, data.text, **support)
    assert row["accuracy"] == accuracy(model.transduction_, data.labels)
    assert row["head_parameters"] == f"gamma {model.gamma_:g}"


def test_a_class_with_fewer_shots_leaves_no_gamma(pets, cli, tmp_path):
    made = dict(np.load(pets()))
    kept = made["support_labels"] != 2
    kept[np.flatnonzero(~kept)[0]] = True
    pools = {name: made[name][kept] for name in ("support_features", "support_labels")}
    ran = cli(
        "protocol", "few-shot", pets(**pools), "--head", "transclip-fs", "--shots", 2,
        "--seeds", 1, "--out", tmp_path / "table",
    )  # fmt: skip
    assert ran.code == 0
    assert "1 of 6 classes have fewer than 2 rows" in ran.err
    assert runs_of(tmp_path / "table")[0]["head_parameters"] == ""


def test_the_name_of_a_data_set_on_a_disk_that_fails_once(pets, monkeypatch):
    def load(*args, **options):
        found = load_splits(*args, **options)
        monkeypatch.setattr("os.path.isfile", lambda _: False)  # as where stat fails
        return found

    monkeypatch.setattr("transclip_fast.protocols.data.load_splits", load)
    assert load_data([pets()], pools=True)[0].name == "pets"


def test_a_killed_protocol_goes_on(pets, cli, done, tmp_path, monkeypatch):
    command = ("protocol", "few-shot", pets(), *QUICK, "--out", tmp_path / "table")
    calls = []

    def third_fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit_head(*args, **kwargs)

    monkeypatch.setattr("transclip_fast.protocols.plans.fit_head", third_fails)
    assert cli(*command).code == 1
    assert not (tmp_path / "table/table.md").exists()
    assert cli(*command).code == 0
    assert len(calls) == 3 + 6
    before = contents(tmp_path / "table/runs")
    assert len(before) == 8
    table = (tmp_path / "table/table.md").read_text()
    assert cli(*command).code == 0
    assert len(calls) == 9
    assert contents(tmp_path / "table/runs") == before
    done("protocol", "few-shot", pets(), *QUICK, "--out", tmp_path / "fresh")
    assert (tmp_path / "fresh/table.md").read_text() == table


def test_other_data_are_run_anew(pets, done, tmp_path):
    command = ("--head", "tip-adapter", "--shots", 1, "--seeds", 1, "--out", tmp_path / "table")
    done("protocol", "few-shot", pets(), *command)
    before = runs_of(tmp_path / "table")
    done("protocol", "few-shot", pets(k=5), *command)
    assert len(runs_of(tmp_path / "table")) == 1
    assert runs_of(tmp_path / "table") != before


def test_labels_by_name_are_run_anew_with_other_class_names(pets, done, tmp_path, problem):
    """The names of labels are the same, the classes that they mean are not."""
    names = np.array(list("fbdace"))
    _, _, labels = problem()
    command = ("--head", "tip-adapter", "--shots", 1, "--seeds", 1, "--out", tmp_path / "table")
    found = []
    for order in (np.roll(names, 1), names):
        done("protocol", "few-shot", pets(labels=names[labels], class_names=order), *command)
        found.append(runs_of(tmp_path / "table")[0]["zero_shot_accuracy"])
    (data,) = load_data([tmp_path / "pets.npz"], pools=True)
    assert found[1] == accuracy((data.features @ data.text.T).argmax(1), labels) != found[0]


def test_labels_in_another_order_than_the_texts(pets, cli, tmp_path, problem):
    features, _, labels = problem(n=167, noise=0.06)
    text = unit(np.stack([features[labels == k].mean(0) for k in range(6)]))
    paths = pets(), pets("turned", text_features=text, labels=(labels[90:] + 1) % 6)
    command = "--head", "tip-adapter", "--shots", 1, "--seeds", 1, "--out", tmp_path / "table"
    ran = cli("protocol", "few-shot", *paths, *command)
    assert ran.code == 0
    assert ran.err.startswith(f"warning: {paths[1]}: labels: zero-shot labels match on ")
    assert ran.err.count("warning: ") == 1
    assert json.loads((tmp_path / "table/run.json").read_text())["warnings"]


def test_more_shots_than_there_are(pets, cli, tmp_path):
    ran = cli(
        "protocol", "few-shot", pets(), "--head", "tip-adapter", "--shots", 50, "--seeds", 1,
        "--out", tmp_path / "table",
    )  # fmt: skip
    assert ran.code == 0
    assert ran.err.startswith("warning: pets: 6 of 6 classes have fewer than 50 rows")
    assert ran.err.count("\n") == 1


def adapter_of(data, seed):
    """The head that a protocol trains on four shots of these data."""
    shots, held_out = (data.pools[part].draw(4, seed) for part in ("support", "validation"))
    return fit_head(
        "clip-adapter",
        data.text,
        shots.features,
        shots.labels,
        validation_features=held_out.features,
        validation_labels=held_out.labels,
        seed=seed,
    )


def test_cross_dataset(pets, done, tmp_path):
    paths = pets("source"), pets("flowers", k=9), pets("dtd", k=4)
    done("protocol", "cross-dataset", *paths, "--seeds", 1, "--shots", 4, "--out", tmp_path / "t")
    rows = runs_of(tmp_path / "t")
    assert [(row["source"], row["data"]) for row in rows] == [
        ("source", "flowers"),
        ("source", "dtd"),
    ]
    source, flowers, _ = load_data(paths, pools=True)
    head = adapter_of(source, seed=0).transfer(flowers.text)
    assert rows[0]["head_accuracy"] == accuracy(head.predict(flowers.features), flowers.labels)


def test_base_to_new(pets, done, tmp_path):
    paths = pets("pets", k=5), pets("dtd", k=4)
    command = ("protocol", "base-to-new", *paths, "--seeds", 2, "--shots", 4)
    done(*command, "--out", tmp_path / "t")
    rows = runs_of(tmp_path / "t")
    assert [(row["data"], row["classes"], row["seed"]) for row in rows] == [
        (data, classes, seed)
        for data in ("pets", "dtd")
        for seed in (0, 1)
        for classes in ("base", "new")
    ]
    (data, _) = load_data(paths, pools=True)
    base, new = data.halves
    assert (len(base.text), len(new.text)) == (3, 2)
    head = adapter_of(base, seed=1)
    for half, row in ((base, rows[2]), (new, rows[3])):
        moved = head if half is base else head.transfer(new.text)
        assert row["queries"] == len(half.labels)
        assert row["head_accuracy"] == accuracy(moved.predict(half.features), half.labels)
        model = TransCLIP().fit(half.features, half.text, **moved.prior(half.features))
        assert row["accuracy"] == accuracy(model.transduction_, half.labels)
        assert row["zero_shot_accuracy"] == accuracy(model.zero_shot_labels_, half.labels)
    table = (tmp_path / "t/table.md").read_text()
    assert "| pets | harmonic mean | clip-adapter | 4 | 2 |" in table
    assert "| (average) | harmonic mean | clip-adapter | 4 | 2 |" in table
    assert len(table.splitlines()) == 2 + 9


def test_domains(pets, done, tmp_path, problem):
    names = np.array(["a cat", "dog", "owl", "bee", "elk", "fox"])
    features, text, labels = problem(n=200, noise=0.06)
    chosen = [4, 0, 2]
    kept = np.isin(labels, chosen)
    target = {
        "image_features": features[kept],
        "labels": np.array([chosen.index(k) for k in labels[kept]]),
        "text_features": text[chosen],
    }
    source = pets("source", class_names=names)
    np.savez(tmp_path / "named.npz", **target, class_names=np.array(["elk", "A_cat", "owl"]))
    np.savez(tmp_path / "listed.npz", **target)
    (tmp_path / "subset.txt").write_text("4\n0\n2\n")
    done(
        "protocol", "domains", source, tmp_path / "named.npz", tmp_path / "listed.npz",
        "--subset", "listed", tmp_path / "subset.txt", "--shots", 4, "--seeds", 1,
        "--head", "tip-adapter", "linear-probe",
        "--out", tmp_path / "table",
    )  # fmt: skip
    rows = runs_of(tmp_path / "table")
    assert len(rows) == 2 * 2
    (data,) = load_data([source], pools=True)
    shots, held_out = data.pools["support"].draw(4, 0), data.pools["validation"].draw(4, 0)
    for row in rows:
        head = fit_head(
            row["head"],
            data.text,
            shots.features,
            shots.labels,
            validation_features=held_out.features,
            validation_labels=held_out.labels,
        )
        logits = head.logits(torch.from_numpy(features[kept])).numpy()[:, chosen]
        assert row["head_accuracy"] == accuracy(logits.argmax(1), target["labels"])


def test_a_folder_with_other_files_is_left_alone(pets, refused, tmp_path):
    (tmp_path / "album").mkdir()
    (tmp_path / "album/predictions.parquet").write_bytes(b"")
    message = refused("protocol", "few-shot", pets(), *QUICK, "--out", tmp_path / "album")
    assert "album: holds other files (predictions.parquet)" in message


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("few-shot", "none.npz"), "none.npz: no such file"),
        (("few-shot", "pets.npz", "--head", "lora"), "head 'lora' is not known"),
        (("few-shot", "pets.npz", "other/pets.npz"), "pets: two data sets have this name"),
        (("few-shot", "bare.npz"), "bare.npz: has no support_features"),
        (("cross-dataset", "pets.npz", "bare.npz", "--head", "taskres"), "bound to the classes"),
        (("base-to-new", "pets.npz", "--head", "taskres"), "taskres is bound to the classes"),
        (("base-to-new", "half.npz"), "half: has no query of the classes 3 to 5"),
        (("cross-dataset", "pets.npz", "narrow.npz"), "narrow: has 20 dimensions, pets 33"),
        (("domains", "pets.npz", "bare.npz", "--subset", "none", "s.txt"), "none: is no target"),
        (("domains", "pets.npz", "bare.npz", "--subset", "bare", "s.txt"), "line 2: label '9'"),
        (("domains", "pets.npz", "bare.npz", "--subset", "bare", "t.txt"), "t.txt: 2 classes"),
        (
            ("domains", "pets.npz", "bare.npz", *("--subset", "bare", "s.txt") * 2),
            "--subset bare: is given twice",
        ),
        (("domains", "pets.npz", "bare.npz"), "bare: has 4 classes, pets 6"),
        (("domains", "pets.npz", "narrow.npz"), "narrow: has 20 dimensions, pets 33"),
        (
            ("domains", "pets.npz", "bare.npz", "--subset", "bare", "u.txt"),
            "u.txt: line 2: '-1' is no class of pets",
        ),
        (
            ("domains", "pets.npz", "bare.npz", "--subset", "bare", "v.txt"),
            "v.txt: class 1 of bare is taken as 'class 2' of pets, whose text is that of class 2",
        ),
        (
            ("domains", "pets.npz", "turned.npz"),
            "turned: class 0 of turned is taken as 'class 0' of pets, whose text is that of",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_run(command, expected, pets, problem, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    pets("other/pets")
    pets("half", labels=np.zeros(77))
    pets()
    for name, d in (("bare", 33), ("narrow", 20)):
        features, text, labels = problem(k=4, d=d)
        np.savez(
            tmp_path / f"{name}.npz", image_features=features, text_features=text, labels=labels
        )
    (tmp_path / "s.txt").write_text("1\n9\n")
    (tmp_path / "t.txt").write_text("1\n3\n")
    (tmp_path / "u.txt").write_text("0\n-1\n2\n3\n")
    (tmp_path / "v.txt").write_text("0\n2\n1\n3\n")
    with np.load("pets.npz") as whole:
        arrays = {**whole, "text_features": whole["text_features"][::-1]}
    np.savez("turned.npz", **{**arrays, "labels": 5 - arrays["labels"]})
    ran = cli("protocol", *command, "--shots", 1, "--seeds", 1, "--out", tmp_path / "table")
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert expected in ran.err
    assert not (tmp_path / "table/table.md").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": "98"}, {"accuracy": None}, {"accuracy": 1e999}, {"queries": True},
        {"head_parameters": [1]}, {"head_parameters": {"alpha": "a"}}, {"seed": 1}, {"more": 1},
        {"shots": True}, {"head_seconds": {}},
    ],
)  # fmt: skip
def test_a_run_that_was_changed_is_refused(change, pets, done, cli, tmp_path):
    command = "protocol", "few-shot", pets(), "--head", "tip-adapter", "--shots", 1, "--seeds", 1
    done(*command, "--out", tmp_path / "table")
    (file,) = (tmp_path / "table/runs").iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    ran = cli(*command, "--out", tmp_path / "table")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert f"error: {file}: " in ran.err
