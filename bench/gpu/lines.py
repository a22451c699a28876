"""The lines of the GPU suite and check: times, errors, and shares of the measured ceilings."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.common import print_table, record
from bench.gpu.timing import INPUT_SETS, Arm, Gpu

LINES = "gpu_suite"  # name of the file of lines


@dataclass
class Line:
    """The result of an arm: its time, its rate and that rate's share of the ceiling."""

    operation: str
    arm: str
    milliseconds: float
    rate: float = 0.0
    unit: str = ""
    share: float = 0.0
    error: float | None = None  # against float64
    allowed: float = 0.0
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        """Whether the error is NaN or more than is allowed."""
        return self.error is not None and not self.error <= self.allowed


@dataclass
class Ceilings:
    """The rates of this GPU that bound every arm, as measured."""

    bandwidth: float  # GB/s of a copy, read and written
    gemm: float  # TFLOP/s in 16 bits

    def rate(self, work: float, unit: str, milliseconds: float) -> tuple[float, float]:
        """Return GB/s or TFLOP/s of `work` bytes or operations, and the share of the ceiling."""
        rate = work / milliseconds / (1e6 if unit == "GB/s" else 1e9)
        return rate, rate / (self.bandwidth if unit == "GB/s" else self.gemm)


def measure_ceilings(gpu: Gpu, entries: int = 1 << 29, side: int = 8192) -> Ceilings:
    """Measure the bandwidth of a copy of 4 GB, and the rate of an 8192^3 product in float16."""
    source = [torch.randn(entries, device=gpu.device) for _ in range(2)]
    copy = gpu.milliseconds(lambda i: source[0].copy_(source[1]))
    matrices = [torch.randn(side, side, device=gpu.device).half() for _ in range(INPUT_SETS)]
    product = gpu.milliseconds(lambda i: matrices[i] @ matrices[(i + 1) % INPUT_SETS])
    return Ceilings(2 * 4 * entries / copy / 1e6, 2 * side**3 / product / 1e9)


def ceilings(suite: Suite, entries: int = 1 << 29, side: int = 8192) -> None:
    """Add the lines of this GPU's ceilings, of which the rates of later parts are shares."""
    found = measure_ceilings(suite.gpu, entries, side)
    suite.add(Line("copy", "torch", 0.0, found.bandwidth, "GB/s", 1.0))
    suite.add(Line("16-bit GEMM", "cuBLAS", 0.0, found.gemm, "TFLOP/s", 1.0))


def recorded(folder: Path, start: int = 0) -> list[Line]:
    """Return the lines of a folder from a position in its file on."""
    path, names = folder / f"{LINES}.jsonl", [x.name for x in fields(Line)]
    if not path.exists():
        return []
    rows = map(json.loads, path.read_bytes()[start:].splitlines())
    return [Line(**{name: row[name] for name in names}) for row in rows]


def ceilings_of(lines: list[Line]) -> Ceilings:
    """Return the ceilings that a part recorded last; without any, shares are NaN."""
    rates = {line.operation: line.rate for line in lines}
    return Ceilings(rates.get("copy", math.nan), rates.get("16-bit GEMM", math.nan))


class Suite:
    """The lines of one part, and the folder that records them."""

    def __init__(self, folder: Path, gpu: Gpu, ceilings: Ceilings) -> None:
        self.folder, self.gpu, self.ceilings = folder, gpu, ceilings
        self.lines, self.failed = list[Line](), False

    def add(self, line: Line) -> None:
        """Record a line, and print it where it is wrong."""
        self.lines.append(line)
        record(LINES, asdict(line), folder=self.folder)
        if line.wrong:
            print(f"WRONG {line.operation}, {line.arm}: {line.error:.1e}", flush=True)

    def check(self, operation: str, error: float, allowed: float, **detail: Any) -> None:
        """Add a line that is checked and not timed."""
        self.add(Line(operation, "check", 0.0, error=error, allowed=allowed, detail=detail))

    def arms(
        self,
        operation: str,
        arms: dict[str, Arm],
        work: float,
        unit: str,
        errors: dict[str, float],
        allowed: float,
        **detail: Any,
    ) -> None:
        """Time the arms of an operation; only our own arms have an error."""
        for name, run in arms.items():
            taken = self.attempt(f"{operation}, {name}", partial(self.gpu.milliseconds, run))
            if taken is not None:
                self.timed(operation, name, taken, work, unit, errors.get(name), allowed, **detail)

    def timed(
        self,
        operation: str,
        arm: str,
        taken: float,
        work: float,
        unit: str,
        error: float | None = None,
        allowed: float = 0.0,
        **detail: Any,
    ) -> None:
        """Add the line of an arm that took `taken` milliseconds for `work` bytes or operations."""
        rate, share = self.ceilings.rate(work, unit, taken)
        self.add(Line(operation, arm, taken, rate, unit, share, error, allowed, detail))

    def attempt(self, what: str, run: Callable[[], Any]) -> Any:
        """Run an arm, or print why not: no memory on the GPU, an error."""
        try:
            return run()
        except torch.OutOfMemoryError as error:
            print(f"SKIPPED {what}: {str(error).splitlines()[0]}", flush=True)
            return None
        except Exception:  # noqa: BLE001, the other arms still run
            print(f"FAILED {what}", flush=True)
            traceback.print_exc()
            self.failed = True
            return None
        finally:
            torch.cuda.empty_cache()

    @property
    def code(self) -> int:
        """The exit code: 1 where something was wrong, or failed."""
        return int(self.failed or any(line.wrong for line in self.lines))


def print_lines(lines: list[Line]) -> None:
    """Print one row a line."""
    rows = []
    for line in lines:
        rate, share = f"{line.rate:.0f} {line.unit}", f"{100 * line.share:.0f} %"
        shares = [rate, share] if line.unit else ["", ""]
        error = "" if line.error is None else f"{line.error:.1e}"
        cells = [line.operation, line.arm, f"{line.milliseconds:.3f}", *shares, error]
        rows.append([*cells, "WRONG" if line.wrong else ""])
    print_table(["operation", "arm", "ms", "rate", "share", "error", ""], rows)
