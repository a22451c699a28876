"""Keys of rows from files, and what is no list of them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from transclip_fast.errors import InputError
from transclip_fast.store.features import load_features
from transclip_fast.store.keys import read_keys
from transclip_fast.store.tables import guarded

KEYS = ["a b/1.jpg", "é, x.jpg", "007"]


def write(path, content):
    if isinstance(content, dict):
        pq.write_table(pa.table(content), path)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        np.save(path, content)
    return path


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("k.txt", "\n".join(KEYS)),
        ("k.txt", "\ufeff" + "\r\n".join(KEYS) + "\r\n"),
        ("k.csv", "label,key\n0,a b/1.jpg\n1,\"é, x.jpg\"\n0,007\n"),
        ("k.csv", "path\na b/1.jpg\n\"é, x.jpg\"\n007\n"),
        ("k.parquet", {"key": KEYS}),
        ("k.npy", np.array(KEYS)),
    ],
)  # fmt: skip
def test_kinds_of_files(file, content, tmp_path):
    assert read_keys(write(tmp_path / file, content), 3) == KEYS


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_column_row_tells_the_rows(suffix, tmp_path):
    """As in predictions that were sorted."""
    table = {"Row": [2, 0, 1], "source_row": [4, 9, 7], "key": [KEYS[row] for row in (2, 0, 1)]}
    file = tmp_path / f"k{suffix}"
    if suffix == ".csv":
        pyarrow.csv.write_csv(pa.table(table), file)
    else:
        write(file, table)
    assert read_keys(file, 3) == KEYS


def test_texts_that_a_spreadsheet_would_run_have_a_guard(tmp_path):
    """In a .csv, as results have them."""
    keys = ["=a.jpg", "'b.jpg", "'", "c.jpg"]
    text = "\n".join(["key", *map(guarded, keys)])
    assert text.count("'") == 5
    assert read_keys(write(tmp_path / "k.csv", text), 4) == keys
    assert read_keys(write(tmp_path / "k.parquet", {"key": ["'=a.jpg"]}), 1) == ["'=a.jpg"]


def test_labels_number_no_lines(tmp_path):
    assert read_keys(write(tmp_path / "k.csv", "key,label\na,1\nb,0\n"), 2) == ["a", "b"]


def test_numbers_are_keys(tmp_path):
    assert read_keys(write(tmp_path / "k.npy", np.array([285, 139])), 2) == ["285", "139"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("k.txt", "a\nb\n", "2 keys for 3 rows; give one a row"),
        ("k.txt", "a\n\nb\n", "row 1 has an empty key"),
        ("k.csv", "name\na\nb\nc\n", "has no column 'key', only name"),
        ("k.csv", "key\na\n \nb\n", "row 1 has an empty key"),
        ("k.parquet", {"key": ["a", None, "b"]}, "row 1 has an empty key"),
        ("k.parquet", {"key": [1.0, float("nan"), 2.0]}, "row 1 has an empty key"),
        ("k.csv", "row,key\n2,c\n0,a\n", "2 keys for 3 rows"),
        ("k.csv", "row,key\n2,c\n0,a\n2,b\n", "row 2 is there twice"),
        ("k.csv", "row,key\n3,c\n1,a\n2,b\n", "'3' is no row; they are 0 .. 2"),
        ("k.csv", "source_row,key\n2,c\n0,a\n1,b\n", "its column source_row numbers the lines"),
        ("k.csv", ",key\n3,c\n1,a\n2,b\n", "its column without a name numbers the lines"),
        ("k.npy", np.ones((3, 2)), "expected a list of strings, got float64"),
        ("k.npy", np.ones(3), "expected a list of strings, got float64"),
        ("k.json", "[]", "keys are read from .txt"),
    ],
)
def test_no_keys(file, content, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_keys(write(tmp_path / file, content), 3)


def test_keys_in_a_file_of_arrays(tmp_path):
    rows, texts = np.eye(3, 4), np.eye(2, 4)
    arrays = {"image_features": rows, "text_features": texts, "class_names": ["x", "y"]}
    np.savez(tmp_path / "f.npz", **arrays, keys=KEYS)
    labels = write(tmp_path / "labels.csv", 'key,label\n007,y\n"a b/1.jpg",x\n')
    features = load_features(tmp_path / "f.npz", {"labels": labels})
    assert features.keys == KEYS
    assert features.get("labels").tolist() == [0, -1, 1]
    given = write(tmp_path / "k.txt", "007\nu\na b/1.jpg\n")  # over those of the file
    assert load_features(tmp_path / "f.npz", {"labels": labels, "keys": given}).get(
        "labels"
    ).tolist() == [1, -1, 0]
    np.savez(tmp_path / "f.npz", **arrays, keys=KEYS[1:])
    with pytest.raises(InputError, match="f.npz: keys: 2 keys for 3 rows"):
        load_features(tmp_path / "f.npz")
