"""Labels, class names and texts as users have them: the commands read all kinds alike."""

from __future__ import annotations

import json
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

NAMES = ["cat", "Café", "polar bear", "dog", "great white shark", "3 ducks"]


@pytest.fixture
def named(arrays):
    """The problem with class names and without labels."""
    return {k: a for k, a in arrays.items() if k != "labels"} | {"class_names": np.array(NAMES)}


def texts_of(labels):
    """The names of labels as a file system, or another person, may write them."""
    return [unicodedata.normalize("NFD", NAMES[k]).upper().replace(" ", "_") for k in labels]


def write(kind, labels, folder):
    """A file of labels (N,) of that kind."""
    names = texts_of(labels)
    if kind == "names.npy":
        np.save(folder / kind, np.array(names))
    elif kind == "floats.npy":
        np.save(folder / kind, labels.astype(np.float32))
    elif kind == "column.npy":
        np.save(folder / kind, labels[:, None])
    elif kind == "one-hot.npy":
        np.save(folder / kind, np.eye(len(NAMES), dtype=bool)[labels])
    elif kind == "names.parquet":
        pq.write_table(pa.table({" Labels": names}), folder / kind)
    elif kind == "numbers.csv":
        (folder / kind).write_text("label\n" + "".join(f"{k}.0\n" for k in labels))
    else:
        header = "label\n" if kind.endswith(".csv") else ""
        (folder / kind).write_text(header + "\n".join(names) + "\n", encoding="utf-8")
    return folder / kind


KINDS = (
    "names.npy", "floats.npy", "column.npy", "one-hot.npy", "names.parquet", "numbers.csv",
    "names.csv", "names.txt",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_solve_and_evaluate_read_the_same(kind, arrays, named, save, succeeds, tmp_path):
    labels = arrays["labels"]
    file, given = save(named), write(kind, labels, tmp_path)
    out = succeeds("solve", file, "--labels", given, "--out", tmp_path / "result", "--json")
    table = pq.read_table(tmp_path / "result/predictions.parquet")
    np.testing.assert_array_equal(table["true_label"], labels)
    expected = round(100 * float(np.mean(table["label"].to_numpy() == labels)), 4)
    run = json.loads(out[out.index("{") :])
    assert (run["accuracy"], run["n_labelled"]) == (expected, 77)
    succeeds("solve", file, "--out", tmp_path / "unlabelled")
    found = succeeds("evaluate", tmp_path / "unlabelled", "--labels", given, "--json")
    assert json.loads(found)["accuracy"] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_shots_and_known_labels(kind, arrays, named, save, succeeds, tmp_path):
    labels = arrays["labels"]
    given = write(kind, labels, tmp_path)
    save(named | {"support_features": arrays["image_features"]}, "shots.npz")
    save(named, "known.npz")
    for name in ("support", "known"):
        file = tmp_path / ("shots.npz" if name == "support" else "known.npz")
        gamma = ("--gamma", 0.02) if name == "support" else ()
        by_file = succeeds(
            "solve", file, f"--{name}-labels", given, *gamma, "--out", tmp_path / name
        )
        save(dict(np.load(file)) | {f"{name}_labels": labels}, "whole.npz")
        whole = succeeds("solve", tmp_path / "whole.npz", *gamma, "--out", tmp_path / "whole")
        assert by_file.count("\n") == whole.count("\n")
        tables = [
            pq.read_table(tmp_path / folder / "predictions.parquet") for folder in (name, "whole")
        ]
        assert tables[0].equals(tables[1])


@pytest.mark.parametrize("missing", [None, "", "nan", -1])
def test_rows_without_a_label_do_not_count(missing, arrays, named, save, succeeds, tmp_path):
    labels, known = arrays["labels"], np.arange(77) % 3 > 0
    given = tmp_path / ("y.csv" if isinstance(missing, str) else "y.parquet")
    if isinstance(missing, str):
        values = [NAMES[k] if row else missing for k, row in zip(labels, known, strict=True)]
        lines = [f"{row},{value}\n" for row, value in enumerate(values)]
        given.write_text("".join(["row,label\n", *lines]))
    else:
        values = [int(k) if row else missing for k, row in zip(labels, known, strict=True)]
        pq.write_table(pa.table({"label": values}), given)
    out = succeeds("solve", save(named), "--labels", given, "--out", tmp_path / "result")
    assert "of the 51 images with a true label" in out
    table = pq.read_table(tmp_path / "result/predictions.parquet")
    assert table["true_label"].null_count == 26
    right = table["label"].to_numpy()[known] == labels[known]
    run = json.loads((tmp_path / "result/run.json").read_text())
    assert (run["accuracy"], run["n_labelled"]) == (round(100 * float(right.mean()), 4), 51)
    for options in ((), ("--labels", given)):
        found = json.loads(succeeds("evaluate", tmp_path / "result", *options, "--json"))
        assert (found["accuracy"], found["n_queries"], found["n_labelled"]) == (
            run["accuracy"],
            77,
            51,
        )
        assert sum(rows for _, rows, *_ in found["per_class"]) == 51
    text = succeeds("evaluate", tmp_path / "result")
    assert text.startswith("77 images, 51 of them with a true label\n")


def test_no_row_has_a_label(named, save, solved, cli, refused, tmp_path):
    (tmp_path / "y.txt").write_text("\n" * 76 + "nan\n")
    message = refused("evaluate", solved, "--labels", tmp_path / "y.txt")
    assert "y.txt: no row has a label" in message
    ran = cli("solve", save(named), "--labels", tmp_path / "y.txt", "--out", tmp_path / "other")
    assert (ran.code, ran.err.count("\n")) == (0, 1)
    assert "warning: " in ran.err
    assert "y.txt: no row has one" in ran.err


def test_a_name_that_is_no_class(named, save, refused, tmp_path):
    (tmp_path / "y.csv").write_text("label\n" + "cat\n" * 76 + "bird\n")
    message = refused("solve", save(named), "--labels", tmp_path / "y.csv", "--out", tmp_path / "r")
    assert "y.csv: row 76: label 'bird' is none of the 6 classes" in message


@pytest.fixture
def folder(named, tmp_path):
    """The problem as a feature folder whose rows have keys."""
    folder = tmp_path / "features"
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    np.save(folder / "img_emb/img_emb_0.npy", named["image_features"])
    np.save(folder / "prototypes.npy", named["text_features"])
    (folder / "manifest.json").write_text(json.dumps({"class_names": NAMES}))
    keys = pa.table({"key": [f"{row}.jpg" for row in range(77)]})
    pq.write_table(keys, folder / "metadata/metadata_0.parquet")
    return folder


@pytest.mark.parametrize("option", ["--labels", "--known-labels"])
@pytest.mark.parametrize(("column", "end"), [("path", ".jpg"), ("row", "")])
def test_a_column_tells_the_rows(option, column, end, folder, arrays, succeeds, tmp_path):
    labels, rows = arrays["labels"], [60, 3, 7]
    lines = [f"{row}{end}, {NAMES[labels[row]]}\n" for row in rows]
    (tmp_path / "some.csv").write_text("".join([f"{column}, label\n", *lines]))
    succeeds("solve", folder, option, tmp_path / "some.csv", "--out", tmp_path / "by-key")
    by_row = np.full(77, -1)
    by_row[rows] = labels[rows]
    np.save(tmp_path / "all.npy", by_row)
    succeeds("solve", folder, option, tmp_path / "all.npy", "--out", tmp_path / "by-row")
    tables = [pq.read_table(tmp_path / f"{by}/predictions.parquet") for by in ("by-key", "by-row")]
    assert tables[0].equals(tables[1])
    if option == "--labels":
        found = succeeds("evaluate", tmp_path / "by-key", option, tmp_path / "some.csv", "--json")
        assert json.loads(found)["n_labelled"] == 3


def test_keys_that_are_no_row_s(folder, cli, tmp_path):
    (tmp_path / "some.csv").write_text("key,label\n3.jpg,cat\nbroken.jpg,dog\n")
    ran = cli("solve", folder, "--known-labels", tmp_path / "some.csv", "--out", tmp_path / "r")
    assert (ran.code, ran.err) == (
        0,
        f"warning: {tmp_path / 'some.csv'}: 1 of 2 keys are no row's, e.g. 'broken.jpg'\n",
    )


def test_class_names_in_another_order(folder, refused, succeeds, tmp_path):
    turned, other = tmp_path / "turned.txt", tmp_path / "other.txt"
    turned.write_text("\n".join(NAMES[::-1]), encoding="utf-8")
    message = refused("solve", folder, "--class-names", turned, "--out", tmp_path / "r")
    assert f"turned.txt: has the class names of {folder} in another order" in message
    other.write_text("\n".join([*NAMES[:-1], "ducks"]), encoding="utf-8")
    succeeds("solve", folder, "--class-names", other, "--out", tmp_path / "r")


def test_new_rows_with_labels_in_another_order(folder, named, arrays, save, refused, succeeds, cli,
                                               tmp_path):  # fmt: skip
    succeeds("solve", folder, "--out", tmp_path / "r")
    names = np.array(NAMES[1:] + NAMES[:1])
    new = save(named | {"labels": arrays["labels"], "class_names": names}, "new.npz")
    message = refused("predict", tmp_path / "r", new, "--out", tmp_path / "p")
    assert f"new.npz: its class 0 is not that of {tmp_path / 'r'}" in message
    np.save(tmp_path / "y.npy", texts_of(arrays["labels"]))
    labels = ("--labels", tmp_path / "y.npy")
    ran = cli("predict", tmp_path / "r", new, *labels, "--out", tmp_path / "p", "--json")
    assert ran.err.endswith(
        f"its class 0 is not that of {tmp_path / 'r'}, whose classes are used\n"
    )
    expected = succeeds("evaluate", tmp_path / "r", *labels, "--json")
    zero_shot = [json.loads(text)["zero_shot_accuracy"] for text in (ran.out, expected)]
    assert zero_shot[0] == zero_shot[1]


@pytest.mark.parametrize("axis", [0, 1])
def test_texts_of_several_templates(axis, named, save, succeeds, tmp_path):
    draw = np.random.default_rng(0)
    texts = named["text_features"] + 0.05 * draw.normal(size=(4, 6, 33)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=2, keepdims=True)
    mean = texts.mean(0)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    save(named | {"text_features": texts if axis == 0 else texts.swapaxes(0, 1)}, "several.npz")
    save(named | {"text_features": mean}, "one.npz")
    for name in ("several", "one"):
        succeeds("graph", tmp_path / f"{name}.npz", "--out", tmp_path / "g")
        succeeds("solve", tmp_path / f"{name}.npz", "--out", tmp_path / name)
    several, one = (
        pq.read_table(tmp_path / name / "predictions.parquet") for name in ("several", "one")
    )
    assert several["label"].equals(one["label"])
    np.testing.assert_allclose(several["confidence"], one["confidence"], atol=1e-4)
    succeeds("plan", tmp_path / "several.npz")


def test_a_folder_with_the_name_of_a_value_is_no_input(
    arrays, save, succeeds, tmp_path, monkeypatch
):
    """The report's command names its files, and says values as they were given."""
    (tmp_path / "cpu").mkdir()
    monkeypatch.chdir(tmp_path)
    succeeds("solve", save(arrays), "--device", "cpu", "--out", tmp_path / "result")
    run = json.loads((tmp_path / "result/run.json").read_text())
    assert run["options"] == [{"option": "--device", "value": "cpu"}]


@pytest.mark.parametrize(
    "content",
    [
        NAMES,
        {str(k): name for k, name in reversed([*enumerate(NAMES)])},
        {name: k for k, name in reversed([*enumerate(NAMES)])},
    ],
)
@pytest.mark.parametrize("flag", ["--class-names", "--classes"])
def test_class_names_as_json(content, flag, arrays, save, succeeds, tmp_path):
    """By the option's name, and by that of `run` and `encode`."""
    (tmp_path / "names.json").write_text(json.dumps(content))
    options = (flag, tmp_path / "names.json", "--out", tmp_path / "result")
    succeeds("solve", save(arrays), *options)
    run = json.loads((tmp_path / "result/run.json").read_text())
    assert run["options"] == [{"option": "--class-names", "file": "../names.json"}]
    table = pq.read_table(tmp_path / "result/predictions.parquet")
    assert table["label_name"].to_pylist() == [NAMES[k] for k in table["label"].to_pylist()]
