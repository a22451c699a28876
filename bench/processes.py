"""Python processes of their own, for what must not share memory, caches or threads.

Memory is read from Linux's /proc.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.common import ROOT

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Isolated:
    """What a function did in a process of its own."""

    result: Any
    seconds: float  # of the whole process, with its imports
    peak_bytes: int  # largest resident memory of that process alone


class Process:
    """
    A new Python process that makes one call after another.

    Parameters
    ----------
    threads : int, optional
        Of each of its libraries; as many as they like where not given.
    """

    def __init__(self, threads: int | None = None) -> None:
        limits = {} if threads is None else dict.fromkeys(THREADS, str(threads))
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        answers, theirs = os.pipe()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `close` does
        call = f"from bench.processes import answer_calls; answer_calls({theirs})"
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, with our own words
            [sys.executable, "-c", call],
            env={**os.environ, "PYTHONPATH": path, **limits},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=[theirs],
            text=True,
        )
        os.close(theirs)
        self._answers = os.fdopen(answers)

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._process.kill()
        self.close()

    def call(self, target: str, **arguments: Any) -> Any:
        """Call a function there and return what it returns.

        Parameters
        ----------
        target : str
            "package.module:function"; what it returns must fit in JSON.
        **arguments
            Its keyword arguments; they must fit in JSON.

        Raises
        ------
        RuntimeError
            It failed, and the process ended.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it ended before: no answer comes
            self._process.stdin.write(json.dumps([target, arguments]) + "\n")
            self._process.stdin.flush()
        answer = self._answers.readline()
        if not answer:
            code = self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"{target} ended with {code}:\n{self._errors.read()[-4000:]}")
        return json.loads(answer)

    def close(self) -> None:
        """Wait for its end."""
        self._process.communicate()
        self._answers.close()
        self._errors.close()


def answer_calls(answers: int) -> None:
    """Make the calls that come on standard input, and write what they return to a descriptor."""
    with os.fdopen(answers, "w") as file:
        for line in sys.stdin:
            target, arguments = json.loads(line)
            module, _, function = target.partition(":")
            result = getattr(importlib.import_module(module), function)(**arguments)
            print(json.dumps(result), file=file, flush=True)


def run_isolated(target: str, **arguments: Any) -> Isolated:
    """Call a function in a process of its own, see `Process.call`."""
    start = time.perf_counter()
    with Process() as process:
        result = process.call(target, **arguments)
        peak = process.call("bench.processes:process_memory", field="VmHWM")
    return Isolated(result, time.perf_counter() - start, peak)


def process_memory(field: str) -> int:
    """Return this process's resident memory in bytes: "VmRSS" now, "VmHWM" at its peak."""
    # Not ru_maxrss: it starts at the peak of the parent that forked the process.
    status = Path("/proc/self/status").read_text()
    return int(status.partition(field + ":")[2].split()[0]) * 1024


def reset_peak_memory() -> None:
    """Let "VmHWM" start over from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
