"""File operations that fail: the library that lets them, and some of a few commands.

`python -m bench.faults` lets every one of every command fail.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from bench.faults.commands import CASES
from bench.faults.library import FAULTS, build, compiler
from bench.faults.tables import of_cases
from bench.processes import Process
from transclip_fast.cli import COMMANDS

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C compiler, cc")

# Of so many operations one fails; of those that read, of four times as many.
STRIDES = {"convert": 5, "graph": 9, "solve of files": 37, "train-head taskres": 7}
# Writes a, moves it to b, removes that; a failure is printed.
PROGRAM = """
import os, sys
from pathlib import Path
from bench.faults.library import FAULTS, arm, disarm
folder = Path(sys.argv[1])
arm(folder, FAULTS[sys.argv[2]], int(sys.argv[3]), folder.with_name("log"))
Path(folder.with_name("elsewhere")).write_bytes(b"not counted")
try:
    file = os.open(folder / "a", os.O_WRONLY | os.O_CREAT)
    written = os.write(file, b"0123456789")
    if written < 10:
        os.write(file, b"0123456789"[written:])
    os.fsync(file)
    os.close(file)
    os.rename(folder / "a", folder / "b")
    print((folder / "b").read_bytes())
    (folder / "b").unlink()
except OSError as error:
    print(error.strerror)
"""
CHANGES = ["open-write /a", "write /a", "sync /a", "close /a", "rename /a", "unlink /b"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("library"))


@pytest.fixture
def run(library, tmp_path):
    """Run PROGRAM with a fault: exit code, standard output, logged operations, files left."""
    (tmp_path / "work").mkdir()

    def program(fault, nth):
        ran = subprocess.run(
            [sys.executable, "-c", PROGRAM, tmp_path / "work", fault, str(nth)],
            env={**os.environ, "LD_PRELOAD": str(library)},
            capture_output=True,
            text=True,
            check=False,
        )
        log = [line.split(maxsplit=1)[1] for line in (tmp_path / "log").read_text().splitlines()]
        left = {file.name: file.read_bytes() for file in (tmp_path / "work").iterdir()}
        return ran.returncode, ran.stdout.strip(), log, left

    return program


def test_operations_are_counted(run):
    assert run("EIO", 0) == (0, "b'0123456789'", CHANGES, {})


def test_reads_are_counted(run):
    _, _, log, _ = run("READ", 0)
    assert log[0] == "open /b"
    assert log[-1] == "read /b"
    assert {line.split()[1] for line in log} == {"/b"}


def test_one_operation_fails(run):
    assert run("EIO", 3) == (0, "Input/output error", CHANGES[:3], {"a": b"0123456789"})


def test_a_disk_that_is_full_has_half_of_a_write_and_stays_full(run):
    log = ["open-write /a", "write /a", "write /a"]
    assert run("ENOSPC", 2) == (0, "No space left on device", log, {"a": b"01234"})


def test_a_read_fails(run):
    assert run("READ", 1)[1:] == ("Input/output error", ["open /b"], {"b": b"0123456789"})


@pytest.mark.parametrize(
    ("fault", "nth", "left"),
    [("KILL", 2, {"a": b""}), ("TORN", 2, {"a": b"01234"}), ("TORN", 5, {"b": b"0123456789"})],
)
def test_killed(fault, nth, left, run):
    assert run(fault, nth) == (-signal.SIGKILL, "", CHANGES[:nth], left)


@pytest.fixture(scope="module")
def process(library):
    """A process with the library, which tries commands."""
    with Process(threads=1, environment={"LD_PRELOAD": str(library)}) as started:
        yield started


@pytest.mark.parametrize(("command", "stride"), STRIDES.items())
def test_a_command(command, stride, process):
    every = dict.fromkeys(FAULTS, stride) | {"READ": 4 * stride}
    found = process.call("bench.faults.trials:try_command", name=command, every=every, first=3)
    for counts in found.values():
        assert counts["problems"] == []
        assert counts["tried"] > 0


def test_every_command_that_writes_is_tried():
    tried = {case.command.split()[0] for case in CASES.values()}
    assert tried == {*COMMANDS} - {"plan", "doctor"}


def test_faults_of_several_lines_are_one_row(tmp_path):
    """Those of the newest line's stride."""
    lines = [
        ("demo", 131, {"EIO": {"operations": 9, "tried": 1, "refused": 1}}),
        ("demo", 1, {"EIO": {"operations": 9, "tried": 9, "refused": 9}}),
        ("demo", 1, {"READ": {"operations": 5, "tried": 5, "refused": 4, "finished": 1}}),
    ]
    same = {"machine": {"dirty": False, "gpu": None}}
    with open(tmp_path / "faults.jsonl", "w") as file:
        for day, (case, every, faults) in enumerate(lines):
            line = {**same, "date": day, "case": case, "every": every, "faults": faults}
            file.write(f"{json.dumps(line)}\n")
    (row,) = of_cases(tmp_path)
    assert (row["every"], row["faults"]) == (1, lines[1][2] | lines[2][2])
