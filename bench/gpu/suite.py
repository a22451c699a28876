"""The kernels on one GPU: checked at real sizes, and timed beside their rivals.

Measures the ceilings of the GPU first (copy bandwidth, 16-bit GEMM rate), then the error of each
operation against float64, its time and its share of those ceilings, beside torch eager,
torch.compile and the vendor's library, then whole solves beside the strong baseline. Every line
goes to DIR/gpu_suite.jsonl with GPU, driver, versions and commit; a table comes last. Needs numpy,
torch and triton only.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from bench.common import command_line
from bench.gpu.arms import eva, neighbours, scores, sums, sweeps
from bench.gpu.lines import Suite, measure_ceilings, print_lines
from bench.gpu.solves import repeated, solve
from bench.gpu.timing import Gpu

SOLVES = ((50_000, 1000, 512), (1_280_000, 1000, 1280), (10_000_000, 21_000, 1024))


def main(arguments: list[str] | None = None) -> int:
    """Run all parts and return the exit code: 1 where one failed or a line is wrong."""
    parser = command_line(__spec__, __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu.suite needs a GPU, and torch finds none")
        return 2
    gpu = Gpu()
    suite = Suite(options.out, gpu, measure_ceilings(gpu))
    for part in (sweeps, scores, sums, repeated, neighbours):
        suite.attempt(part.__name__, partial(part, suite))
    for sizes in SOLVES:
        suite.attempt(f"solve {sizes}", partial(solve, suite, *sizes))
    suite.attempt("eva", partial(eva, suite))
    print_lines(suite.lines)
    return suite.code


if __name__ == "__main__":
    raise SystemExit(main())
