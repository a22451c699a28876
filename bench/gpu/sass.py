"""Static SASS instructions of every kernel, its registers, stack and shared memory; needs no GPU.

The cases are those that `tests/kernels/test_compile.py` of a checkout compiles, so the same program
counts those of an earlier commit, under any Triton that it runs with:

    git worktree add DIR COMMIT
    python -m bench.gpu.sass --checkout DIR

A cell is `instructions, of them apart, / registers / stack / shared memory in bytes; loops`.
Instructions are all of a kernel but NOP. Those apart lie behind the rest and run only where the
threads of a warp have parted. `loops` are the lengths of the loops without a loop in them, in the
kernel's order. Needs pytest; nothing of this package, so that the checkout's own is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?([\w.]+)([^;]*);", re.MULTILINE)
JUMP = re.compile(r"0x([0-9a-f]+)\s*$")


@dataclass(frozen=True)
class Static:
    """What the assembler made of a kernel."""

    instructions: int
    apart: int  # of them, run by parted warps only
    loops: list[int]
    registers: int
    stack: int
    shared: int

    def __str__(self) -> str:
        loops = ", ".join(map(str, self.loops)) or "none"
        counts = f"{self.instructions}, {self.apart} apart"
        return f"{counts} / {self.registers} / {self.stack} / {self.shared}; {loops}"


def main() -> int:
    """Compile the cases of a checkout and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.sass",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkout", type=Path, default=Path(), metavar="DIR")
    os.chdir(parser.parse_args().checkout)
    sys.path.insert(0, os.getcwd())
    import pytest
    import triton

    found = Compiled()
    triton.compile = found.listening(triton.compile)
    path = "tests/kernels/test_compile.py"
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir=."]
    with contextlib.redirect_stdout(sys.stderr):  # a limit of that commit may not hold here
        code = pytest.main([path, *options, "-k", "test_resources and not gfx942"], [found])
    found.print(f"Triton {triton.__version__}")
    return 0 if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else int(code)


class Compiled:
    """What each test compiles, by the case and the target in its name."""

    def __init__(self) -> None:
        self.test = ""
        self.found: dict[str, dict[str, Static]] = defaultdict(dict)

    def pytest_runtest_setup(self, item: Any) -> None:
        """Remember the test that runs; pytest calls this."""
        self.test = item.callspec.id

    def listening(self, compile: Any) -> Any:  # noqa: A002 - Triton's name
        """Return Triton's `compile`, whose kernels are counted."""

        def counted(*arguments: Any, **named: Any) -> Any:
            done = compile(*arguments, **named)
            case, target = self.test.rsplit("-", 1)
            self.found[case][target] = static(done.asm["cubin"], done.metadata.shared)
            return done

        return counted

    def print(self, title: str) -> None:
        """Print a row a case."""
        print(f"| {title} | {' | '.join(TARGETS)} |", "|---" * (1 + len(TARGETS)) + "|", sep="\n")
        for case, row in self.found.items():
            print(f"| {case} | {' | '.join(str(row[target]) for target in TARGETS)} |")


def static(cubin: bytes, shared: int) -> Static:
    """Return the counts of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (dumped(option, file.name) for option in ("-res-usage", "-sass"))
    registers, stack = (
        int(number) for number in re.findall(r"(?:REG|STACK):(\d+)", usage.split("Function")[1])
    )
    return Static(*instructions(sass), registers, stack, shared)


def instructions(sass: str) -> tuple[int, int, list[int]]:
    """Return how many instructions a listing has, how many apart, and the lengths of its loops."""
    code = [(int(at, 16), name, rest) for at, name, rest in INSTRUCTION.findall(sass)]
    jumps = {
        at: (name, int(to[1], 16))
        for at, name, rest in code
        if name.startswith("BRA") and (to := JUMP.search(rest)) is not None
    }
    # Behind the end is a jump to itself, and NOP.
    code = [x for x in code if x[1] != "NOP" and (x[0] not in jumps or jumps[x[0]][1] != x[0])]
    end = min((to for name, to in jumps.values() if name == "BRA.DIV"), default=code[-1][0] + 1)
    loops = {(to, at) for at, (_, to) in jumps.items() if to < at < end}
    inner = [x for x in loops if not any(x[0] <= y[0] < y[1] <= x[1] for y in loops - {x})]
    lengths = [sum(first <= at <= last for at, *_ in code) for first, last in sorted(inner)]
    return len(code), sum(at >= end for at, *_ in code), lengths


def dumped(option: str, path: str) -> str:
    """Return the output of Triton's cuobjdump for a file."""
    return subprocess.run(  # noqa: S603 - ours
        [tool(), option, path], capture_output=True, text=True, check=True
    ).stdout


@cache
def tool() -> str:
    """Return the path of cuobjdump."""
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


if __name__ == "__main__":
    raise SystemExit(main())
