"""Fits are fits, and no size is timed before its labels are right."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bench.common import record
from bench.speed import compare, scaling

SMALL = ["--queries", "200", "--classes", "12", "--dim", "32", "--repeats", "1"]


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "busy_cores", lambda: 0.0)
    monkeypatch.setattr(scaling, "record", partial(record, folder=tmp_path))
    return lambda: json.loads((tmp_path / "scaling.jsonl").read_text())


def test_exponent_of_a_power():
    assert scaling.exponent([10, 20, 40], [3 * n**1.5 for n in (10, 20, 40)]) == pytest.approx(1.5)


class StandIn:
    """A process whose time is linear in N, its memory quadratic."""

    wrong: str | None = None

    def __init__(self, threads):
        pass

    def call(self, target, arm, folder, device):
        n = len(np.load(Path(folder) / "features.npy"))
        stages = {"knn": 1e-6 * n, "solve": 1e-5 * n}
        if target == "bench.speed.compare:run_again":
            return stages
        np.save(Path(folder) / f"{arm}.npy", np.zeros(n) + (arm == self.wrong))
        return {"stages": stages, "peak_bytes": n * n, "device_peak_bytes": None}

    def close(self):
        pass


def test_growth_is_fitted_and_recorded(monkeypatch, recorded, capsys):
    monkeypatch.setattr(compare, "Process", StandIn)
    monkeypatch.setitem(scaling.SIZES, "queries", (20, 40, 80))
    assert scaling.main(["--against", "queries", *SMALL]) == 0
    fits = recorded()["exponents"]
    assert fits["baseline"]["solve"] == pytest.approx(1)
    assert fits["dense_torch"]["bytes"] == pytest.approx(2)
    assert "solve ~ queries^1.00" in capsys.readouterr().out


def test_other_labels_are_not_timed(monkeypatch, recorded, capsys):
    monkeypatch.setattr(compare, "Process", StandIn)
    monkeypatch.setattr(StandIn, "wrong", "dense_torch")
    monkeypatch.setitem(scaling.SIZES, "queries", (20, 40))
    assert scaling.main(["--against", "queries", *SMALL]) == 1
    assert "dense_torch has other labels than baseline" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError):
        recorded()


def test_lists_and_schedules_beside_the_dense_default(recorded, monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "LISTS", ((12, 12), (4, 4)))
    assert scaling.main(["--against", "lists", *SMALL]) == 0
    whole, short = recorded()["options"]
    assert whole["agreement"] == 1
    assert whole["truncation"]["mean_dropped"] < short["truncation"]["mean_dropped"]
    (tmp_path / "scaling.jsonl").unlink()
    monkeypatch.setattr(scaling, "SCHEDULES", ((10, 5), (0, 1)))
    assert scaling.main(["--against", "schedule", *SMALL]) == 0
    default, none = recorded()["options"]
    assert default["agreement"] == 1
    assert none["agreement"] < 1
