"""The lines of `bench.gpu.suite`: what an arm did, its share of the ceilings, the table."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.common import record
from bench.gpu.timing import SETS, Arm, Gpu

LIMIT = 7 * 60  # seconds after which nothing new is begun


@dataclass
class Line:
    """What one arm did: its time, its rate and that rate's share of the ceiling."""

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
        """Whether its error is more than is allowed, or NaN."""
        return self.error is not None and not self.error <= self.allowed


@dataclass
class Ceilings:
    """Of this card, as measured."""

    bandwidth: float  # GB/s of a copy, read and written
    gemm: float  # TFLOP/s in 16 bits

    def rate(self, work: float, unit: str, milliseconds: float) -> tuple[float, float]:
        """GB/s or TFLOP/s of so many bytes or operations, and the share of the ceiling."""
        rate = work / milliseconds / (1e6 if unit == "GB/s" else 1e9)
        return rate, rate / (self.bandwidth if unit == "GB/s" else self.gemm)


def measure_ceilings(gpu: Gpu, entries: int = 1 << 29, side: int = 8192) -> Ceilings:
    """Copy bandwidth on 4 GB and the rate of an 8192^3 product of random float16."""
    source = [torch.randn(entries, device=gpu.device) for _ in range(2)]
    copy = gpu.milliseconds(lambda i: source[0].copy_(source[1]))
    matrices = [torch.randn(side, side, device=gpu.device).half() for _ in range(SETS)]
    product = gpu.milliseconds(lambda i: matrices[i] @ matrices[(i + 1) % SETS])
    return Ceilings(2 * 4 * entries / copy / 1e6, 2 * side**3 / product / 1e9)


class Suite:
    """The lines so far, and where they go."""

    def __init__(self, folder: Path, gpu: Gpu, ceilings: Ceilings) -> None:
        self.folder, self.gpu, self.ceilings = folder, gpu, ceilings
        self.lines, self.begun, self.failed = list[Line](), time.monotonic(), False
        self.add(Line("copy", "torch", 0.0, ceilings.bandwidth, "GB/s", 1.0))
        self.add(Line("16-bit GEMM", "cuBLAS", 0.0, ceilings.gemm, "TFLOP/s", 1.0))

    def add(self, line: Line) -> None:
        self.lines.append(line)
        record("gpu_suite", asdict(line), folder=self.folder)
        if line.wrong:
            print(f"WRONG {line.operation}, {line.arm}: {line.error:.1e}", flush=True)

    def check(self, operation: str, error: float, allowed: float, **detail: Any) -> None:
        """What is only checked, not timed."""
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
        """Time the arms of an operation; `errors` are those of our own ones."""
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
        """An arm that took so many milliseconds for so many bytes or operations."""
        rate, share = self.ceilings.rate(work, unit, taken)
        self.add(Line(operation, arm, taken, rate, unit, share, error, allowed, detail))

    def attempt(self, what: str, run: Callable[[], Any]) -> Any:
        """Run it, or say loudly why not: no time is left, no room on the card, an error."""
        if time.monotonic() - self.begun > LIMIT:
            print(f"SKIPPED {what}: {LIMIT} s are over", flush=True)
            return None
        try:
            return run()
        except torch.OutOfMemoryError as error:
            print(f"SKIPPED {what}: {str(error).splitlines()[0]}", flush=True)
            return None
        except Exception:  # noqa: BLE001, the rest is worth having
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


def table(lines: list[Line]) -> str:
    """One row a line."""
    head = f"{'operation':<34}{'arm':<26}{'ms':>10}{'rate':>9} {'':<8}{'share':>7}{'error':>10}"
    rows = [head]
    for line in lines:
        share = f"{100 * line.share:.0f} %" if line.unit else ""
        error = "" if line.error is None else f"{line.error:.1e}"
        rate = f"{line.rate:.0f}" if line.unit else ""
        rows.append(
            f"{line.operation:<34}{line.arm:<26}{line.milliseconds:>10.3f}{rate:>9} "
            f"{line.unit:<8}{share:>7}{error:>10}{' WRONG' if line.wrong else ''}"
        )
    return "\n".join(rows)
