"""The command line in a process of its own: killed, interrupted, disturbed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from tests.cli.conftest import contents

COMMAND = [sys.executable, "-c", "from transclip_fast.cli import main; main()"]
HANG_SECONDS = 600  # far beyond what a loaded machine needs: ends a test that hangs


def wait_until(condition):
    """Wait for a condition, however long a loaded machine takes; fail where it never comes."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the process hangs"
        time.sleep(0.05)


@pytest.fixture
def running(save, arrays, tmp_path):
    """A `solve` into tmp_path/result that would take for ever, after its first checkpoint."""
    args = [
        *COMMAND,
        "solve",
        save(arrays),
        "--out",
        tmp_path / "result",
        "--max-iter",
        "100000000",
    ]
    # A background job of a shell ignores Ctrl-C, and its children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    checkpoint = tmp_path / ".result.solve-0.npz"
    try:
        wait_until(lambda: checkpoint.exists() or process.poll() is not None)
        assert process.poll() is None
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped(how, solved, running, cli, tmp_path):
    earlier = contents(solved)
    ran = cli("solve", tmp_path / "features.npz", "--out", tmp_path / "result")
    assert ran.code == 2
    assert ran.err.startswith(f"error: {tmp_path / 'result'}: another process is writing")
    running.send_signal(how)
    _, err = running.communicate(timeout=HANG_SECONDS)
    assert running.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 1)
    assert contents(solved) == earlier
    if how == signal.SIGINT:
        assert "Traceback" not in err
        left = {path.name for path in tmp_path.iterdir()} - {"features.npz", "result"}
        assert all(name.startswith((".result.graph", ".result.solve-0.")) for name in left)
    ran = cli("solve", tmp_path / "features.npz", "--out", tmp_path / "result", "--max-iter", 1)
    assert ran.code == 0
    assert f"warning: {tmp_path / '.result.solve-0.npz'}: " in ran.err  # of other parameters
    assert {path.name for path in tmp_path.iterdir()} == {"features.npz", "result"}
    assert contents(solved) != earlier


def test_bad_input(tmp_path):
    args = [*COMMAND, "evaluate", tmp_path / "none"]
    ran = subprocess.run(args, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"error: {tmp_path / 'none'}: ")
    assert ran.stderr.count("\n") == 1
