"""What the measurement of the default gamma records."""

import numpy as np
import pytest

from bench import wild_tables
from bench.accuracy import default_gamma
from bench.accuracy.known_labels import Set
from transclip_fast.solver.support import default_gamma as default


def test_the_default_is_among_the_shares():
    for n_shots in default_gamma.SHOTS:
        assert default_gamma.gammas(n_shots)["1/16"] == pytest.approx(default(n_shots * 7, 7))


def test_what_is_recorded(problem, monkeypatch):
    features, prototypes, labels = problem(n=160, k=5)
    pool, queries = (features[:60], labels[:60]), (features[60:], labels[60:])
    made = [Set(x, prototypes, queries, pool) for x in ("dtd_vitb32", "caltech101_vitb32")]
    monkeypatch.setattr(default_gamma, "sets", lambda: made)
    monkeypatch.setattr(default_gamma, "SHOTS", (1, 2, 50))
    monkeypatch.setattr(default_gamma, "DRAWS", 1)
    rows = []
    monkeypatch.setattr(default_gamma, "record", lambda _, row: rows.append(row))
    assert default_gamma.main([], say=lambda _: None) == 0
    (row,) = rows
    assert row["means"]["choosing"] == row["means"]["held out"]  # of the same rows
    assert set(row["means"]["held out"]) == {"1", "2"}  # no class has 50
    best = max(
        default_gamma.SHARES,
        key=lambda x: np.mean([m[f"1/{x}"] for m in row["means"]["choosing"].values()]),
    )
    assert row["chosen"] == f"1/{best}"
    assert all(len(line) == len(wild_tables.GAMMA_HEAD) for line in wild_tables.gamma_lines(row))
