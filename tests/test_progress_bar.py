"""Progress is a bar on a terminal, and lines in a file or pipe."""

from __future__ import annotations

import sys
import threading

import pytest

from transclip_fast.progress_bar import announced, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """Seconds that tqdm believes; set the first entry."""
    seconds = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: seconds[0])
    return seconds


def test_a_line_every_ten_seconds(capsys, clock):
    with progress_bar("graph", "rows") as show:
        for clock[0], done in ((3, 1000), (7, 2000), (15, 4000), (18, 4500), (26, 5500)):
            show(done, 6000, recall=0.5)
    assert capsys.readouterr().err == (
        "graph: 4,000 of 6,000 rows, 250.0 a second, 8 s left, recall 0.5\n"
        "graph: 5,500 of 6,000 rows, 195.7 a second, 3 s left, recall 0.5\n"
    )


@pytest.mark.parametrize("done", [(), (5,), (5, 5)])
def test_no_line_without_progress(done, capsys, clock):
    with progress_bar("graph", "rows") as show:
        for rows in done:
            show(rows, 10)
            clock[0] += 100
    assert capsys.readouterr().err == ""


def test_more_than_was_foreseen(capsys, clock):
    with progress_bar("solve", "rows") as show:
        for rows in (0, 12):
            show(rows, 10)
            clock[0] += 12
    assert capsys.readouterr().err == "solve: 12 of 12 rows, 1.0 a second, 0 s left\n"


def test_two_at_once(capsys, clock):
    with progress_bar("solve", "rows") as outer, progress_bar("graph", "rows") as inner:
        for rows in (0, 120):
            outer(rows, 240)
            inner(rows, 240)
            clock[0] += 12
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["solve", "graph"]


def test_what_takes_long_is_announced_in_a_file(capsys, monkeypatch):
    started = []

    class Clock(threading.Timer):
        def start(self):
            started.append(self)
            super().start()

    monkeypatch.setattr("threading.Timer", Clock)
    with announced("loading model"):
        pass
    assert capsys.readouterr().err == ""  # it was over before
    assert not started[0].is_alive()
    with announced("loading model"):
        started[1].function(*started[1].args, **started[1].kwargs)  # as after its seconds
    assert capsys.readouterr().err == "loading model ...\n"
    assert started[1].interval == 10


def test_what_takes_long_is_announced_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with announced("loading model"):
        assert capsys.readouterr().err == "loading model ...\r"
    assert capsys.readouterr().err == " " * len("loading model ...") + "\r"


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress_bar("solve", "steps") as show:
        for done in range(1, 4):
            show(done, 4, objective="-1.5")
    err = capsys.readouterr().err
    assert "\r" in err
    assert "solve:" in err
    assert "\n" not in err
