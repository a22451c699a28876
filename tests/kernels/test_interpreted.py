"""Runs the tests of `interpreted/`: every kernel in Triton's interpreter, on the CPU."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton")
VERSIONS = [tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")]
pytestmark = pytest.mark.skipif(
    VERSIONS[0] == (3, 6) and VERSIONS[1] >= (2, 4),
    reason="Triton 3.6's interpreter makes scalars of arrays of one entry, which NumPy 2.4 refuses",
)
FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(FOLDER.glob("test_*.py"))
# Triton 3.6's interpreter itself calls what NumPy deprecates.
DEPRECATED = "ignore:Conversion of an array with ndim:DeprecationWarning"


@pytest.mark.parametrize("files", [FILES[::2], FILES[1::2]], ids=["half", "other half"])
def test_in_the_interpreter(files):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", DEPRECATED]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *files],
        cwd=FOLDER.parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
