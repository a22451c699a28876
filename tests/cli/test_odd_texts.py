"""Tables, names and labels that are not what they claim: one line and exit code 2."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cli.conftest import DEEP


@pytest.fixture
def solve(save, arrays, refused, tmp_path):
    """A `solve` with these options, which must be refused; its line."""

    def run(*options):
        return refused("solve", save(arrays), *options, "--out", tmp_path / "result")

    return run


def bytes_as_text(n_rows):
    offsets = pa.py_buffer(np.arange(n_rows + 1, dtype=np.int32).tobytes())
    return pa.Array.from_buffers(
        pa.string(), n_rows, [None, offsets, pa.py_buffer(b"\xff" * n_rows)]
    )


TABLES = {
    "bytes": lambda n: pa.table({"label": bytes_as_text(n), "name": bytes_as_text(n)}),
    "doubled": lambda n: pa.Table.from_arrays([pa.array([0] * n)] * 2, ["label", "label"]),
    "lists": lambda n: pa.table({"label": [[1]] * n, "name": [["a"]] * n}),
    "objects": lambda n: pa.table({"label": [{"a": 1}] * n, "name": [{"a": 1}] * n}),
    "numbers": lambda n: pa.table({"label": [99] * n, "name": [1] * n}),
    "fractions": lambda n: pa.table({"label": [0.5] * n, "name": ["a"] * n}),
    "nothing": lambda n: pa.table({"label": pa.nulls(0), "name": pa.nulls(0)}),
}


@pytest.mark.parametrize(
    ("kind", "option", "n_rows"),
    # A label in a list of its own is a label.
    [(kind, "--labels", 77) for kind in TABLES if kind != "lists"]
    + [(kind, "--class-names", 6) for kind in TABLES],
)
def test_tables(kind, option, n_rows, solve, tmp_path):
    table = TABLES[kind](n_rows)
    if option == "--labels" and "name" in table.column_names:
        table = table.drop_columns(["name"])  # of which there would be a warning
    pq.write_table(table, tmp_path / "x.parquet")
    assert "x.parquet" in solve(option, tmp_path / "x.parquet")


def test_a_folder_is_no_column(arrays, save, accuracy, tmp_path):
    """Readers of data sets take the folder "label=3" for a column of the files in it."""
    (tmp_path / "label=3").mkdir()
    file = tmp_path / "label=3" / "labels.parquet"
    pq.write_table(pa.table({"label": arrays["labels"]}), file)
    expected = accuracy()
    del arrays["labels"]
    assert accuracy(save(arrays), "--labels", file) == expected


NAMES = [
    ("x.json", DEEP, "recursion"),
    ("x.json", '{"a": 0, "a": 1}', "'a' is there twice"),
    ("x.json", '["a", "\\ud800", "c", "d", "e", "f"]', "surrogates not allowed"),
    ("x.json", '["a", "b\\u0000", "c", "d", "e", "f"]', "class 1 has a NUL character"),
    ("x.json", "[1e999]", "x.json"),
    ("x.txt", "a\nb\0b\nc\nd\ne\nf\n", "line 2 has a NUL character"),
    ("x.csv", "name,label\n" + "a\0,0\n" * 6, "x.csv"),
]


@pytest.mark.parametrize(("name", "text", "expected"), NAMES)
def test_class_names(name, text, expected, solve, tmp_path):
    (tmp_path / name).write_text(text)
    assert expected in solve("--class-names", tmp_path / name)


@pytest.mark.parametrize("code", [0xD800, 0x110000, 0xFFFFFFFF])
@pytest.mark.parametrize("name", ["class_names", "labels"])
def test_arrays_of_what_is_no_text(name, code, save, arrays, refused, tmp_path):
    n = 6 if name == "class_names" else 77
    texts = np.array([f"{k % 6}" for k in range(n)], "<U4")
    texts.view(np.uint32)[5] = code
    file = save({**arrays, name: texts})
    assert "features.npz: " in refused("solve", file, "--out", tmp_path / "result")
