"""Which rows `bench.accuracy.corrections` corrects, and how it counts what that gains."""

from __future__ import annotations

import numpy as np
import pytest

from bench.accuracy import corrections
from bench.accuracy.known_labels import Set

NEIGHBORS = np.array([[1, -1], [2, 0], [1, -1], [4, -1], [3, -1]])
UNCERTAIN = np.array([0.5, 0.6, 0.4, 0.9, 0.1])


def test_pairs_of_neighbours():
    first, second = corrections.linked(NEIGHBORS)
    pairs = [*zip(first.tolist(), second.tolist(), strict=True)]
    assert pairs == [(0, 1), (1, 0), (1, 2), (2, 1), (3, 4), (4, 3)]


def test_choices():
    pairs = corrections.linked(NEIGHBORS)
    # 1 has 0.5 + 0.6 + 0.4 around it, then 3 has 0.9 + 0.1; then 0, 2, 4 by themselves count.
    assert corrections.dense(UNCERTAIN, pairs, 5).tolist() == [1, 3, 0, 2, 4]
    # 0 and 2 are next to 1, 4 is next to 3: they come last.
    assert corrections.apart(UNCERTAIN, pairs, 5).tolist() == [3, 1, 0, 2, 4]


@pytest.mark.filterwarnings("ignore:known_labels")
def test_gains_are_those_of_the_rows_themselves_and_of_others(problem, monkeypatch):
    monkeypatch.setattr(corrections, "CORRECTED", (5, 9))
    features, texts, labels = problem(noise=0.1)
    one = Set("made", texts, (features, labels), (features, labels))
    before, gains = corrections.measure(one, np.random.default_rng(0))
    assert {n for n, _ in gains} == {5, 9}
    for (n, _), gain in gains.items():
        assert gain["gain"] == pytest.approx(gain["own"] + gain["spread"])
        assert 0 <= gain["own"] <= 100 * n / len(labels)
        assert before + gain["gain"] <= 100 + 1e-9
    assert gains[9, "z"]["own"] > 0
    table = corrections.averaged([gains, gains])
    assert table["z"]["9"]["worst"] == pytest.approx(gains[9, "z"]["gain"])
