"""Two thousand mutated files end in one line or in a result; and faults are seen as faults."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from bench.fuzz import trial
from bench.fuzz.__main__ import report
from bench.fuzz.trial import ACCEPTED, REFUSED, Trials
from transclip_fast.store import results

# Those whose commands take about 10 ms; `python -m bench.fuzz` has all.
FORMATS = (
    "caches", "folder", "graph", "head", "index", "labels", "names", "protocol", "result",
    "safetensors", "tar",
)  # fmt: skip
NUMBER, SEED = 2000, 22


@pytest.fixture(scope="module")
def trials(one_thread, tmp_path_factory):
    before = os.getcwd()
    yield Trials(tmp_path_factory.mktemp("seeds"), SEED, FORMATS)
    os.chdir(before)


def test_no_mutated_file_is_a_fault(trials):
    outcomes = [trials.run(number) for number in range(NUMBER)]
    assert [found for found in outcomes if found.kind not in (ACCEPTED, REFUSED)] == []
    counts = Counter(found.kind for found in outcomes)
    assert counts[REFUSED] > NUMBER / 2
    assert counts[ACCEPTED] > NUMBER / 20
    assert {found.format for found in outcomes} == set(FORMATS)


def target(trials, file, kept=""):
    return next(t for t in trials.targets if t.file == file and t.kept == kept)


def test_the_same_number_is_the_same_file(trials):
    assert [trials.run(number) for number in range(30)] == [trials.run(n) for n in range(30)]


def test_valid_files_are_accepted(trials):
    for one in set(trials.targets):
        assert trials.judged(one) == (ACCEPTED, ""), one


def test_a_traceback_is_a_fault(trials, monkeypatch):
    monkeypatch.setattr(results, "read_json", lambda file: {"n_classes": 3}["config"])
    kind, detail = trials.judged(target(trials, "result/run.json"))
    assert kind == "traceback"
    assert "KeyError: 'config' at" in detail


def test_several_lines_are_a_fault(trials, monkeypatch):
    monkeypatch.setattr(trial, "main", lambda: os.sys.exit(2))
    assert trials.judged(target(trials, "result/run.json"))[0] == "lines"


def test_other_data_are_a_fault(trials, monkeypatch):
    one = target(trials, "result/predictions.parquet", "result")
    assert trials.judged(one) == (ACCEPTED, "")
    file = trials.root / one.file
    table = results.read_table(file).slice(0, 9)
    monkeypatch.setattr(results, "read_table", lambda *_, **__: table)
    assert trials.judged(one)[0] == "changed"


def test_report(capsys):
    found = {"format": "tar", "detail": "KeyError at x.py:3"}
    outcomes = [{**found, "number": n, "kind": "traceback"} for n in (4, 7)]
    assert report([*outcomes, {**found, "number": 5, "kind": REFUSED}]) == 2
    out = capsys.readouterr().out
    assert "2 traceback tar x.py:3: KeyError at x.py:3 (--first 4, 7)" in out
    assert "3 mutated files, 2 faults" in out
