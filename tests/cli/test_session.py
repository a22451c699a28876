"""Times, warnings, errors, help."""

from __future__ import annotations

import warnings

import pytest

from transclip_fast.cli import COMMANDS, session
from transclip_fast.errors import InputError


def test_stages_add_up(monkeypatch):
    clock = iter([0.0, 1.5, 2.0, 2.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    stages = session.Stages()
    for _ in range(2):
        with stages.time("load"):
            pass
    assert stages.seconds == {"load": 1.75}


def test_warnings_name_the_file_and_are_kept(capsys):
    with session.collected_warnings({"labels": "y.npy"}) as kept:
        warnings.warn("labels: odd", stacklevel=1)
        warnings.warn("of a library to its developers", DeprecationWarning, stacklevel=1)
    assert kept == ["y.npy: odd"]
    assert capsys.readouterr().err == "warning: y.npy: odd\n"


def test_a_warning_that_comes_again_is_shown_once(capsys):
    """As of shots that each method of a comparison checks."""
    with session.collected_warnings({}) as kept:
        for text in ("odd", "odd", "odder"):
            session.warn(kept, text)
            warnings.warn(text, stacklevel=1)
    assert kept == ["odd", "odder"]
    assert capsys.readouterr().err == "warning: odd\nwarning: odder\n"


def test_a_stage_inside_another_counts_once(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 5.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    stages = session.Stages()
    with stages.time("solve"), stages.time("graph"):
        pass
    assert stages.seconds == {"graph": 3.0, "solve": 2.0}


@pytest.mark.parametrize(
    ("number", "noun", "shown"),
    [
        (1, "row", "1 row"),
        (0, "row", "0 rows"),
        (1, "class", "1 class"),
        (2000, "class", "2,000 classes"),
    ],
)
def test_counted(number, noun, shown):
    assert session.counted(number, noun) == shown


@pytest.mark.parametrize(
    ("message", "named"),
    [("labels: row 3", "y.npy: row 3"), ("no prior: give one", "x.npz: no prior: give one")],
)
def test_errors_name_the_file(message, named):
    with pytest.raises(InputError) as error, session.errors_about({"labels": "y.npy"}, "x.npz"):
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
