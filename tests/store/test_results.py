"""The table of predictions."""

from __future__ import annotations

import numpy as np

from transclip_fast.store.features import Features
from transclip_fast.store.results import predictions_table


def table(distributions):
    rows = len(distributions)
    features = Features("x.npz", {"image_features": np.ones((rows, 2))}, {})
    zero_shot = np.zeros(rows, np.int64), np.ones(rows, np.float32)
    return predictions_table(np.asarray(distributions, np.float32), zero_shot, features)


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
