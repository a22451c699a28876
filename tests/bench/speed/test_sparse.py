"""A sparse solve that gives other labels gets no time."""

import json
from functools import partial

import numpy as np
import pytest

from bench.common import record
from bench.speed import sparse

SIZES = ["--queries", "600", "--classes", "12", "--dim", "64", "--repeats", "1"]


@pytest.fixture
def in_this_process(monkeypatch, tmp_path):
    def run_isolated(target, **arguments):
        assert target == "bench.speed.sparse:run_arm"
        return sparse.run_arm(**arguments)

    monkeypatch.setattr(sparse, "run_isolated", run_isolated)
    monkeypatch.setattr(sparse, "record", partial(record, folder=tmp_path))


def test_all_arms_agree_and_are_recorded(in_this_process, capsys, tmp_path):
    assert sparse.main(SIZES) == 0
    row = json.loads((tmp_path / "sparse.jsonl").read_text())
    assert row["arms"].keys() == set(sparse.ARMS)
    for arm in ("baseline", "dense", "sparse"):
        assert row["arms"][arm]["agreement"] >= sparse.SAME_LABELS
        assert row["arms"][arm]["accuracy"] > row["zero_shot_accuracy"]
    assert row["arms"]["sparse"]["backend"] == "numba"
    assert row["arms"]["sparse"]["truncation"]["candidates"] == 12
    assert row["arms"]["sparse"]["times_sparse"] == 1
    assert "solve s" in capsys.readouterr().out


def test_other_labels_fail(in_this_process, monkeypatch, capsys, tmp_path):
    solve_arm = sparse.solve_arm

    def wrong(arm, *arguments):
        labels, facts = solve_arm(arm, *arguments)
        return (np.roll(labels, 1) if arm == "sparse" else labels), facts

    monkeypatch.setattr(sparse, "solve_arm", wrong)
    assert sparse.main(SIZES) == 1
    printed = capsys.readouterr().out
    assert "labels differ from baseline's" in printed
    assert "solve s" not in printed
    assert not (tmp_path / "sparse.jsonl").exists()
