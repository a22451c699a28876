"""Draws of shots, and what a data set must have."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from transclip_fast.errors import InputError
from transclip_fast.protocols.data import load_data


def drawn(data, shots, seed):
    rows = data.draw("support", shots, seed)
    return {tuple(row.tolist()) for row in rows.features}, rows.labels


def test_draws(pets):
    (data,) = load_data([pets()], pools=True)
    rows, labels = drawn(data, 3, 0)
    assert torch.bincount(labels).tolist() == [3] * 6
    assert len(rows) == 18
    pool = {
        tuple(row.tolist()): int(k)
        for row, k in zip(*vars(data.pools["support"]).values(), strict=True)
    }
    again = data.draw("support", 3, 0)
    assert all(
        pool[tuple(row.tolist())] == k for row, k in zip(again.features, again.labels, strict=True)
    )
    assert drawn(data, 3, 0)[0] == rows
    assert drawn(data, 3, 1)[0] != rows
    assert drawn(data, 5, 0)[0] > rows > drawn(data, 1, 0)[0]


def test_what_there_is_is_taken(pets):
    (data,) = load_data([pets()], pools=True)
    counts = torch.bincount(data.pools["support"].labels)
    rows = data.draw("support", 10, 0)
    assert torch.bincount(rows.labels).tolist() == counts.clamp_max(10).tolist()
    short = int((counts < 10).sum())
    assert 0 < short < 6
    assert data.shortage(10) == (
        f"pets: {short} of 6 classes have fewer than 10 rows to draw from, at least "
        f"{int(counts.min())}; all of these are taken"
    )
    assert data.shortage(int(counts.min())) is None
    assert data.draw("none", 1, 0) is None


@pytest.mark.parametrize(
    ("changes", "told"),
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
def test_what_is_missing(changes, told, pets):
    with pytest.raises(InputError, match=told):
        load_data([pets(**changes)], pools=True)


def test_names_are_unique(pets):
    path = pets()
    with pytest.raises(InputError, match="pets: two data sets have this name"):
        load_data([path, path], pools=True)
