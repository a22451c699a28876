"""The kernels on one GPU: correct at real sizes, how fast, and beside what.

Measures the card first (copy bandwidth, 16-bit GEMM rate), then each operation against float64, its
time and its share of those ceilings beside torch eager, torch.compile and the vendor's library,
then whole solves beside the strong baseline. Every line goes to DIR/gpu_suite.jsonl with the card,
driver, versions and commit; a table comes last. Needs numpy, torch and triton only.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from bench.gpu.arms import dense_sweeps, eva, neighbours, scores, sums, sweeps
from bench.gpu.lines import Suite, measure_ceilings, table
from bench.gpu.solves import captured, solve
from bench.gpu.timing import Gpu

SOLVES = ((50_000, 1000, 512), (1_280_000, 1000, 1280), (10_000_000, 21_000, 1024))


def main(arguments: list[str] | None = None) -> int:
    """Run everything and return the exit code: 1 where something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.suite", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu.suite needs a GPU, and torch finds none")
        return 2
    gpu = Gpu()
    suite = Suite(options.out, gpu, measure_ceilings(gpu))
    for part in (sweeps, dense_sweeps, scores, sums, captured, neighbours):
        suite.attempt(part.__name__, partial(part, suite))
    for sizes in SOLVES:
        suite.attempt(f"solve {sizes}", partial(solve, suite, *sizes))
    suite.attempt("eva", partial(eva, suite))
    print(table(suite.lines))
    return suite.code


if __name__ == "__main__":
    raise SystemExit(main())
