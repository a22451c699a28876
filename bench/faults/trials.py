"""One command, its operations counted, then each of them failed: what it leaves, and a rerun.

Runs in a process with the preloaded library, which has imported everything; each trial is a fork.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq

from bench.faults.commands import CASES, Case
from bench.faults.library import FAULTS, Fault, arm, disarm
from bench.speed.kill import VARYING

HANG_SECONDS = 120.0
TRACEBACK = 70  # exit code of a command that ended in another exception
CLEANING = ("unlink", "rmdir", "list", "stat", "open")  # operations with which files are removed
# Checkpoints, from which the next run goes on.
KEPT = re.compile(r"\.(search|solve-\d|training)\.npz|\.compare\.json|\.[\w.]+\.graph(/|$)")
# Of a page: its times, and what its list of warnings has.
VARYING_LINES = re.compile(
    rb"(?ms)^ *<div><dt>\w+</dt><dd>[\d.]+ s\b[^\n]*\n|<ul class=.warnings.*?</ul>\n"
)
DIGITS, SETS = 6, ("plain", "blur")  # of the demo
State = dict[str, str]  # files and folders, with the hashes of files


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code or -signal, output, standard error, and operations."""

    code: int
    output: str
    errors: str
    operations: list[str]

    @property
    def refused(self) -> bool:
        """Exit code 2 and one line "error: ...", behind warnings."""
        lines = [x for x in self.errors.splitlines() if not x.startswith("warning: ")]
        return self.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")

    @property
    def notes(self) -> bool:
        """Whether the output says what was left out."""
        return any(line.startswith("note: ") for line in self.output.splitlines())

    def operation(self, n: int) -> str:
        """The nth operation, as it was logged; workers log side by side."""
        return next((x for x in self.operations if x.startswith(f"{n} ")), f"{n} was not reached")


def try_command(name: str, every: Mapping[str, int], first: int = 1) -> dict[str, Any]:
    """
    Let operations of a command fail, one a run, and return counts of how that ended.

    `every` has the stride of each fault to try: of its operations `first` and every so many later
    ones fail. "problems" lists what must not be.
    """
    with tempfile.TemporaryDirectory(dir=_memory()) as scratch, _reproducible():
        trials = _Trials(CASES[name], Path(scratch).resolve())
        return {
            fault: trials.fail_each(FAULTS[fault], stride, first) for fault, stride in every.items()
        }


class _Trials:
    """Runs of one command in one folder."""

    def __init__(self, case: Case, scratch: Path) -> None:
        self.case, self.scratch = case, scratch
        self.folder, self.template = scratch / "work", scratch / "template"
        self.rerun_well = set[str]()  # what was there before reruns that ended as they must
        self.template.mkdir()
        os.chdir(self.template)
        case.prepare()
        os.chdir(scratch)
        for step in (*case.earlier, case.change):
            if step is not None:
                self._restore()
                self._inside(step)
                shutil.rmtree(self.template)
                shutil.copytree(self.folder, self.template)
        self._restore()
        self.before, self.usable = state_of(self.folder), {None, self._usable()}
        self._must_succeed()
        self.after = state_of(self.folder)
        self.usable.add(self._usable())
        self._restore()
        self._must_succeed()
        if state_of(self.folder) != self.after:
            raise RuntimeError(f"{case.command}: two runs differ: {self._differences(self.after)}")

    def fail_each(self, fault: Fault, every: int, first: int) -> dict[str, Any]:
        """Try a fault at every operation of its class."""
        self._restore()
        operations = self._run(fault, 0).operations
        tried = range(first, len(operations) + 1, every)
        counts, problems = Counter[str](), list[str]()
        for n in tried:
            self._restore()
            ended = self._run(fault, n)
            counts[_outcome(ended)] += 1
            wrong = [*self._wrong(ended, fault, n), *self._wrong_rerun()]
            problems += [f"{ended.operation(n)}: {x}" for x in wrong]
        return {
            "operations": len(operations), "tried": len(tried), **counts, "problems": problems
        }  # fmt: skip

    def _wrong(self, ended: Ended, fault: Fault, n: int) -> Iterator[str]:
        """What must not be, right after a run with a fault."""
        now = state_of(self.folder)
        failed = ended.operation(n).split()[1]
        right = {-signal.SIGKILL} if fault.kills else {0}
        if self.case.workers:
            right.add(0)  # another process was killed
        others = [x for x in self._differences(self.after) if not _is_hidden(x)]
        if ended.notes and ended.code == 0:  # a page says what it does not show
            others = [x for x in others if x not in self.case.whole]
        if ended.code not in right and not (ended.refused and 0 in right):
            yield f"ended with {ended.code}: {ended.errors[-1500:]}"
        elif ended.code == 0 and others:
            yield f"exit 0 with another result: {others}; {ended.errors}"
        for output in self.case.whole:
            whole = _part(self.before, output), _part(self.after, output)
            if _part(now, output) not in whole and not (ended.notes and output not in others):
                yield f"{output} is a mix: {self._differences(self.after)}"
        if self._usable() not in self.usable:
            yield f"{self.case.features} can be opened, and is a mix"
        left = [x for x in now if _is_hidden(x) and x not in self.before]
        if ended.code:
            left = [x for x in left if not KEPT.search(x)]
        told = all(x.endswith(".lock") for x in left) or "cannot remove" in ended.errors
        if not fault.kills and not told and not (ended.code and failed in CLEANING):
            yield f"left {', '.join(left)}"

    def _wrong_rerun(self) -> Iterator[str]:
        found = json.dumps(state_of(self.folder, exactly=True))
        if found in self.rerun_well:  # the same command on the same files does the same
            return
        ended = self._run(FAULTS["EIO"], 0)
        if ended.code != 0:
            yield f"the rerun ended with {ended.code}: {ended.errors[-1500:]}"
        elif differences := self._differences(self.after):
            yield f"the rerun differs in {differences}"
        else:
            self.rerun_well.add(found)

    def _differences(self, expected: State) -> list[str]:
        now = state_of(self.folder)
        names = now.keys() | expected.keys()
        return sorted(name for name in names if now.get(name) != expected.get(name))

    def _usable(self) -> str | None:
        """A hash of the features that are opened; None if they are refused."""
        from transclip_fast.errors import InputError
        from transclip_fast.store.features import load_features

        if self.case.features is None:
            return None
        with suppress(InputError):
            features = load_features(self.folder / self.case.features)
            return json.dumps([features.inputs_sha256(), features.keys])
        return None

    def _restore(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.template, self.folder)

    def _must_succeed(self) -> None:
        self._inside(self.case.command)

    def _inside(self, step: Any) -> None:
        """Run a command or a function in the folder, in this process, which warms it up."""
        os.chdir(self.folder)
        try:
            errors = io.StringIO()
            code = 0
            if callable(step):
                step()
            else:
                with mock.patch("sys.stdout", io.StringIO()), mock.patch("sys.stderr", errors):
                    code = _call(step)
        finally:
            os.chdir(self.scratch)
        if code:
            raise RuntimeError(f"{step}: ended with {code}: {errors.getvalue()}")

    def _run(self, fault: Fault, nth: int) -> Ended:
        """Run the command in a forked process."""
        log, output, errors = (self.scratch / name for name in ("log", "output", "errors"))
        for file in (log, output, errors):
            file.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            code = TRACEBACK
            try:
                os.chdir(self.folder)
                with open(output, "w") as out, open(errors, "w") as err:
                    sys.stdout, sys.stderr = out, err
                    arm(self.folder, fault, nth, log)
                    code = _call(self.case.command)
                    disarm()
            finally:
                os._exit(code)
        code = _wait(child)
        operations = log.read_text().splitlines()
        return Ended(code, output.read_text(), errors.read_text(), operations)


def _call(command: str) -> int:
    """The exit code of a command line; a traceback on standard error if it raises."""
    from transclip_fast.cli import main

    with mock.patch("sys.argv", ["transclip-fast", *shlex.split(command)]):
        try:
            main()
        except SystemExit as stopped:
            return int(stopped.code or 0)
        except BaseException:  # noqa: BLE001 - printed, and an exit code of its own
            traceback.print_exc()
            return TRACEBACK
    return 0


def _wait(child: int) -> int:
    """The exit code of a child, or -signal; it is killed if it hangs."""
    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGALRM


def _outcome(ended: Ended) -> str:
    known = {0: "finished", 2: "refused", -signal.SIGKILL: "killed", -signal.SIGALRM: "hung"}
    return known.get(ended.code, "crashed")


@contextmanager
def _reproducible() -> Iterator[None]:
    """Checkpoints after every step, no times and memory, few digits and sets in the demo."""
    import torch

    from transclip_fast.cli import comparison, demo, graph, solution, train_head
    from transclip_fast.demo import data

    torch.set_num_threads(1)
    images, labels = data.digits()
    few = images[:DIGITS], labels[:DIGITS]
    with (
        mock.patch.object(graph, "CHECKPOINT_SECONDS", 0),
        mock.patch.object(solution, "CHECKPOINT_SECONDS", 0),
        mock.patch.object(train_head, "CHECKPOINT_SECONDS", 0),
        mock.patch.object(comparison, "reset_peak", return_value=False),  # the table has no memory
        mock.patch.object(data, "digits", return_value=few),
        mock.patch.object(demo, "SHIFTS", {name: data.SHIFTS[name] for name in SETS}),
        mock.patch.object(time, "perf_counter", return_value=0.0),
    ):
        yield


def _memory() -> str | None:
    """A folder in memory, where operations are fast; None for the usual one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108


def state_of(folder: Path, *, exactly: bool = False) -> State:
    """All files and folders, hidden ones too, with hashes of the files; without what varies in
    them from run to run, or of all bytes."""
    found = {}
    content = Path.read_bytes if exactly else _comparable
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = "" if path.is_dir() else hashlib.sha256(content(path)).hexdigest()
    return found


def _comparable(file: Path) -> bytes:
    """The content of a file without times, memory and warnings, which vary from run to run."""
    content = file.read_bytes()
    with suppress(Exception):  # a file that is not whole is compared as it is
        if file.name in ("run.json", "manifest.json"):
            run = {name: x for name, x in json.loads(content).items() if name not in VARYING}
            for entry in run.get("shards", {}).values():
                entry["metadata_sha256"] = ""  # of images that the command wrote, times are new
            return json.dumps(run).encode()
        if file.suffix == ".html":
            return VARYING_LINES.sub(b"", content)
        if file.parent.name == "metadata":
            return repr(pq.read_table(file).drop_columns("mtime_ns").to_pydict()).encode()
    return content


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def _part(state: State, name: str) -> State:
    """What belongs to a file or folder."""
    return {x: h for x, h in state.items() if x == name or x.startswith(f"{name}/")}
