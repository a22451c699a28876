"""Compile the kernels of `bench.gpu.check` and `bench.gpu.suite` where no GPU is.

Their operations are launched at their real shapes on arrays without memory (torch's meta device),
under a driver of a GPU that is not here: Triton compiles as for any launch, and nothing runs. DIR
gets only what a GPU loads, under names that hold for the same commit, the same builds of Triton and
Python, and GPUs of that architecture. Triton writes DIR into its files as it is given here, so
give it relative to the checkout; then it can be copied along:

    python -m bench.gpu.fill_cache --out gpu-cache
    TRITON_CACHE_DIR=gpu-cache python -m bench.gpu.check --out DIR      # where the GPU is
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.common import command_line
from bench.gpu import arms, check
from bench.gpu.problems import PRODUCT_ROWS, made_problem
from bench.gpu.solves import WIDTH
from bench.gpu.suite import LARGE, MILLION, SMALL
from bench.gpu.timing import setting
from transclip_fast.graph.exact import GPU_STEP_ROWS
from transclip_fast.ops.blocks import blocks, read_rows
from transclip_fast.solver.layout import USUAL_CANDIDATES
from transclip_fast.solver.parameters import Parameters
from transclip_fast.solver.problem import PRIOR_SAMPLE_ROWS, Problem
from transclip_fast.solver.truncation import choose_truncation
from transclip_fast.types import Affinity, Assignments, LinearScore, Messages, Scores, Truncation

META = torch.device("meta")
HALF, FULL = torch.float16, torch.float32


def main(arguments: list[str] | None = None) -> int:
    """Fill the cache, and print how many kernels it has and its size."""
    parser = command_line(__spec__, __doc__, arch=90)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the cache")
    options = parser.parse_args(arguments)
    os.environ["TRITON_CACHE_DIR"] = str(options.out)
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    compile_kernels(launch_all, options.arch, lambda name: print(name, flush=True))
    size = sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file())
    number = len(list(options.out.rglob("*.cubin")))
    print(f"{number} kernels for sm_{options.arch}, {size / 1e6:.1f} MB")
    return 0


def stand_in(arch: int) -> Any:
    """Return Triton's driver of a GPU that is not here: launches load a kernel to no effect."""
    from triton.backends.compiler import GPUTarget

    utils = SimpleNamespace(
        # The limit that Triton asks for; `tests/kernels` compares it with that of each GPU.
        get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
        # Module, function, registers, spills, and threads at most.
        load_binary=lambda *kernel: (None, None, 0, 0, 1024),
    )
    return SimpleNamespace(
        utils=utils,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        launcher_cls=lambda source, metadata: lambda *arguments: None,
    )


def compile_kernels(launch: Callable[[], None], arch: int, compiled: Callable[[str], None]) -> None:
    """Call `launch`, whose kernels are compiled or found, and none runs; name the compiled ones."""
    from triton import knobs
    from triton.runtime import driver

    from transclip_fast.kernels import products, score

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            compiled(src.name)

    def blocks_of(device: torch.device, *, split: bool) -> Any:
        return products.launch_of("sm_90" if arch // 10 == 9 else "cuda", split=split)

    driver.set_active(stand_in(arch))
    with (
        setting(knobs.compilation, "listener", listen),
        setting(products, "launch", blocks_of),
        setting(score, "launch", blocks_of),
    ):
        launch()


def launch_all() -> None:
    """Launch what `bench.gpu.check` and `bench.gpu.suite` do."""
    from transclip_fast.kernels import products, score

    narrow = Truncation(WIDTH, WIDTH)
    for shape in (MILLION, SMALL, check.FITTED):
        solve(*shape, HALF, narrow)
        solve(*shape, FULL, narrow)
    solve(*LARGE, HALF, narrow)
    solve(*MILLION, FULL, usual(*MILLION))
    solve(*check.FITTED, HALF, usual(*check.FITTED))
    solve(*check.FITTED, FULL, usual(*check.FITTED))
    for slots in check.SLOTS:
        sweeps(*check.ROWS[:2], Truncation(slots, slots))
    for slots in check.HUB_SLOTS:
        sweeps(*check.HUB[:2], Truncation(slots, slots), hub=check.HUB[2])
    for n, k, d, width in check.SCORES:
        scores(n, k, d, HALF, Truncation(width, width))
        scores(n, k, d, FULL, Truncation(width, width))
        weights = products.HalfWeights.of(empty(k, d), FULL)
        products.product(empty(PRODUCT_ROWS, d), weights, empty(PRODUCT_ROWS, k))
    rows = empty(n + 1, dtype=torch.int64)
    messages = Messages(rows, rows[:n], empty(n))
    scores(n, k, d, HALF, Truncation(width, width), log_prior=empty(n, k), messages=messages)
    for n, k, d, width in arms.SCORES:
        scores(n, k, d, HALF, Truncation(width, width))
        with setting(score, "MAX_CANDIDATES", 0):
            scores(n, k, d, HALF, Truncation(width, width))
    for n in (*arms.NEIGHBOURS, check.SEARCHED[0]):
        search(n, check.SEARCHED[1])


def usual(n: int, k: int, d: int) -> Truncation:
    """Return the lists that a fit chooses, from rows that are drawn as those of the GPU are."""
    rows, prototypes = made_problem(PRIOR_SAMPLE_ROWS, k, d, "cpu")
    problem = Problem.check(rows, prototypes, logit_scale=Parameters().logit_scale)
    return choose_truncation(problem.prior_sample(), n, most=USUAL_CANDIDATES)


def solve(n: int, k: int, d: int, dtype: torch.dtype, truncation: Truncation) -> None:
    """Launch what a solve does."""
    whole = read_rows(META)
    n = min(n, 2 * whole + n % whole)  # all reads between the first and the last are alike
    features, z = empty(n, d, dtype=dtype), Assignments.empty(n, k, truncation, META)
    ops = backend(n)
    ops.start(features, empty(k, d), None, out=z)
    scores(n, k, d, dtype, truncation)
    sweeps(n, k, truncation)
    ops.class_sums(z, features)


def scores(
    n: int, k: int, d: int, dtype: torch.dtype, truncation: Truncation, **given: Any
) -> None:
    """Launch scores, with a prior and messages if they are given."""
    base, score = Scores.empty(empty(n), k, truncation), LinearScore(empty(k, d), empty(k), **given)
    backend(n).score(empty(n, d, dtype=dtype), score, out=base)


def sweeps(n: int, k: int, truncation: Truncation, *, hub: int = 0) -> None:
    """Launch a sweep, one with its bound, and energies."""
    ops, base = backend(n, hub=hub), Scores.empty(empty(n), k, truncation)
    both = Assignments.empty(2 * n, k, truncation, META)  # without memory only offsets differ
    z, out = both.take(slice(0, n)), both.take(slice(n, 2 * n))
    for bounded in (False, True):
        ops.sweep(base, z, out=out, bounded=bounded)
    ops.row_energies(z)


def search(n: int, d: int) -> None:
    """Launch an exact search."""
    from transclip_fast.kernels import neighbors

    for rows in blocks(n, GPU_STEP_ROWS):
        neighbors.candidates(empty(n, d, dtype=HALF), 8, rows.start, rows.stop)


def backend(n: int, *, hub: int = 0) -> Any:
    """Return the operations on n rows, the first a hub of so many neighbours, the rest of none."""
    from transclip_fast.ops.triton_backend import TritonOps

    offsets = torch.full((n + 1,), hub).index_fill_(0, torch.tensor([0]), 0)
    affinity = Affinity(offsets, offsets.new_zeros(hub), torch.zeros(hub))
    return TritonOps(affinity, empty(n, dtype=torch.int64))


def empty(*shape: int, dtype: torch.dtype = FULL) -> torch.Tensor:
    """Return an array without memory."""
    return torch.empty(shape, dtype=dtype, device=META)


if __name__ == "__main__":
    raise SystemExit(main())
