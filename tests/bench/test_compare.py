"""No time is told of an arm that gives other labels."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bench import compare
from bench.common import Isolated, record


@pytest.fixture
def arms(monkeypatch, tmp_path):
    """Stand-ins for the processes: what each arm answers, and who was asked, in order."""
    answers, asked = {"baseline": np.zeros(2000), "transclip_fast": np.zeros(2000)}, []

    def run_isolated(target, arm, folder):
        asked.append(arm)
        np.save(Path(folder) / f"{arm}.npy", answers[arm])
        return Isolated({"stages": {"knn": 1.0, "solve": 2.0}, "peak_bytes": 3}, 4.0, 5)

    monkeypatch.delenv(compare.VARIABLE, raising=False)
    monkeypatch.setattr(compare, "run_isolated", run_isolated)
    monkeypatch.setattr(compare, "record", partial(record, folder=tmp_path))
    return answers, asked


SIZES = ["--queries", "20", "30", "--classes", "5", "--dim", "8", "--repeats", "2"]


def test_two_wrong_rows_in_a_thousand_fail(arms, capsys, tmp_path):
    answers, asked = arms
    answers["transclip_fast"][:4] = 1
    assert compare.main(SIZES) == 1
    printed = capsys.readouterr().out
    assert "transclip_fast has other labels than baseline on 4 rows (99.80 % equal)" in printed
    assert "solve s" not in printed
    assert len(asked) == 4  # each arm once a size, none of them timed
    assert not list(tmp_path.iterdir())


def test_equal_labels_are_timed_in_turns_and_recorded(arms, capsys, tmp_path):
    answers, asked = arms
    answers["transclip_fast"][:2] = 1  # 99.9 % is enough
    assert compare.main(SIZES) == 0
    assert asked == ["baseline", "transclip_fast"] * 6
    printed = capsys.readouterr().out
    assert f"published code skipped: {compare.VARIABLE} names no checkout" in printed
    assert "baseline 1.0x" in printed
    rows = [json.loads(line) for line in (tmp_path / "compare.jsonl").read_text().splitlines()]
    assert [row["queries"] for row in rows] == [20, 30]
    assert rows[0]["arms"]["transclip_fast"]["seconds"] == [3.0, 3.0]
    assert rows[0]["arms"]["transclip_fast"]["agreement"] == 0.999


def test_an_arm_leaves_its_labels_and_says_time_and_memory(tmp_path):
    case = compare.make_case(200, 10, 32, tmp_path / "case")
    found = compare.run_arm("baseline", str(case.folder))
    assert found["stages"].keys() == {"knn", "solve"}
    assert found["peak_bytes"] >= 0
    assert np.load(case.folder / "baseline.npy").shape == (200,)
