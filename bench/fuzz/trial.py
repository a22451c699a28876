"""One mutated file: the command that reads it, in this process, and what came of it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch

from bench.fuzz.mutations import mutate
from bench.fuzz.seeds import FORMATS, OUT, Target, build
from bench.processes import process_memory
from transclip_fast.cli import main
from transclip_fast.encode import models
from transclip_fast.encode.models import load_backbone
from transclip_fast.encode.weights import WatchedFiles

MOST_SECONDS, MOST_BYTES = 20, 2 << 30  # of a command
ADDRESS_SPACE = 6 << 30  # beyond what is mapped at the start: a bomb fails instead of the machine
SHOWN = 600  # characters of an output
RESULTS = ("predictions.parquet", "neighbors.npy")
# Outcomes that are no faults.
ACCEPTED, REFUSED = "accepted", "refused"


@dataclass(frozen=True)
class Ran:
    """A command's exit code, its output and, where it raised something else, the traceback."""

    code: int
    out: str
    err: str
    raised: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a command made of a mutated file."""

    number: int
    format: str
    kind: str
    detail: str = ""


class Slow(BaseException):
    """The command took longer than `MOST_SECONDS`."""


class Trials:
    """
    Mutated files by number, each given to its command.

    Parameters
    ----------
    root : Path
        An empty folder; becomes the working directory.
    seed : int
    only : collection of str, optional
        Formats.
    """

    def __init__(self, root: Path, seed: int, only: tuple[str, ...] = ()) -> None:
        self.root, self.seed = root, seed
        importlib.import_module("transclip_fast.ops.numba_backend")  # compiles, which is not timed
        os.chdir(root)
        targets = build(root, lambda command: run(command).code)
        assert {target.format for target in targets} <= {*FORMATS}
        self.targets = [t for t in targets if not only or t.format in only]
        files = [file for file in root.rglob("*") if file.is_file()]
        self._seeds = {file: (file.read_bytes(), os.stat(file)) for file in files}
        self._names = {str(file) for file in files}
        self._folders = {str(folder) for file in files for folder in file.parents}
        self._expected: dict[Target, Any] = {}

    def run(self, number: int) -> Outcome:
        """Give the mutated file of that number to its command."""
        draw = random.Random(f"{self.seed} {number}")  # noqa: S311 - no secret
        target = self.targets[number % len(self.targets)]
        path = self.root / target.file
        kind, detail = self.judged(target, mutate(path, self._seeds[path][0], draw))
        return Outcome(number, target.format, kind, f"{target.command.split()[0]}: {detail}")

    def judged(self, target: Target, content: bytes | None = None) -> tuple[str, str]:
        """The outcome, and why, of a target's command where its file has another content."""
        if target.kept and target not in self._expected:
            self._expected[target] = self._left(target, self._ran(target))
            self._clean()
        if content is not None:
            (self.root / target.file).write_bytes(content)
        before, peak, started = *map(process_memory, ("VmRSS", "VmHWM")), time.perf_counter()
        ran = self._ran(target)
        seconds, highest = time.perf_counter() - started, process_memory("VmHWM")
        kind, detail = self._judged(target, ran)
        if highest > peak and highest - before > MOST_BYTES:
            kind, detail = "memory", f"{highest - before >> 20} MiB; {detail}"
        if seconds > MOST_SECONDS:
            kind, detail = "slow", f"{seconds:.0f} s; {detail}"
        self._clean()
        return kind, detail

    def _ran(self, target: Target) -> Ran:
        with contextlib.nullcontext() if target.format == "model" else known_model():
            return run(target.command)

    def _judged(self, target: Target, ran: Ran) -> tuple[str, str]:
        if ran.raised is not None:
            return "traceback", ran.raised
        lines = [line for line in ran.err.splitlines() if not line.startswith("warning: ")]
        if ran.code == 0:
            if target.kept and "warning: " not in ran.err:
                left, expected = self._left(target, ran), self._expected[target]
                if left < expected if target.kept == "rows" else left != expected:
                    return "changed", f"{left!r}, not {expected!r}"
            return ACCEPTED, ""
        if ran.code == 2 and len(lines) == 1 and lines[0].startswith("error: "):
            return REFUSED, lines[0]
        return "lines", f"exit code {ran.code}: {ran.err[-SHOWN:]}"

    def _left(self, target: Target, ran: Ran) -> Any:
        """What the command left, as far as a mutated file may not change it."""
        if target.kept == "rows":
            manifest = json.loads((self.root / OUT / "manifest.json").read_text())
            shards = manifest["shards"].values()
            return sum(shard["rows"] + len(shard["failures"]) for shard in shards)
        folders = (OUT, "resumed")
        files = [self.root / folder / name for folder in folders for name in RESULTS]
        content = [file.read_bytes() for file in files if file.is_file()] or [ran.out.encode()]
        return hashlib.sha256(b"".join(content)).hexdigest()[:12]

    def _clean(self) -> None:
        """Put the valid files back, and remove all others."""
        for folder, _, files in os.walk(self.root, topdown=False):
            for name in files:
                if os.path.join(folder, name) not in self._names:
                    os.unlink(os.path.join(folder, name))
            if folder not in self._folders:
                shutil.rmtree(folder)  # with links to folders in it
        for file, (content, state) in self._seeds.items():
            if _stamp(file) != (state.st_size, state.st_mtime_ns):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
                os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def _stamp(file: Path) -> tuple[int, int]:
    with contextlib.suppress(OSError):
        state = os.stat(file)
        return state.st_size, state.st_mtime_ns
    return -1, -1


def run(command: str) -> Ran:
    """Run a command line in this process."""
    out, err, code, raised = io.StringIO(), io.StringIO(), 0, None
    with (
        mock.patch.object(sys, "argv", ["transclip-fast", *command.split()]),
        mock.patch.object(os, "fsync"),  # half of the time
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _limited(),
    ):
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 0
        except (Exception, Slow) as error:  # noqa: BLE001 - each is a fault to report
            code, raised = 1, f"{type(error).__name__}: {error!s:.150} at {_place(error)}"
    return Ran(code, out.getvalue(), err.getvalue(), raised)


def _place(error: BaseException) -> str:
    """The last lines of this project that an error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "transclip_fast" in f.filename]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(own[-3:]))


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(_: int, __: FrameType | None) -> None:
        raise Slow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(MOST_SECONDS + 5)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def known_model() -> Iterator[None]:
    """Load the valid model once, since few seeds are about it."""
    with mock.patch.object(models, "load_backbone", return_value=_model_of_seeds()):
        yield


@functools.cache
def _model_of_seeds() -> models.Backbone:
    loaded = load_backbone("model", None, torch.device("cpu"))
    return replace(loaded, weights=WatchedFiles({}))  # its files are mutated and put back


def limit_memory() -> None:
    """Let this process fail to take much more memory than it has."""
    now = process_memory("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (now + ADDRESS_SPACE, now + ADDRESS_SPACE))


_TRIALS: dict[str, Trials] = {}


def run_numbers(numbers: list[int], root: str, seed: int, only: list[str]) -> list[dict[str, Any]]:
    """Run trials in a process of a pool; the folder is made at its first call."""
    import faulthandler

    torch.set_num_threads(1)
    if root not in _TRIALS:
        Path(root).mkdir(parents=True)
        _TRIALS[root] = Trials(Path(root), seed, tuple(only))
        limit_memory()
    found = []
    for number in numbers:
        faulthandler.dump_traceback_later(3 * MOST_SECONDS, exit=True)  # C code hears no alarm
        found.append(asdict(_TRIALS[root].run(number)))
        faulthandler.cancel_dump_traceback_later()
    return found
