"""The kernels on one GPU: timed beside their rivals, at real sizes, the most telling first.

Measures the ceilings of the GPU (copy bandwidth, 16-bit GEMM rate), then whole solves beside the
strong baseline, then each operation: its error against float64, its time and its share of those
ceilings, beside torch eager, torch.compile and the vendor's library. Every line goes to
DIR/gpu_suite.jsonl with GPU, driver, versions and commit, as it comes; a table comes last. Needs
numpy, torch and triton only. Run `bench.gpu.check` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from bench.gpu.arms import eva, neighbours, scores, sums, sweeps
from bench.gpu.lines import Suite, ceilings
from bench.gpu.parts import Part, main
from bench.gpu.solves import defaults, solve

MILLION, LARGE, SMALL = (1_280_000, 1000, 1280), (10_000_000, 21_000, 1024), (50_000, 1000, 512)
# Of each part at a very small size, in the interpreter.
TINY: dict[str, dict[str, Any]] = {
    "ceilings": {"entries": 1000, "side": 16},
    "operations": {
        "rows": (60, 50), "shapes": ((24, 40, 64, 16), (5, 300, 32, 20)), "features": (60, 30, 16)
    },
    "neighbours": {"sizes": (50, 60, 150), "d": 32},
    "eva": {"batch": 2, "width": 24, "layers": 2, "heads": 3, "side": 28},
}  # fmt: skip


def sized(suite: Suite, name: str) -> dict[str, Any]:
    """Return arguments of a part: none on a GPU, where its defaults are."""
    return TINY[name] if suite.gpu.device == "cpu" else {}


def shape(suite: Suite, real: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return rows, classes and dimensions of a solve."""
    return (12, 5, 16) if suite.gpu.device == "cpu" else real


def operations(
    suite: Suite,
    rows: tuple[int, int] = MILLION[:2],
    shapes: tuple[tuple[int, int, int, int], ...] | None = None,
    features: tuple[int, int, int] = MILLION,
) -> None:
    """Time sweeps, scores and class sums."""
    sweeps(suite, *rows)
    scores(suite, *([] if shapes is None else [shapes]))
    sums(suite, *features)


def solved(suite: Suite, real: tuple[int, int, int], arms: Sequence[str], *, warm: bool) -> None:
    """Time solves by some arms."""
    solve(suite, *shape(suite, real), arms, warm=warm)


PARTS = {
    "ceilings": Part(lambda suite: ceilings(suite, **sized(suite, "ceilings")), 5),
    "solve": Part(partial(solved, real=MILLION, arms=["float16"], warm=True), 25),
    "defaults": Part(lambda suite: defaults(suite, *shape(suite, MILLION)), 40),
    "operations": Part(lambda suite: operations(suite, **sized(suite, "operations")), 60),
    "neighbours": Part(lambda suite: neighbours(suite, **sized(suite, "neighbours")), 40),
    "large": Part(partial(solved, real=LARGE, arms=["float16"], warm=False), 90),
    "streamed": Part(partial(solved, real=MILLION, arms=["float16, streamed"], warm=False), 40),
    "float32": Part(
        partial(solved, real=MILLION, arms=["float32", "baseline, torch.compile"], warm=True), 60
    ),
    "small": Part(
        partial(solved, real=SMALL, arms=["float16", "float32", "baseline"], warm=True), 40
    ),
    "eva": Part(lambda suite: eva(suite, **sized(suite, "eva")), 90),
}

if __name__ == "__main__":
    raise SystemExit(main(__spec__, __doc__, PARTS, minutes=10))
