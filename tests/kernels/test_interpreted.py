"""Runs the tests of `interpreted/`: every kernel in Triton's interpreter, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent / "interpreted"
ROOT = FOLDER.parents[2]
# Triton 3.6's interpreter itself calls what NumPy deprecates.
DEPRECATED = "ignore:Conversion of an array with ndim:DeprecationWarning"


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_in_the_interpreter(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", DEPRECATED]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, FOLDER / file], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
