"""The table of predictions."""

from __future__ import annotations

import csv
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import sparse

from transclip_fast.store import results
from transclip_fast.store.features import Features
from transclip_fast.store.results import (
    joined_parts,
    prediction_tables,
    save_result,
    write_part,
)
from transclip_fast.store.tables import unguarded


def table(distributions):
    if not sparse.issparse(distributions):
        distributions = np.asarray(distributions, np.float32)
    rows = distributions.shape[0]
    features = Features("x.npz", {"image_features": np.ones((rows, 2))}, {})
    zero_shot = np.zeros(rows, np.int64), np.ones(rows, np.float32)
    return pa.concat_tables(prediction_tables(distributions, zero_shot, features))


def test_top_five_and_label():
    draw = np.random.default_rng(0).random((20, 9))
    found = table(draw)
    order = np.argsort(-draw, axis=1)[:, :5]
    assert found["top5_labels"].to_pylist() == order.tolist()
    assert found["label"].to_pylist() == order[:, 0].tolist()
    np.testing.assert_allclose(found["confidence"], draw.max(1), rtol=1e-6)
    assert found["label_name"].to_pylist() == [str(k) for k in order[:, 0]]


def test_of_equal_entries_the_first_class():
    found = table(np.full((30, 40), 1 / 40))
    assert found["top5_labels"].to_pylist() == [[0, 1, 2, 3, 4]] * 30
    tied = np.zeros((1, 8))
    tied[0, [6, 2]] = 0.5
    assert table(tied)["top5_labels"].to_pylist() == [[2, 6, 0, 1, 3]]
    assert table(tied)["label"].to_pylist() == [2]


def test_fewer_than_five_classes():
    found = table([[0.25, 0.75]])
    assert found["top5_labels"].to_pylist() == [[1, 0]]
    assert found["top5_confidences"].to_pylist() == [[0.75, 0.25]]


def test_blocks_are_the_whole_in_parts(monkeypatch):
    draw = np.random.default_rng(0).random((20, 9))
    whole = table(draw)
    monkeypatch.setattr(results, "TABLE_ROWS", 7)
    assert table(draw).equals(whole)
    assert table(draw)["row"].to_pylist() == list(range(20))


def test_parts_of_ranks_in_a_folder_that_is_no_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"out\xff")
    folder.mkdir()
    found = table(np.random.default_rng(0).random((20, 9)))
    write_part(folder, 12, [found[12:]])
    write_part(folder, 0, [found[:5], found[5:12]])
    write_part(folder, 20, [])
    assert pa.concat_tables(joined_parts(folder)).equals(found)
    assert not list(folder.iterdir())


def test_names():
    draw = np.random.default_rng(0).random((20, 7))
    features = Features("x.npz", {"image_features": np.ones((20, 2))}, {})
    features.class_names = [f"class {chr(97 + k)}" for k in range(7)]
    before = np.random.default_rng(1).integers(7, size=20)
    tables = prediction_tables(draw.astype("f4"), (before, np.ones(20, "f4")), features)
    found = pa.concat_tables(tables)
    names = np.array(features.class_names)
    top = np.argsort(-draw, axis=1)[:, :5]
    assert found["label_name"].to_pylist() == names[top[:, 0]].tolist()
    assert found["zero_shot_label_name"].to_pylist() == names[before].tolist()
    assert found["top5_label_names"].to_pylist() == names[top].tolist()
    assert found["changed"].to_pylist() == (top[:, 0] != before).tolist()


@pytest.mark.parametrize("block", [3, 100])
def test_csv(block, monkeypatch, tmp_path):
    """All columns of single values, of all blocks; no text that a spreadsheet would run."""
    monkeypatch.setattr(results, "TABLE_ROWS", block)
    hostile = ["=cmd()", "+1", "-1", "@x", "\tx", "plain", 'a "b", c', "two\nlines", "'=x", "'tis"]
    n = len(hostile)
    features = Features("x.npz", {"image_features": np.ones((n, 2))}, {})
    features.keys, features.class_names = hostile, ["=SUM(A1)", "b"]
    draw = np.random.default_rng(0).random((n, 2), np.float32)
    made = prediction_tables(draw, (np.zeros(n, np.int64), np.ones(n, "f4")), features)
    save_result(tmp_path, made, {}, {"means": torch.zeros(2, 2)}, csv=True)
    table = pq.read_table(tmp_path / "predictions.parquet")
    assert table["key"].to_pylist() == hostile
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    flat = [name for name in table.column_names if not name.startswith("top5")]
    assert [*rows[0]] == flat
    assert [unguarded(row["key"]) for row in rows] == hostile
    assert not any(row["key"][0] in "=+-@\t" for row in rows)
    assert rows[-1]["key"] == "'tis"
    assert {row["label_name"] for row in rows} <= {"'=SUM(A1)", "b"}
    assert [int(row["label"]) for row in rows] == table["label"].to_pylist()
    assert [float(row["confidence"]) for row in rows] == pytest.approx(
        table["confidence"].to_pylist()
    )


def test_sparse_rows():
    """What is kept of a row is listed, the first of equal classes first."""
    z = np.zeros((4, 9), np.float32)
    z[0, [8, 2, 3]] = 0.5, 0.25, 0.25
    z[1, 4] = 1
    z[2] = np.arange(1, 10) / 45
    z[3, [0, 5]] = 0.5
    found = table(sparse.csr_array(z))
    assert found["top5_labels"].to_pylist() == [[8, 2, 3], [4], [8, 7, 6, 5, 4], [0, 5]]
    assert found["label"].to_pylist() == [8, 4, 8, 0]
    for row, values in zip(z, found["top5_confidences"].to_pylist(), strict=True):
        assert values == np.sort(row[row > 0])[::-1][:5].tolist()
    np.testing.assert_array_equal(found["confidence"], z.max(1))
