"""`suggest`, `solve --corrections` and `report`: look, correct, solve again."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

NAMES = ["cat", "dog", "=fish", "bird", "-5", "newt"]


@pytest.fixture
def named(arrays, save):
    """A FEATURES file with class names, whose rows have no keys."""
    return save(arrays | {"class_names": np.array(NAMES)})


@pytest.fixture
def corrections(tmp_path):
    def write(rows, name="corrections.csv", head=("row", "label")):
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file).writerows([head, *rows])
        return tmp_path / name

    return write


def table(folder):
    return pq.read_table(folder / "predictions.parquet")


def test_corrections_are_known_labels(named, corrections, arrays, save, succeeds, tmp_path):
    """The same as --known-labels, over them and over those of FEATURES; later files win."""
    first = corrections([(3, "newt"), (8, "'=fish"), (9, "1")])
    later = corrections([(9, "bird")], "later.csv")
    known = np.full(77, -1)
    known[[3, 20]] = 0, 4
    file = save(arrays | {"class_names": np.array(NAMES), "known_labels": known}, "known.npz")
    succeeds("solve", file, "--corrections", first, "--corrections", later, "--out", tmp_path / "a")
    known[[3, 8, 9]] = 5, 2, 3
    np.save(tmp_path / "all.npy", known)
    succeeds("solve", named, "--known-labels", tmp_path / "all.npy", "--out", tmp_path / "b")
    found, expected = table(tmp_path / "a"), table(tmp_path / "b")
    assert found.equals(expected)
    assert found["label"].to_numpy()[[3, 8, 9, 20]].tolist() == [5, 2, 3, 4]
    assert np.flatnonzero(found["known"].to_numpy()).tolist() == [3, 8, 9, 20]
    run = json.loads((tmp_path / "a/run.json").read_text())
    assert run["known_labels"]["n_known"] == 4


def test_rows_that_are_picked_as_wrong_are_no_sign_of_another_order(
    named, corrections, cli, succeeds, tmp_path
):
    """Zero-shot is wrong on all of them, always in the same way."""
    succeeds("solve", named, "--out", tmp_path / "result")
    zero_shot = table(tmp_path / "result")["zero_shot_label"].to_numpy()
    known = (zero_shot + 1) % 6
    np.save(tmp_path / "known.npy", known)
    ran = cli("solve", named, "--known-labels", tmp_path / "known.npy", "--out", tmp_path / "a")
    assert "do not seem to be in one order" in ran.err
    file = corrections([(row, NAMES[k]) for row, k in enumerate(known)])
    ran = cli("solve", named, "--corrections", file, "--out", tmp_path / "b")
    assert (ran.code, "in one order" in ran.err) == (0, False)
    assert table(tmp_path / "b")["label"].to_pylist() == known.tolist()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(77, "cat")], "'77' is no row; they are 0 .. 76"),
        ([(1, "cow")], "'cow' is none of the classes"),
        ([(1, "cat"), (1, "dog")], "corrects row 1 twice"),
        ([], "corrects nothing"),
    ],
)
def test_unknown_rows_and_labels_are_refused(rows, message, named, corrections, refused, tmp_path):
    file = corrections(rows)
    error = refused("solve", named, "--corrections", file, "--out", tmp_path / "result")
    assert message in error
    assert str(file) in error


def test_positions_beyond_the_classes_are_refused(arrays, save, corrections, refused, tmp_path):
    file = corrections([(2, 6)])
    error = refused("solve", save(arrays), "--corrections", file, "--out", tmp_path / "result")
    assert f"{file}: row 2 has label 6" in error


def test_suggested_images_are_filled_in_and_solved(named, succeeds, tmp_path):
    succeeds("solve", named, "--max-iter", 4, "--out", tmp_path / "result")
    out = succeeds("suggest", tmp_path / "result", "-n", 7, "--json")
    rows = [row["row"] for row in json.loads(out)["suggested"]]
    assert len(set(rows)) == 7
    file = tmp_path / "to check.csv"
    text = succeeds("suggest", tmp_path / "result", "-n", 7, "--csv", file)
    least = json.loads(out)["suggested"][0]
    assert least["confidence"] == min(x["confidence"] for x in json.loads(out)["suggested"])
    shown = least["calibrated_confidence"]
    assert f" ({100 * shown:.0f} %), zero-shot " in text.splitlines()[0]
    assert [line.split(":")[0] for line in text.splitlines()[:7]] == [str(row) for row in rows]
    with open(file, newline="") as content:
        lines = [*csv.DictReader(content)]
    assert [int(line["row"]) for line in lines] == rows
    for line in lines[:3]:
        line["label"] = "cat"
    with open(file, "w", newline="") as content:
        writer = csv.DictWriter(content, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    _, _, command = text.splitlines()[-1].partition("; then transclip-fast ")
    assert command.startswith(f"solve {named} --max-iter 4 --corrections ")
    succeeds(*shlex.split(command))
    found = table(tmp_path / "result-corrected")
    assert sorted(np.flatnonzero(found["known"].to_numpy())) == sorted(rows[:3])
    assert found["label"].to_numpy()[rows[:3]].tolist() == [0, 0, 0]
    more = json.loads(succeeds("suggest", tmp_path / "result-corrected", "-n", 100, "--json"))
    more = more["suggested"]
    assert {row["row"] for row in more} == set(range(77)) - {*rows[:3]}


def test_a_page_is_written_where_it_is_asked_for(named, succeeds, refused, tmp_path):
    out = succeeds("solve", named, "--out", tmp_path / "result")
    assert out.splitlines()[-1].endswith(f"transclip-fast report {tmp_path}/result")
    out = succeeds("report", tmp_path / "result", "--out", tmp_path / "new/page.html")
    assert str(tmp_path / "new/page.html") in out
    assert (tmp_path / "new/page.html").read_text().startswith("<!doctype html>")
    summary = json.loads(
        succeeds("report", tmp_path / "result", "--out", tmp_path / "b.html", "--json")
    )
    assert summary["bytes"] == (tmp_path / "b.html").stat().st_size
    assert "no run.json" in refused("report", tmp_path, "--out", tmp_path / "c.html")
    error = refused(
        "report", tmp_path / "result", "--images", tmp_path / "no", "--out", tmp_path / "c.html"
    )
    assert "no such file or folder" in error


def test_what_is_of_another_kind_is_not_replaced(named, succeeds, refused, tmp_path):
    succeeds("solve", named, "--out", tmp_path / "result")
    before = Path(named).read_bytes()
    assert "is for a page" in refused("report", tmp_path / "result", "--out", named)
    assert "is no table of" in refused("suggest", tmp_path / "result", "--csv", named)
    assert Path(named).read_bytes() == before
    mine, table = tmp_path / "mine.html", tmp_path / "mine.csv"
    mine.write_text("<html>mine</html>")
    table.write_text("key,label\na,cat\n")
    assert "is no page" in refused("report", tmp_path / "result", "--out", mine)
    assert "is no table of" in refused("suggest", tmp_path / "result", "--csv", table)
    unread = refused("suggest", tmp_path / "result", "--csv", tmp_path / "check.txt")
    assert "check.txt: name a file that ends in .csv" in unread
    assert mine.read_text() == "<html>mine</html>"
    assert table.read_text() == "key,label\na,cat\n"


def test_rows_that_share_a_key_are_suggested_by_number(folder, succeeds, tmp_path):
    """A table of their keys would be refused as corrections."""
    (folder / "manifest.json").unlink()
    metadata = folder / "metadata/metadata_00000.parquet"
    pq.write_table(pa.table({"key": [str(row // 2) for row in range(77)]}), metadata)
    succeeds("solve", folder, "--out", tmp_path / "result")
    file = tmp_path / "check.csv"
    succeeds("suggest", tmp_path / "result", "-n", 2, "--csv", file)
    with open(file, newline="") as content:
        lines = [*csv.DictReader(content)]
    file.write_text(file.read_text().replace(",,", ",3,"))
    succeeds("solve", folder, "--corrections", file, "--out", tmp_path / "again")
    table = pq.read_table(tmp_path / "again/predictions.parquet")
    known = np.flatnonzero(table["known"].to_numpy(zero_copy_only=False))
    assert [*known] == sorted(int(line["row"]) for line in lines)


def test_labels_that_were_filled_in_are_not_replaced(named, succeeds, refused, tmp_path):
    succeeds("solve", named, "--out", tmp_path / "result")
    file = tmp_path / "check.csv"
    for number in (2, 3):  # no label is filled in
        succeeds("suggest", tmp_path / "result", "-n", number, "--csv", file)
    assert file.read_text().count("\n") == 4
    file.write_text(file.read_text().replace(",,", ",cat,", 1))
    filled = file.read_text()
    message = refused("suggest", tmp_path / "result", "--csv", file)
    assert f"{file}: has labels that were filled in; name another file" in message
    assert file.read_text() == filled


def test_a_page_of_predictions(named, arrays, save, succeeds, tmp_path):
    """Of another command, without a graph and an objective."""
    succeeds("solve", named, "--out", tmp_path / "result")
    new = save({"image_features": arrays["image_features"][:9]}, "new.npz")
    succeeds("predict", tmp_path / "result", new, "--out", tmp_path / "new")
    summary = json.loads(
        succeeds("report", tmp_path / "new", "--out", tmp_path / "page.html", "--json")
    )
    assert summary["shown"]["suggested"] == 9


def test_suggest_on_results_of_the_first_version_and_where_all_are_known(
    succeeds, refused, tmp_path
):
    out = succeeds("suggest", "tests/formats/v0/dense", "-n", 2, "--csv", tmp_path / "new/a.csv")
    assert "zero-shot" in out
    assert (tmp_path / "new/a.csv").read_text().count("\n") == 3
    draw = np.random.default_rng(0)
    labels = draw.integers(3, size=20)
    texts = np.eye(3, 8)
    rows = texts[labels] + 0.1 * draw.normal(size=(20, 8))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    file = tmp_path / "a.npz"
    np.savez(file, image_features=rows, text_features=texts, known_labels=labels)
    succeeds("solve", file, "--out", tmp_path / "result")
    assert "there is none to correct" in refused("suggest", tmp_path / "result")
