"""Labels from files of every kind."""

from __future__ import annotations

import unicodedata
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from transclip_fast.data.checks import as_labels
from transclip_fast.errors import InputError
from transclip_fast.store.features import load_features
from transclip_fast.store.labels import as_positions, read_labels

NAMES = ["cat", "café", "dog"]
WANTED = [2, 0, -1, 1, 0]
TEXTS = ["dog", "Cat", "", unicodedata.normalize("NFD", "café"), "cat"]
KEYS = [f"é{row}.jpg" for row in range(5)]


def read(file, *of_rows):
    found = as_positions(read_labels(file, "labels", *of_rows), NAMES, "labels")
    return np.nan_to_num(np.asarray(found, dtype=float), nan=-1).tolist()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("y.txt", "\n".join(TEXTS) + "\n\n"),
        ("y.txt", "2\n0\n\n1\n0"),
        ("y.csv", "label\n" + "\n".join(TEXTS)),
        ("y.csv", "label\n2.0\n0.0\n\n1.0\n0.0\n\n"),
        ("y.csv", " Labels \n2\n0\n\n1\n0\n"),
    ],
)
def test_text_files(file, content, tmp_path):
    (tmp_path / file).write_text(content, encoding="utf-8")
    assert read(tmp_path / file) == WANTED


@pytest.mark.parametrize(
    ("content", "unread"),
    [
        ("Labels,note\n2,a\n0,b\n,c\n1,d\n0,\n", "note"),
        (",label\n0,2\n1,0\n2,\n3,1\n4,0\n", "one without a name"),
        ("id, label\n5, dog\n6, cat\n7, \n8, café\n9, cat\n", "id"),
    ],
)
def test_labels_in_their_order_beside_what_might_tell_the_rows(content, unread, tmp_path):
    (tmp_path / "y.csv").write_text(content, encoding="utf-8")
    message = rf"y\.csv: labels go to the rows in their order; not read: {unread}$"
    with pytest.warns(UserWarning, match=message):
        assert read(tmp_path / "y.csv", None, 5) == WANTED


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", ["", "index", "__index_level_0__"])
def test_lines_that_a_column_numbers_in_another_order(name, first, tmp_path):
    """As of a table that was shuffled: neither order is taken without a word."""
    file, order = tmp_path / "y.csv", [3, 0, 4, 1, 2]
    counted = [f"{first + row},{TEXTS[row]}" for row in order]
    file.write_text("\n".join([f"{name},label", *counted]), encoding="utf-8")
    message = rf"y\.csv: its column ({name or 'without a name'}) numbers the lines in another order"
    with pytest.raises(InputError, match=message):
        read(file, None, 5)
    file.write_text("\n".join([f"{name},label", *sorted(counted)]), encoding="utf-8")
    with pytest.warns(UserWarning, match="labels go to the rows in their order"):
        assert read(file, None, 5) == WANTED
    lines = [f"{row},{TEXTS[row]}" for row in order]
    file.write_text("\n".join(["row,label", *lines]), encoding="utf-8")
    assert read(file, None, 5) == WANTED


def test_tables_with_other_separators(tmp_path):
    for mark in ";\t|":
        (tmp_path / "y.csv").write_text(f"row{mark}label\n0{mark}dog\n", encoding="utf-8")
        with pytest.raises(InputError, match=r"are separated by .*: write it with commas"):
            read(tmp_path / "y.csv")


@pytest.mark.parametrize("labels", [[2, 0, None, 1, 0], [text or None for text in TEXTS]])
def test_parquet(labels, tmp_path):
    pq.write_table(pa.table({"labels": labels}), tmp_path / "y.parquet")
    assert read(tmp_path / "y.parquet") == WANTED


@pytest.mark.parametrize(
    "labels",
    [
        np.array(WANTED),
        np.array([2, 0, np.nan, 1, 0], np.float32),
        np.array(TEXTS),
        np.array([text.encode() for text in TEXTS]),
    ],
)
def test_arrays(labels, tmp_path):
    np.save(tmp_path / "y.npy", labels)
    np.savez(tmp_path / "y.npz", labels=labels, other=labels[:2])
    assert read(tmp_path / "y.npy") == read(tmp_path / "y.npz") == WANTED


@pytest.mark.parametrize("column", ["key", "path", " Path"])
def test_keys_tell_the_rows(column, tmp_path):
    known = [4, 0, 1, 3]
    decomposed = [unicodedata.normalize("NFD", KEYS[row]) for row in known]
    lines = [f"{key},{TEXTS[row]}" for key, row in zip(decomposed, known, strict=True)]
    (tmp_path / "y.csv").write_text("\n".join([f"{column},label", *lines]), encoding="utf-8")
    assert read(tmp_path / "y.csv", KEYS) == WANTED
    # A row without a key, which no line can name, has no label.
    assert read(tmp_path / "y.csv", [*KEYS, None], 6) == [*WANTED, -1]


@pytest.mark.parametrize("rows", [(None, 4), ([None] * 4, 4), (None, None)])
def test_keys_of_rows_without_keys_are_refused(rows, tmp_path):
    (tmp_path / "y.csv").write_text("key,label\nd,0\nb,1\nc,2\na,0\n")
    with pytest.raises(InputError, match=r"keys such as 'd', but the rows have none; name them by"):
        read(tmp_path / "y.csv", *rows)
    (tmp_path / "y.csv").write_text("key,label\n3,0\n1,1\n2,2\n4,0\n")  # counted from 1
    with pytest.raises(InputError, match="the rows have none"):
        read(tmp_path / "y.csv", *rows)
    (tmp_path / "y.csv").write_text("key,label\n3,0\n1,1\n1,1\n0,0\n2,2\n")
    with pytest.raises(InputError, match="the rows have none"):
        read(tmp_path / "y.csv", *rows)


@pytest.mark.parametrize("rows", [(None, 4), ([None] * 4, 4), (None, None)])
def test_keys_that_number_the_rows(rows, tmp_path):
    (tmp_path / "y.csv").write_text("key,label\n3,dog\n1,cat\n0,café\n2,dog\n", "utf-8")
    assert read(tmp_path / "y.csv", *rows) == [1, 0, 2, 2]
    table = {"key": [3, 1, 0, 2], "label": [2, 0, 1, 2]}
    pq.write_table(pa.table(table), tmp_path / "y.parquet")
    assert read(tmp_path / "y.parquet", *rows) == [1, 0, 2, 2]


def test_a_key_column_without_keys(tmp_path):
    table = {"key": pa.nulls(3, pa.string()), "label": [2, 0, 1]}
    pq.write_table(pa.table(table), tmp_path / "y.parquet")
    assert read(tmp_path / "y.parquet", None, 3) == read(tmp_path / "y.parquet") == [2, 0, 1]


def test_a_key_of_several_rows_is_refused(tmp_path):
    (tmp_path / "y.csv").write_text("key,label\na,1\ntwin,2\n")
    with pytest.raises(InputError, match="'twin' is the key of several rows; name a row by its"):
        read(tmp_path / "y.csv", ["twin", "a", "twin"], 3)
    assert read(tmp_path / "y.csv", ["a", "b", "twin"], 3) == [1, -1, 2]
    (tmp_path / "y.csv").write_text("row,key,label\n2,twin,2\n1,a,1\n")
    assert read(tmp_path / "y.csv", ["twin", "a", "twin"], 3) == [-1, 1, 2]


def test_keys_in_two_unicode_forms(tmp_path):
    forms = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    (tmp_path / "y.csv").write_text(f"key,label\n{forms[1]},1\n{forms[0]},2\n", "utf-8")
    assert read(tmp_path / "y.csv", forms) == [2, 1]
    with pytest.raises(InputError, match="key of several rows"):
        read(tmp_path / "y.csv", [forms[1]] * 2)


@pytest.mark.parametrize("keys", [None, [None] * 5, KEYS])
def test_a_column_row_tells_the_rows(keys, tmp_path):
    lines = [f"{row},{TEXTS[row]}" for row in (4, 0, 3, 1)]
    (tmp_path / "y.csv").write_text("\n".join(["row,label", *lines]), encoding="utf-8")
    assert read(tmp_path / "y.csv", keys, 5) == WANTED
    table = {"label": [1.0, 2.0, 0.0, np.nan], "Row ": [3, 0, 4, 2]}
    pq.write_table(pa.table(table), tmp_path / "y.parquet")
    assert read(tmp_path / "y.parquet", keys, 5) == [2, -1, -1, 1, 0]


def test_a_row_and_its_key_agree(tmp_path):
    (tmp_path / "y.csv").write_text("row,key,label\n1,b,dog\n0,,cat\n2,'-c,dog\n")
    assert read(tmp_path / "y.csv", ["a", "b", "-c"], 3) == [0, 2, 2]
    assert read(tmp_path / "y.csv", None, 3) == read(tmp_path / "y.csv") == [0, 2, 2]
    with pytest.raises(InputError, match="the key 'b' for row 1, whose key is 'a'; leave out"):
        read(tmp_path / "y.csv", ["b", "a", "-c"], 3)


def test_rows_of_arrays_that_have_no_count_are_all_numbered(tmp_path):
    """As of a support, where each row has a label."""
    (tmp_path / "y.csv").write_text("row,label\n2,dog\n0,cat\n1,dog\n")
    assert read(tmp_path / "y.csv") == [0, 2, 2]
    (tmp_path / "y.csv").write_text("row,label\n3,dog\n0,cat\n1,dog\n")
    with pytest.raises(InputError, match="'3' is no row; they are 0 .. 2"):
        read(tmp_path / "y.csv")


@pytest.mark.parametrize("start", ["", "label\n"])
def test_last_rows_without_a_label(start, tmp_path):
    """An empty line is a row without one; empty lines after the last row are none."""
    file = tmp_path / ("y.csv" if start else "y.txt")
    for text in ("2\n0\n\n\n", "2\n0\n\n\n\n\n"):
        file.write_text(start + text)
        assert read(file, None, 4) == [2, 0, -1, -1]
    file.write_text(start + "2\n0\n\n1\n\n\n")
    assert read(file, None, 4) == read(file) == [2, 0, -1, 1]
    file.write_text(start + "2\n0\n\n")
    assert len(read(file, None, 4)) == 3  # and refused by its length


def test_a_key_without_label_in_parquet(tmp_path):
    table = {"key": ["b", "a", "a"], "label": [1.0, np.nan, np.nan]}
    pq.write_table(pa.table(table), tmp_path / "y.parquet")
    assert read(tmp_path / "y.parquet", ["a", "b"]) == [-1, 1]


def test_keys_of_no_row_are_counted(tmp_path):
    (tmp_path / "y.csv").write_text("key,label\nb,dog\nx,cat\na,cat\n")
    with pytest.warns(UserWarning, match=r"y\.csv: 1 of 3 keys are no row's, e\.g\. 'x'"):
        assert read(tmp_path / "y.csv", ["a", "b", "c"]) == [0, 2, -1]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("y.csv", "0\n1\n", "has no column 'label', only 0"),
        ("y.csv", "key,target\na,1\n", "has no column 'label', only key, target"),
        ("y.csv", "key,label\nx,1\n", "none of its keys is a row's, e.g. 'x'; .* such as 'a'"),
        ("y.csv", "key,label\na,1\na,2\n", "'a' is there with two labels"),
        ("y.csv", "key,label\na,1,2\n", "line 2 has 3 values"),
        ("y.csv", "row,label\n1,1\n2,0\n", "'2' is no row; they are 0 .. 1"),
        ("y.csv", "row,label\na.jpg,1\n", "'a.jpg' is no row"),
        ("y.csv", "row,label\n1,1\n1,0\n", "row 1 is there twice"),
        ("y.csv", "row,label\n1,1\n1,1\n", "row 1 is there twice"),
        ("y.csv", "label, label\na,1\n", "several columns 'label'"),
        ("y.parquet", "nonsense", "cannot be read as a table"),
        ("y.txt", b"\xff", "UTF-8"),
        ("y.doc", "x", "labels are read from .npy, .*, .csv, .parquet, .txt"),
        ("none.txt", None, "no such file"),
        ("none.csv", None, "no such file"),
    ],
)
def test_bad_files(file, content, message, tmp_path):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / file).write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        read_labels(tmp_path / file, "labels", ["a", "b"], 2)
    assert str(error.value).startswith(f"{tmp_path / file}: ")


def test_numbers_that_may_be_names_of_classes(tmp_path):
    rows = {"image_features": np.eye(2, 4), "text_features": np.eye(2, 4)}
    np.savez(tmp_path / "x.npz", **rows, labels=[1, 0], class_names=["1", "2"])
    with pytest.warns(UserWarning, match=r"x.npz: labels: 1 is taken as a position, of class '2'"):
        assert load_features(tmp_path / "x.npz").get("labels").tolist() == [1, 0]
    np.savez(tmp_path / "x.npz", **rows, class_names=["1", "2"])
    np.save(tmp_path / "y.npy", [1, -1])
    with pytest.warns(UserWarning, match=r"y.npy: 1 is taken as a position, of class '2'"):
        load_features(tmp_path / "x.npz", {"known_labels": tmp_path / "y.npy"})


def test_decimals_are_numbers(tmp_path):
    """As some databases write them: whole ones exactly."""
    labels = [Decimal("2.00"), None, Decimal("1")]
    large = Decimal(2**60 + 1)
    pq.write_table(pa.table({"label": labels}), tmp_path / "y.parquet")
    assert read(tmp_path / "y.parquet") == [2, -1, 1]
    assert read_labels(tmp_path / "y.parquet", "labels").dtype == np.float64
    table = {"label": labels, "key": [large, large - 1, large + 1]}
    pq.write_table(pa.table(table), tmp_path / "y.parquet")
    assert read(tmp_path / "y.parquet", [str(2**60 + k) for k in range(3)]) == [-1, 2, 1]
    pq.write_table(pa.table({"label": [Decimal("0.5")]}), tmp_path / "y.parquet")
    assert read_labels(tmp_path / "y.parquet", "labels") == np.array([0.5])  # refused later


@pytest.mark.parametrize(
    "table", [{"label": [True, None, False]}, {"label": [True, False], "row": [0, 2]}]
)
def test_a_mask_with_gaps_is_no_labels(table, tmp_path):
    pq.write_table(pa.table(table), tmp_path / "y.parquet")
    with pytest.raises(InputError, match=r"y\.parquet: is a mask of true and false, no labels"):
        read_labels(tmp_path / "y.parquet", "labels", None, 3)


def test_labels_of_odd_types(tmp_path):
    pq.write_table(pa.table({"label": [[1], [2, 3]]}), tmp_path / "y.parquet")
    with pytest.raises(InputError, match="holds neither numbers nor texts"):
        read_labels(tmp_path / "y.parquet", "labels")


def test_predictions_as_true_labels_are_doubted(tmp_path):
    """Against themselves they are all right."""
    (tmp_path / "y.csv").write_text("key,label,label_name\na,1,cat\nb,0,dog\n")
    with pytest.warns(UserWarning, match="'label_name', as predictions do: are these true labels"):
        found = read_labels(tmp_path / "y.csv", "labels", ["b", "a"])
    assert found.tolist() == ["0", "1"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8])
def test_tensors_of_any_number_are_labels(dtype, tmp_path):
    """numpy has no bfloat16."""
    arrays = {"image_features": torch.eye(3, 4), "text_features": torch.eye(3, 4)}
    np.savez(tmp_path / "x.npz", **arrays, class_names=["a", "b", "c"])
    torch.save(torch.tensor([2, 0, 1]).to(dtype), tmp_path / "y.pt")
    features = load_features(tmp_path / "x.npz", {"labels": str(tmp_path / "y.pt")})
    assert as_labels(features.get("labels"), "labels", rows=3, n_classes=3).tolist() == [2, 0, 1]


def test_predictions_are_no_known_labels(tmp_path):
    """Their edits are in the names, and each of their rows would count as known."""
    (tmp_path / "y.csv").write_text("key,label,label_name\na,1,cat\nb,0,dog\n")
    message = "y.csv: has a column 'label_name', as predictions do: all its rows would count as kn"
    with pytest.raises(InputError, match=message):
        read_labels(tmp_path / "y.csv", "known_labels", ["a", "b"], 2)
