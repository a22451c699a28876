"""The calibration error by hand, and what is recorded."""

import numpy as np
import pytest

from bench import wild_tables
from bench.accuracy import calibration
from bench.accuracy.wild_problems import Pool


def test_error_by_hand():
    confidences = np.array([0.9, 0.9, 1.0, 0.5, 0.5])
    right = np.array([True, False, True, False, False])
    # Bins of two at 0.9, one at 1.0 and two at 0.5.
    expected = (2 * abs(0.9 - 0.5) + 1 * 0 + 2 * 0.5) / 5
    found = calibration.calibration_error(confidences, right)
    assert found == pytest.approx(100 * expected)


def test_what_is_recorded(problem, monkeypatch):
    features, prototypes, labels = problem(n=120, k=9)
    pools = [Pool(name, features, prototypes, labels) for name in ("dtd", "caltech101")]
    monkeypatch.setattr(calibration, "problems", lambda *_: pools)
    monkeypatch.setattr(calibration, "NAMES", calibration.NAMES[:1])
    rows = []
    monkeypatch.setattr(calibration, "record", lambda _, row: rows.append(row))
    assert calibration.main([], say=lambda _: None) == 0
    scenario, choice = rows
    (draw,) = scenario["draws"]  # of Caltech101
    assert set(draw) == {"z", "calibrated"}
    default = choice["errors"]["T 4, eps 0.0001"]  # of DTD, the same rows
    assert default == pytest.approx(draw["calibrated"]["error"]) != draw["z"]["error"]
    assert len(wild_tables.calibration_line([draw])) == len(wild_tables.CALIBRATION_HEAD) - 1


def test_nothing_is_recorded(tmp_path):
    assert "python -m bench.accuracy.calibration" in wild_tables.calibration(tmp_path)
