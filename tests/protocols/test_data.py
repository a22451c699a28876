"""Draws of shots, and what a data set must have."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from transclip_fast.errors import InputError
from transclip_fast.protocols import data
from transclip_fast.protocols.data import load_data


def drawn(data, shots, seed):
    rows = data.pools["support"].draw(shots, seed)
    return {tuple(row.tolist()) for row in rows.features}, rows.labels


def test_draws(pets):
    (data,) = load_data([pets()], pools=True)
    rows, labels = drawn(data, 3, 0)
    assert torch.bincount(labels).tolist() == [3] * 6
    assert len(rows) == 18
    pairs = zip(data.pools["support"].features, data.pools["support"].labels, strict=True)
    pool = {tuple(row.tolist()): int(k) for row, k in pairs}
    again = data.pools["support"].draw(3, 0)
    assert all(
        pool[tuple(row.tolist())] == k for row, k in zip(again.features, again.labels, strict=True)
    )
    assert drawn(data, 3, 0)[0] == rows
    assert drawn(data, 3, 1)[0] != rows
    assert drawn(data, 5, 0)[0] > rows > drawn(data, 1, 0)[0]


def test_what_there_is_is_taken(pets):
    (data,) = load_data([pets()], pools=True)
    counts = torch.bincount(data.pools["support"].labels)
    rows = data.pools["support"].draw(10, 0)
    assert torch.bincount(rows.labels).tolist() == counts.clamp_max(10).tolist()
    short = int((counts < 10).sum())
    assert 0 < short < 6
    assert data.pools["support"].shortage(10) == (
        f"{short} of 6 classes have fewer than 10 rows to draw from, at least "
        f"{int(counts.min())}; all of these are taken"
    )
    assert data.pools["support"].shortage(int(counts.min())) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"labels": None}, "pets.npz: has no labels, which the protocol needs"),
        ({"text_features": None}, "has no text_features"),
        ({"support_features": None}, "has no support_features"),
        ({"support_labels": None}, "pets.npz: support_features and .* come together"),
        ({"support_labels": np.full(60, 9)}, "pets.npz: support_labels: row 0 has label 9"),
        ({"labels": np.zeros(3)}, "labels: expected 77 labels"),
        ({"class_names": np.array(["a"])}, "1 class names for 6 text features"),
    ],
)
def test_what_is_missing(changes, expected, pets):
    with pytest.raises(InputError, match=expected):
        load_data([pets(**changes)], pools=True)


@pytest.mark.parametrize("message", ["has no labels", "labels: has no labels"])
def test_an_error_names_its_file_once(monkeypatch, message):
    """Also where the name of the file happens to be in the message."""

    def failing(*_):
        raise InputError(message)

    monkeypatch.setattr(data, "_load", failing)
    with pytest.raises(InputError) as error:
        load_data(["labels"], pools=True)
    assert str(error.value) == "labels: has no labels"


def test_names_are_unique(pets):
    path = pets()
    with pytest.raises(InputError, match="pets: two data sets have this name"):
        load_data([path, path], pools=True)


def test_halves_of_the_classes(pets):
    names = [f"class {k}" for k in range(7)]
    (data,) = load_data([pets(k=7, class_names=np.array(names))], pools=True)
    base, new = data.halves
    for half, first, last in ((base, 0, 4), (new, 4, 7)):
        kept = (data.labels >= first) & (data.labels < last)
        torch.testing.assert_close(half.features, data.features[kept])
        np.testing.assert_array_equal(half.labels, data.labels[kept] - first)
        torch.testing.assert_close(half.text, data.text[first:last])
        assert half.class_names == names[first:last]
        for name, rows in data.pools.items():
            kept = (rows.labels >= first) & (rows.labels < last)
            torch.testing.assert_close(half.pools[name].features, rows.features[kept])
            torch.testing.assert_close(half.pools[name].labels, rows.labels[kept] - first)
        assert half.graph.neighbors.shape[0] == len(half.labels)
    drawn_base, drawn_all = base.pools["support"].draw(3, 5), data.pools["support"].draw(3, 5)
    kept = drawn_all.labels < 4
    torch.testing.assert_close(drawn_base.features, drawn_all.features[kept])


def test_halves_that_are_none(pets):
    (data,) = load_data([pets(labels=np.zeros(77))], pools=True)
    with pytest.raises(InputError, match="pets: has no query of the classes 3 to 5"):
        _ = data.halves
    (data,) = load_data([pets("one", k=1)], pools=True)
    with pytest.raises(InputError, match="one: has one class"):
        _ = data.halves
