"""Class names from files of every kind, and what is no list of names."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transclip_fast.errors import InputError
from transclip_fast.store.names import ClassNames, place, read_names

NAMES = ["cat", "crème brûlée", "3 ducks"]
SYNSETS = ["n02123045", "n07614500", "n01846331"]


def write(path, content):
    if isinstance(content, dict | list) and path.suffix == ".json":
        content = json.dumps(content)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("n.txt", "\n".join(NAMES)),
        ("n.txt", "\ufeff" + "\r\n".join(f" {name} " for name in NAMES) + "\r\n\r\n \r\n"),
        ("classes", "\n".join(NAMES) + "\n"),
        ("N.TXT", "\n".join(NAMES) + "\n"),
        ("N.CSV", "name\n" + "\n".join(NAMES)),
        ("n.json", NAMES),
        ("n.json", {str(k): name for k, name in reversed([*enumerate(NAMES)])}),
        ("n.json", {name: k for k, name in reversed([*enumerate(NAMES)])}),
        ("n.csv", "name\n" + "\n".join(NAMES)),
        ("n.csv", "label, Name,note\n2,3 ducks,x\n0, cat,\n1,crème brûlée,\n\n"),
        ("n.csv", "index,class_name\n1,crème brûlée\n0,cat\n2,3 ducks\n"),
    ],
)
def test_kinds_of_files(file, content, tmp_path):
    assert read_names(write(tmp_path / file, content)) == ClassNames(NAMES)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("n.txt", "\n".join(f"{s} {name}" for s, name in zip(SYNSETS, NAMES, strict=True))),
        ("n.txt", "\n".join(f"{s}\t{name}" for s, name in zip(SYNSETS, NAMES, strict=True))),
        ("n.json", {str(k): [SYNSETS[k], NAMES[k]] for k in (2, 0, 1)}),
        ("n.json", [[*pair] for pair in zip(SYNSETS, NAMES, strict=True)]),
        ("n.json", dict(zip(SYNSETS, NAMES, strict=True))),
        ("n.csv", "label,synset,name\n"
         + "".join(f"{k},{SYNSETS[k]},{NAMES[k]}\n" for k in (2, 0, 1))),
    ],
)  # fmt: skip
def test_names_with_synsets(file, content, tmp_path):
    assert read_names(write(tmp_path / file, content)) == ClassNames(NAMES, SYNSETS)


def test_parquet(tmp_path):
    pq.write_table(pa.table({"name": NAMES[::-1], "label": [2, 1, 0]}), tmp_path / "n.parquet")
    assert read_names(tmp_path / "n.parquet").names == NAMES


@pytest.mark.parametrize(
    ("names", "message"), [([0, 1], "class 0 is 0; expected a text"), (["a", None], "is empty")]
)
def test_parquet_without_names(names, message, tmp_path):
    pq.write_table(pa.table({"name": names}), tmp_path / "n.parquet")
    with pytest.raises(InputError, match=message):
        read_names(tmp_path / "n.parquet")


@pytest.mark.parametrize("array", [["a", "ç"], [b"a", "ç".encode()]])
def test_names_from_arrays(array, tmp_path):
    np.save(tmp_path / "names.npy", array)
    assert read_names(tmp_path / "names.npy").names == ["a", "ç"]


def test_imagenet():
    found = read_names("imagenet")
    assert found.names == list(open_clip.IMAGENET_CLASSNAMES)
    assert found.synsets[:2] == ["n01440764", "n01443537"]
    assert len(found.synsets) == 1000


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("n.txt", None, "no such file"),
        ("n.txt", b"\xff\xfe\n", "UTF-8"),
        ("n.txt", "\n \n", "holds no class names"),
        ("n.txt", "", "holds no class names"),
        ("n.txt", "cat\n\nbird\n", "line 2 is empty"),
        ("n.txt", "\ncat\nbird\n", "line 1 is empty"),
        ("n.txt", "cat\n \t\nbird\n", "line 2 is empty"),
        ("n.txt", "['cat', 'dog']\n", "expected one name a line"),
        ("n.txt", "{0: 'cat',\n 1: 'dog'}\n", "expected one name a line"),
        ("n.txt", "cat, dog, bird\n", "expected one name a line"),
        ("n.txt", "cat;dog;bird\n", "expected one name a line"),
        ("n.txt", "cat | dog\n", "expected one name a line"),
        ("n.txt", "cat\tdog\n", "expected one name a line"),
        ("n.txt", "0: cat\n1: dog\n", "line 1 begins with a number .'0: cat'"),
        ("n.txt", "names:\n  0: cat\n  1: dog\n", "line 2 begins with a number .'0: cat'"),
        ("n.txt", "id name\n1 cat\n2 dog\n", "line 2 begins with a number"),
        ("n.txt", "0 cat\n1 dog\n", "line 1 begins with a number"),
        ("n.txt", "1. cat\n2. dog\n", "line 1 begins with a number"),
        ("n.txt", "n02123045\nn02123159\n", "holds synsets"),
        ("n.txt", "tench\nn01443537 goldfish\n", "line 2 begins with a synset"),
        ("n.json", ["n01440764 tench", "n01443537 goldfish"], "class 0 begins with a synset"),
        ("n.yaml", "- cat\n", "class names are read from"),
        ("n.json", "{", "is not JSON"),
        ("n.json", [], "holds no class names"),
        ("n.json", {}, "expected a list of names"),
        ("n.json", ["cat", "", "bird"], "class 1 is empty"),
        ("n.json", ["cat", 1], "class 1 is 1; expected a name"),
        ("n.json", ["cat", ["n02123045", "tabby"]], "has names with synsets and without"),
        ("n.json", {"1": "cat", "2": "dog"}, "numbers 1 .. 2, of which 0 is missing"),
        ("n.json", {"0": "cat", "2": "dog"}, "numbers 0 .. 2, of which 1 is missing"),
        ("n.json", {"cat": 0, "dog": 0}, "numbers 0 .. 0, of which 1 is missing"),
        ("n.json", '{"0": "cat", "1": "dog", "0": "bird"}', "'0' is there twice"),
        ("n.json", {"pets": ["cat"], "cars": ["audi"]}, "expected a list of names"),
        ("n.json", '"cat"', "expected a list of names"),
        ("n.csv", "cat\ndog\n", "has no column 'name', only cat"),
        ("n.csv", "name,label\ncat,1\ndog,2\n", "numbers 1 .. 2, of which 0 is missing"),
        ("n.csv", "name,label\ncat,x\ndog,2\n", "labels that are no whole numbers"),
        ("n.csv", "name\ncat\n\nbird\n", "class 1 is empty"),
        ("n.csv", "name,label\ncat,0\ncat,dog,1\n", "line 3 has 3 values, the first line 2"),
        ("n.csv", "name, name\ncat,0\n", "several columns 'name'"),
        ("n.csv", "synset,name\nn02123045,cat\n,dog\n", "class 1 has no synset; give each"),
    ],
)
def test_what_is_no_list_of_names(file, content, message, tmp_path):
    if content is not None:
        write(tmp_path / file, content)
    with pytest.raises(InputError, match=message) as error:
        read_names(tmp_path / file)
    assert str(error.value).startswith(f"{tmp_path / file}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("column", ["class_id", "class_index", "idx", "id", "label"])
def test_positions_of_a_table(column, tmp_path):
    file = tmp_path / "n.csv"
    file.write_text(f"{column},class_name\n2,dog\n0,cat\n1,bird\n")
    assert read_names(file).names == ["cat", "bird", "dog"]


@pytest.mark.parametrize(("column", "shown"), [("target", "target"), ("", "one without a name")])
def test_columns_that_are_not_read(column, shown, tmp_path):
    file = tmp_path / "n.csv"
    file.write_text(f"{column},name\n2,dog\n0,cat\n1,bird\n")
    with pytest.warns(UserWarning, match=f"in the order of the lines; not read: {shown}"):
        assert read_names(file).names == ["dog", "cat", "bird"]


def test_a_folder_is_no_list(tmp_path):
    (tmp_path / "names.txt").mkdir()
    with pytest.raises(InputError, match=r"names\.txt: cannot be read"):
        read_names(tmp_path / "names.txt")


def test_places():
    assert (place("n.txt", 1), place("n.json", 1), place("imagenet", 1)) == (
        "line 2",
        "class 1",
        "class 1",
    )


def test_numbers_of_thousands_of_digits(tmp_path):
    digits = "9" * 5000
    file = write(tmp_path / "n.txt", f"{digits} cat\ndog\n")
    assert read_names(file).names == [f"{digits} cat", "dog"]
    file = write(tmp_path / "n.json", {digits: "cat", "0": "dog"})
    with pytest.raises(InputError, match="expected a list of names, names by number") as error:
        read_names(file)
    assert len(str(error.value)) < 200
