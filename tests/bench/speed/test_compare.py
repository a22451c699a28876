"""An arm that gives other labels gets no time."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bench.common import record
from bench.rivals.published import VARIABLE
from bench.speed import compare
from transclip_fast.solver import loop as solver

PUBLISHED = ["baseline", "baseline_compiled", "dense_torch", "sparse_torch", "sparse_numba"]
ON_CPU = [*PUBLISHED, "default"]


@pytest.fixture
def arms(monkeypatch, tmp_path):
    """Stand-ins for the processes: what each arm answers, and who was asked, in order."""
    answers, asked, closed = {arm: np.zeros(2000) for arm in ON_CPU}, [], []

    class StandIn:
        def __init__(self, threads):
            pass

        def call(self, target, arm, folder, device):
            assert device == "cpu"
            asked.append((target.rpartition(":")[2], arm))
            np.save(Path(folder) / f"{arm}.npy", answers[arm])
            np.save(Path(folder) / "labels.npy", np.ones(2000))
            stages = {"knn": 1.0, "solve": 2.0}
            first = {"stages": stages, "peak_bytes": 3, "device_peak_bytes": None}
            return first if target == "bench.speed.compare:run_arm" else stages

        def close(self):
            closed.append(self)

    monkeypatch.setattr(compare, "busy_cores", lambda: 0.0)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(compare.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compare, "Process", StandIn)
    monkeypatch.setattr(compare, "record", partial(record, folder=tmp_path))
    yield answers, asked
    assert len(closed) == len([call for call in asked if call[0] == "run_arm"])


SIZES = ["--queries", "20", "30", "--classes", "5", "--dim", "8", "--repeats", "2"]


def test_two_wrong_rows_in_a_thousand_fail(arms, capsys, tmp_path):
    answers, asked = arms
    answers["sparse_numba"][:4] = 1
    assert compare.main(SIZES) == 1
    printed = capsys.readouterr().out
    assert "sparse_numba has other labels than baseline on 4 rows (99.80 % equal)" in printed
    assert "solve s" not in printed
    # Each arm once a size, none of them timed.
    assert asked == 2 * [("run_arm", arm) for arm in ON_CPU]
    assert not list(tmp_path.iterdir())


def test_equal_labels_are_timed_in_turns_and_recorded(arms, capsys, tmp_path):
    answers, asked = arms
    answers["sparse_numba"][:2] = 1  # 99.9 % is enough
    answers["default"][:1000] = 1  # which has a class cost
    assert compare.main(SIZES) == 0
    turns = [("run_again", arm) for arm in ON_CPU]
    assert asked == 2 * [("run_arm", arm) for arm in ON_CPU] + 4 * turns
    printed = capsys.readouterr().out
    assert f"SKIPPED published: {VARIABLE} names no checkout" in printed
    assert "SKIPPED sparse_triton: torch finds no GPU" in printed
    assert "baseline 1.00" in printed
    rows = [json.loads(line) for line in (tmp_path / "compare.jsonl").read_text().splitlines()]
    assert [row["queries"] for row in rows] == [20, 30]
    assert rows[0]["one_solve"] == "dense_torch"
    accuracies = {arm: found["accuracy"] for arm, found in rows[0]["arms"].items()}
    assert accuracies == dict.fromkeys(PUBLISHED, 0.0) | {"sparse_numba": 0.1, "default": 50.0}
    assert rows[0]["arms"]["sparse_numba"]["seconds"] == [3.0, 3.0]
    assert rows[0]["arms"]["sparse_numba"]["agreement"] == 0.999
    assert rows[0]["arms"]["sparse_numba"]["device_peak_bytes"] is None


def test_beside_other_work_every_arm_has_one_thread(arms, monkeypatch, capsys, tmp_path):
    cores = len(os.sched_getaffinity(0))
    for load, threads in ((0.05 * cores, cores), (0.5 * cores, 1)):
        monkeypatch.setattr(compare, "busy_cores", lambda load=load: load)
        assert compare.main(SIZES) == 0
        assert ("an arm gets one thread" in capsys.readouterr().out) is (threads == 1)
        line = json.loads((tmp_path / "compare.jsonl").read_text().splitlines()[-1])
        assert (line["load_before"], line["threads"]) == (load, threads)


def test_without_a_compiler_the_compiled_arm_is_skipped_loudly(arms, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compare.main(SIZES) == 0
    assert "baseline_compiled" not in {arm for _, arm in arms[1]}
    wanted = (
        "SKIPPED baseline_compiled: torch.compile needs a C++ compiler, and there is no no-such"
    )
    assert wanted in capsys.readouterr().out


TWO = "baseline", "dense_torch"


def without_prior(linear_score, mixture, prior, **weights):
    """P and c of a solver that forgets its prior."""
    score = linear_score(mixture, prior, **weights)
    return replace(score, weights=score.weights - weights["kl_weight"] * prior.weights)


def test_a_wrong_solver_is_caught(monkeypatch, capsys, tmp_path):
    class Here:
        def __init__(self, threads):
            pass

        def call(self, target, **arguments):
            return getattr(compare, target.rpartition(":")[2])(**arguments)

        def close(self):
            pass

    monkeypatch.setattr(compare, "busy_cores", lambda: 0.0)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(compare.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compare, "Process", Here)
    monkeypatch.setattr(compare, "record", partial(record, folder=tmp_path))
    monkeypatch.setattr(compare, "why_not", lambda arm, _: "not asked" if arm not in TWO else None)
    sizes = ["--queries", "500", "--classes", "20", "--dim", "64", "--repeats", "1"]
    assert compare.main(sizes) == 0
    assert "solve s" in capsys.readouterr().out
    monkeypatch.setattr(solver, "linear_score", partial(without_prior, solver.linear_score))
    (tmp_path / "compare.jsonl").unlink()
    assert compare.main(sizes) == 1
    printed = capsys.readouterr().out
    assert "dense_torch has other labels than baseline" in printed
    assert "solve s" not in printed
    assert not list(tmp_path.iterdir())


def test_an_arm_leaves_its_labels_and_says_time_and_memory(tmp_path):
    sizes = {"queries": 200, "classes": 10, "dim": 32}
    case = compare.make_case(sizes, tmp_path / "case", compare.ARMS, "cpu", 1, True)
    found = compare.run_arm("baseline", str(case.folder), "cpu")
    assert found["stages"].keys() == {"knn", "solve"}
    assert found["peak_bytes"] >= 0
    assert np.load(case.folder / "baseline.npy").shape == (200,)
