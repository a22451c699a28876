"""Which rows are suggested: held against the definition, written out."""

from __future__ import annotations

import numpy as np
import pytest

from transclip_fast.report.suggest import choose, symmetric


def by_definition(uncertain, neighbors, n, known):
    """Recompute every score before each choice."""
    around = [set() for _ in uncertain]
    for row, others in enumerate(neighbors):
        for other in others:
            if other >= 0:
                around[row].add(other)
                around[other].add(row)
    left = np.where(known, 0.0, uncertain)
    open_rows, chosen = set(np.flatnonzero(~known)), []
    while open_rows and len(chosen) < n:
        if not any(left[row] + sum(left[[*around[row]]]) for row in open_rows):
            left = np.where(np.isin(np.arange(len(left)), [*open_rows]), uncertain, 0.0)
        scores = {row: left[row] + sum(left[other] for other in around[row]) for row in open_rows}
        row = max(sorted(open_rows), key=lambda one: round(scores[one], 9))
        chosen.append(int(row))
        open_rows.remove(row)
        left[[row, *around[row]]] = 0
    return chosen


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_choice(seed, share):
    draw = np.random.default_rng(seed)
    n_rows = 37
    neighbors = np.stack(
        [draw.permutation(np.delete(np.arange(n_rows), row))[:3] for row in range(n_rows)]
    )
    neighbors[draw.random((n_rows, 3)) < 0.2] = -1
    uncertain, known = draw.random(n_rows), draw.random(n_rows) < share
    starts, places = (neighbors >= 0).nonzero()
    pairs = symmetric(starts, neighbors[starts, places], n_rows)
    assert choose(uncertain, pairs, 25, known).tolist() == by_definition(
        uncertain, neighbors, 25, known
    )


def test_both_directions_each_once():
    first, second = symmetric(np.array([0, 1, 2]), np.array([1, 0, 0]), 3)
    assert [*zip(first.tolist(), second.tolist(), strict=True)] == [(0, 1), (0, 2), (1, 0), (2, 0)]


def test_no_more_than_there_are():
    none = np.empty(0, np.int64)
    known = np.array([True, False, False])
    assert choose(np.array([1.0, 0.2, 0.3]), (none, none), 9, known).tolist() == [2, 1]
