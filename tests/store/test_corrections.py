"""Corrections: every key and label is read back as it was, and none is guessed."""

from __future__ import annotations

import csv

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transclip_fast.errors import InputError
from transclip_fast.store.corrections import corrected, label_texts, read_corrections
from transclip_fast.store.tables import guarded, unguarded

HOSTILE = [
    "=cmd()",
    "'=cmd()",
    "''",
    "'",
    "+1",
    "-2",
    "@x",
    "\tx",
    "\r=x",
    'a\nb,"c"',
    " leading and trailing ",
    "\u202egpj.cat",
    "<script>alert(1)</script>",
    '"><img src=x>',
    "'tis",
]
NAMES = ["cat", "dog", "-5 degrees", "=sum", "7", "it's"]


def write(path, rows, head=("key", "label")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    return path


def test_every_text_is_read_back():
    assert [unguarded(guarded(text)) for text in HOSTILE] == HOSTILE
    assert not any(guarded(text)[0] in "=+-@\t\r" for text in HOSTILE)
    assert guarded("") == unguarded("") == ""


def test_hostile_keys_and_labels_are_read_back(tmp_path):
    labels = [NAMES[i % len(NAMES)] for i in range(len(HOSTILE))]
    rows = [(guarded(key), guarded(label)) for key, label in zip(HOSTILE, labels, strict=True)]
    found = read_corrections(write(tmp_path / "c.csv", rows), HOSTILE, NAMES, len(HOSTILE))
    assert found == {i: i % len(NAMES) for i in range(len(HOSTILE))}


def test_written_by_hand(tmp_path):
    """Spaces, case, positions and texts without a guard."""
    (tmp_path / "c.csv").write_text("Key, Label\n-2, Dog\n'tis,4\n@x, \n=cmd(),=sum\n")
    with pytest.warns(UserWarning, match=r"'4' is taken as class '7', at position 4"):
        found = read_corrections(tmp_path / "c.csv", HOSTILE, NAMES, len(HOSTILE))
    assert found == {5: 1, 14: 4, 0: 3}


def test_a_class_whose_name_is_a_number(tmp_path):
    file = write(tmp_path / "c.csv", [("+1", "7"), ("-2", "5")])
    assert read_corrections(file, HOSTILE, NAMES, len(HOSTILE)) == {4: 4, 5: 5}


def test_rows_without_keys_are_named_by_number(tmp_path):
    file = write(tmp_path / "c.csv", [("2", "dog"), ("0", "cat")], ("row", "label"))
    assert read_corrections(file, None, NAMES, 3) == {2: 1, 0: 0}
    assert read_corrections(file, ["a", "a", "b"], NAMES, 3) == {2: 1, 0: 0}


def test_a_row_with_its_key(tmp_path):
    """A key beside a number is checked where the row has one; of one key the number tells rows."""
    rows = [("2", "twin", "dog"), ("0", " a", "cat"), ("3", "any", "7"), ("1", "", "cat")]
    file = write(tmp_path / "c.csv", rows, ("row", "key", "label"))
    assert read_corrections(file, ["a", "twin", "twin", None], NAMES, 4) == {2: 1, 0: 0, 3: 4, 1: 0}


def test_texts_of_classes_with_one_name(tmp_path):
    """Classes that share a name are called by position, unless that is a name, too."""
    names = ["crane", "kite", "crane", "0"]
    assert label_texts(names, 4) == [None, "kite", "2", "0"]
    assert label_texts(None, 3) == ["0", "1", "2"]
    assert label_texts([" ", "long name", "1"], 3, 5) == ["0", None, "1"]
    file = write(tmp_path / "c.csv", [("a", "2"), ("b", "0"), ("c", "kite")])
    message = r"'0' is taken as class '0', at position 3: a name counts before .* \(1 such labels\)"
    with pytest.warns(UserWarning, match=message):
        assert read_corrections(file, ["a", "b", "c"], names, 3) == {0: 2, 1: 3, 2: 1}


def test_a_number_that_is_no_name_among_names_that_are(tmp_path, recwarn):
    file = write(tmp_path / "c.csv", [("a", "2")])
    assert read_corrections(file, ["a"], ["8", "9", "cat"], 1) == {0: 2}
    assert read_corrections(file, ["a"], ["0", "1", "2"], 1) == {0: 2}
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match=r"c\.csv: '2' is taken as class '7', at position 2: a name"
    ):
        assert read_corrections(file, ["a"], ["8", "9", "7"], 1) == {0: 2}


@pytest.mark.parametrize(
    ("rows", "head", "message"),
    [
        ([("nowhere.jpg", "cat")], ("key", "label"), "'nowhere.jpg' is the key of no row"),
        ([("+1", "cow")], ("key", "label"), r"key '\+1': label 'cow' is none of the classes$"),
        ([("+1", "dgo")], ("key", "label"), "'dgo' is none of the classes; did you mean 'dog'"),
        ([("+1", "6")], ("key", "label"), "'6' is none of the classes"),
        ([("+1", "-1")], ("key", "label"), "'-1' is none of the classes"),
        ([("+1", "cat"), ("+1", "dog")], ("key", "label"), "corrects row 4 twice"),
        ([("+1", "")], ("key", "label"), "corrects nothing"),
        ([], ("key", "label"), "corrects nothing"),
        ([("+1", "cat")], ("key", "name"), "has no column 'label'"),
        ([("+1", "cat")], ("name", "label"), "has no column 'key'"),
        ([("0", "cat")], ("path", "label"), "'0' is the key of no row"),
        ([("15", "cat")], ("row", "label"), "'15' is no row"),
        ([("-1", "cat")], ("row", "label"), "'-1' is no row"),
        ([("twin", "cat")], ("key", "label"), "'twin' is the key of several rows"),
        ([("1", "@x", "cat")], ("row", "key", "label"), "key '@x' for row 1, whose key is \"'=cmd"),
    ],
)
def test_refused(rows, head, message, tmp_path):
    keys = [*HOSTILE[:-2], "twin", "twin"]
    with pytest.raises(InputError, match=message) as refused:
        read_corrections(write(tmp_path / "c.csv", rows, head), keys, NAMES, len(keys))
    assert str(tmp_path / "c.csv") in str(refused.value)


def test_predictions_are_no_corrections(tmp_path):
    """An edit of a name there would be lost, and every other row be taken for right."""
    file = tmp_path / "predictions.csv"
    file.write_text("key,label,label_name\na,0,cat\nb,1,cat\n")
    with pytest.raises(InputError, match="has a column 'label_name', as predictions do"):
        read_corrections(file, ["a", "b"], ["cat", "dog"], 2)


def test_a_name_of_two_classes_is_refused(tmp_path):
    file = write(tmp_path / "c.csv", [("a", "crane")])
    with pytest.raises(InputError, match="several classes"):
        read_corrections(file, ["a"], ["crane", "kite", "crane"], 1)


def test_corrections_win_over_known_labels():
    known = np.array([-1, 2, 3])
    assert corrected(known, {1: 0, 0: 4}).tolist() == [4, 0, 3]
    assert known.tolist() == [-1, 2, 3]


def test_labels_that_are_no_numbers_are_left_out(tmp_path):
    """As pandas writes a column of positions that has gaps."""
    table = pa.table({"row": [0, 1, 2], "label": [1.0, float("nan"), None]})
    pq.write_table(table, tmp_path / "c.parquet")
    assert read_corrections(tmp_path / "c.parquet", None, NAMES, 3) == {0: 1}


def test_a_file_that_is_no_table(tmp_path):
    np.save(tmp_path / "c.npy", np.zeros(3))
    with pytest.raises(InputError, match=r"c\.npy: is no table that is read here; give a \.csv"):
        read_corrections(tmp_path / "c.npy", None, NAMES, 3)
