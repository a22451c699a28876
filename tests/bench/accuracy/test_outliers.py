"""The area under the ROC curve, and what is recorded of it."""

import numpy as np
import pytest

from bench import wild_tables
from bench.accuracy import outliers
from bench.accuracy.wild_problems import Pool


def test_area_counts_pairs():
    draw = np.random.default_rng(0)
    scores, outside = draw.integers(0, 9, 40), draw.random(40) < 0.3  # with ties
    pairs = scores[outside][:, None] - scores[~outside]
    expected = ((pairs > 0) + 0.5 * (pairs == 0)).mean()
    assert outliers.area_under_roc(scores, outside) == pytest.approx(expected)


def test_rows_without_a_name_are_found(problem, monkeypatch):
    features, prototypes, labels = problem(n=300, k=9, noise=0.01)
    monkeypatch.setattr(outliers, "pools", lambda: [Pool("made", features, prototypes, labels)])
    rows = []
    monkeypatch.setattr(outliers, "record", lambda name, row: rows.append((name, row)))
    assert outliers.main([], say=lambda _: None) == 0
    ((name, row),) = rows
    assert name == "outliers"
    assert len(row["area"]["zero_shot"]) == len(row["area"]["outlier_score"]) == outliers.DRAWS
    assert np.mean(row["area"]["outlier_score"]) > 0.6


def test_nothing_is_recorded(tmp_path):
    assert "python -m bench.accuracy.outliers" in wild_tables.outliers(tmp_path)
