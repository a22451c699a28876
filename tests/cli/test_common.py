"""Progress, warnings, help."""

from __future__ import annotations

import sys
import warnings

import pytest

from transclip_fast.cli import COMMANDS, common
from transclip_fast.errors import InputError


def test_plain_progress_is_a_line_now_and_then(capsys, monkeypatch):
    clock = iter([3.0, 7.0, 15.0, 18.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with common.progress("graph", "rows") as show:
        for done in (1000, 2000, 4000, 4500):
            show(done, 6000, recall=0.5)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["graph: 4,000 of 6,000 rows, 250.0 a second, 8 s left, recall 0.5"]


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with common.progress("solve", "steps") as show:
        for done in range(1, 4):
            show(done, 4, objective="-1.5")
    err = capsys.readouterr().err
    assert "\r" in err
    assert "solve:" in err


def test_stages_add_up(monkeypatch):
    clock = iter([0.0, 1.5, 2.0, 2.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    stages = common.Stages()
    for _ in range(2):
        with stages.time("load"):
            pass
    assert stages.seconds == {"load": 1.75}


def test_warnings_name_the_file_and_are_kept(capsys):
    with common.collected_warnings({"labels": "y.npy"}) as kept:
        warnings.warn("labels: odd", stacklevel=1)
        warnings.warn("of a library to its developers", DeprecationWarning, stacklevel=1)
    assert kept == ["y.npy: odd"]
    assert capsys.readouterr().err == "warning: y.npy: odd\n"


@pytest.mark.parametrize(
    ("message", "named"),
    [("labels: row 3", "y.npy: row 3"), ("no prior: give one", "x.npz: no prior: give one")],
)
def test_errors_name_the_file(message, named):
    with pytest.raises(InputError) as error, common.named({"labels": "y.npy"}, "x.npz"):
        raise InputError(message)
    assert str(error.value) == named


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name, succeeds):
    out = succeeds(name, "--help")
    assert f"Usage: transclip-fast {name}" in out
    assert f"\n    transclip-fast {name}" in out


def test_help_lists_the_commands(succeeds):
    out = succeeds("--help")
    assert all(f"  {name} " in out for name in COMMANDS)


def test_version(succeeds):
    assert succeeds("--version").startswith("transclip-fast, version ")
