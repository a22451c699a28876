"""Separate Python processes, for arms that must not share memory, caches or threads.

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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from bench.common import ROOT

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
Result = TypeVar("Result")


class Process:
    """
    A new Python process that makes one call after another.

    Parameters
    ----------
    threads : int, optional
        Threads of each of its libraries; None leaves the number to each library.
    environment : dict, optional
        More variables of its environment.
    """

    def __init__(
        self, threads: int | None = None, environment: dict[str, str] | None = None
    ) -> None:
        limits = {} if threads is None else dict.fromkeys(THREADS, str(threads))
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        answers, writing_end = os.pipe()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `close` does
        call = f"from bench.processes import answer_calls; answer_calls({writing_end})"
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter with arguments of ours
            [sys.executable, "-c", call],
            env={**os.environ, "PYTHONPATH": path, **limits, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=[writing_end],
            text=True,
        )
        os.close(writing_end)
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
        """Return the result of a function "package.module:function" in the process.

        Arguments and result must fit in JSON. Where the function fails, the process ends and the
        call raises RuntimeError.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended, and no answer comes
            self._process.stdin.write(json.dumps([target, arguments]) + "\n")
            self._process.stdin.flush()
        answer = self._answers.readline()
        if not answer:
            code = self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"{target} ended with {code}:\n{self._errors.read()[-4000:]}")
        return json.loads(answer)

    def close(self) -> None:
        """Wait until the process has ended."""
        self._process.communicate()
        self._answers.close()
        self._errors.close()


def answer_calls(answers: int) -> None:
    """Make the calls read from standard input and write their results to a file descriptor."""
    with os.fdopen(answers, "w") as file:
        for line in sys.stdin:
            target, arguments = json.loads(line)
            module, _, function = target.partition(":")
            result = getattr(importlib.import_module(module), function)(**arguments)
            print(json.dumps(result), file=file, flush=True)


def run_isolated(target: str, **arguments: Any) -> Any:
    """Call a function in a process of its own, see `Process.call`."""
    with Process() as process:
        return process.call(target, **arguments)


def measured(run: Callable[[], Result]) -> tuple[Result, float, int]:
    """Return the result of a run, its seconds, and its peak memory beyond what was resident."""
    reset_peak_memory()
    before = process_memory("VmRSS")
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start, process_memory("VmHWM") - before


def process_memory(field: str) -> int:
    """Return this process's resident memory in bytes: "VmRSS" now, "VmHWM" at its peak."""
    # Not ru_maxrss: it starts at the peak of the parent that forked the process.
    status = Path("/proc/self/status").read_text()
    return int(status.partition(field + ":")[2].split()[0]) * 1024


def reset_peak_memory() -> None:
    """Let "VmHWM" start over from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
