"""Parts of the GPU suite and check: each a process of its own with a time limit.

An error of CUDA spoils the process it happens in, and a kernel that hangs never ends: neither takes
more than its own part with it. Lines are written as they come.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path

import torch

from bench.common import ROOT, command_line
from bench.gpu import solves
from bench.gpu.lines import LINES, Suite, ceilings_of, print_lines, recorded
from bench.gpu.timing import Cpu, Gpu, setting
from transclip_fast.graph import exact
from transclip_fast.solver.parameters import Parameters

START_SECONDS = 20  # of a process: imports, and the GPU's context
CPU_FACTOR = 5  # of the seconds of a part, in the interpreter


@dataclass(frozen=True)
class Part:
    """What a part runs, and the seconds that it may take."""

    run: Callable[[Suite], None]
    seconds: float


def main(
    spec: ModuleSpec,
    doc: str | None,
    parts: Mapping[str, Part],
    arguments: Sequence[str] | None = None,
    *,
    minutes: float,
    all_parts: bool = False,
) -> int:
    """
    Run parts as long as there is time, and return the exit code.

    It is 1 where one failed or a line is wrong; with `all_parts`, also where time ran out.
    """
    parser = command_line(spec, doc)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--minutes", type=float, default=minutes, metavar="N", help=f"in all ({minutes:g})"
    )
    parser.add_argument(
        "--cpu", action="store_true", help="very small, in Triton's interpreter, without a GPU"
    )
    parser.add_argument("--part", choices=list(parts), help="this one only, in this process")
    options = parser.parse_args(arguments)
    if (missing := _missing(cpu=options.cpu)) is not None:
        print(f"{spec.name} {missing}")
        return 2
    if options.part is not None:
        return _run_here(parts[options.part], options)
    stop = time.monotonic() + 60 * options.minutes
    path = options.out / f"{LINES}.jsonl"
    start = path.stat().st_size if path.exists() else 0
    for labels in options.out.glob("labels_*.npy"):  # of an earlier run
        labels.unlink()
    failed = False
    for name, part in parts.items():
        left = stop - time.monotonic()
        if left < START_SECONDS:
            print(f"SKIPPED {name}: {options.minutes:g} minutes are over", flush=True)
            failed |= all_parts
            continue
        seconds = START_SECONDS + part.seconds * (CPU_FACTOR if options.cpu else 1)
        failed |= not _run_child(spec, name, min(left, seconds), options)
    lines = recorded(options.out, start)
    print_lines(lines)
    return int(failed or any(line.wrong for line in lines))


def _missing(*, cpu: bool) -> str | None:
    """Return what the parts need and is not here."""
    if not cpu:
        return None if torch.cuda.is_available() else "needs a GPU, and torch finds none; try --cpu"
    found = [tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")]
    if found[0] == (3, 6) and found[1] >= (2, 4):
        return (
            "--cpu: the interpreter of Triton 3.6 needs NumPy before 2.4; pip install 'numpy<2.4'"
        )
    return None


@contextmanager
def small_steps() -> Iterator[None]:
    """Let the interpreter run few and large programs, and nothing be compiled for a CPU."""
    from transclip_fast.kernels import messages

    steps = Parameters(max_iter=2, inner_iter=1, class_cost=False)
    with (
        setting(torch, "compile", lambda run, **_: run),
        setting(messages, "LAUNCHES", {16: (64, 1), 32: (64, 1)}),
        setting(exact, "certifiable", lambda rows, size: True),
        setting(solves, "STEPS", steps),
    ):
        yield


def _run_here(part: Part, options: argparse.Namespace) -> int:
    ceilings = ceilings_of(recorded(options.out))
    suite = Suite(options.out, Cpu() if options.cpu else Gpu(), ceilings)
    with small_steps() if options.cpu else nullcontext():
        suite.attempt("part", lambda: part.run(suite))
    return suite.code


def _run_child(spec: ModuleSpec, name: str, seconds: float, options: argparse.Namespace) -> bool:
    """Run a part in a process of its own; return whether it ended well and in time."""
    command = [sys.executable, "-m", spec.name, "--part", name, "--out", str(options.out)]
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if options.cpu:
        command.append("--cpu")
        environment["TRITON_INTERPRET"] = "1"
    print(f"{name}, at most {seconds:.0f} s", flush=True)
    child = subprocess.Popen(command, env=environment, start_new_session=True)  # noqa: S603 - ours
    try:
        return child.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        print(f"STOPPED {name}: not done after {seconds:.0f} s", flush=True)
        return False
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)  # with the compilers that it started
            child.wait()
