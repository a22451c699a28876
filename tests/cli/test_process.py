"""The command line in a process of its own: killed, interrupted, disturbed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from tests.cli.conftest import contents

COMMAND = [sys.executable, "-c", "from transclip_fast.cli import main; main()"]


@pytest.fixture
def running(save, arrays, tmp_path):
    """A `solve` into tmp_path/result that would take for ever, in the middle of its work."""
    args = [
        *COMMAND,
        "solve",
        save(arrays),
        "--out",
        tmp_path / "result",
        "--max-iter",
        "100000000",
    ]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (tmp_path / ".result.partial").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    assert process.poll() is None
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped(how, solved, running, cli, succeeds, tmp_path):
    earlier = contents(solved)
    ran = cli("solve", tmp_path / "features.npz", "--out", tmp_path / "result")
    assert ran.code == 2
    assert ran.err.startswith(f"error: {tmp_path / 'result'}: another process is writing")
    time.sleep(0.3)
    running.send_signal(how)
    _, err = running.communicate(timeout=60)
    assert running.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 1)
    assert contents(solved) == earlier
    if how == signal.SIGINT:
        assert "Traceback" not in err
        left = {path.name for path in tmp_path.iterdir()} - {"features.npz", "result"}
        assert all(name.startswith((".result.graph", ".result.solve-0.")) for name in left)
    succeeds("solve", tmp_path / "features.npz", "--out", tmp_path / "result", "--max-iter", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"features.npz", "result"}
    assert contents(solved) != earlier


def test_bad_input(tmp_path):
    args = [*COMMAND, "evaluate", tmp_path / "none"]
    ran = subprocess.run(args, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"error: {tmp_path / 'none'}: ")
    assert ran.stderr.count("\n") == 1
