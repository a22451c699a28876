"""Is everything right on this GPU? Every kernel at real sizes against float64, and whole fits.

To be run before `bench.gpu.suite`: it times nothing. Each group is a process of its own with a time
limit. Every line goes to DIR/gpu_suite.jsonl, as it comes. Needs numpy, torch and triton only.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from bench.common import SAME_LABELS
from bench.gpu.arms import graph_errors
from bench.gpu.lines import Suite
from bench.gpu.parts import Part, main
from bench.gpu.problems import (
    GEMM_ERROR,
    lists,
    made_graph,
    made_problem,
    product_error,
    score_error,
    score_operands,
    sums_error,
    sweep_error,
)
from bench.gpu.solves import labels_of, repeated
from transclip_fast.graph.affinity import affinity
from transclip_fast.ops import backend_class
from transclip_fast.solver.parameters import Parameters
from transclip_fast.types import LinearScore

CHECKED_ROWS = 2000
STEPS: dict[str, Any] = {"max_iter": 2, "inner_iter": 2}


def tiny(suite: Suite) -> bool:
    """Whether this is the interpreter."""
    return suite.gpu.device == "cpu"


def sweeps(suite: Suite) -> None:
    """Check sweeps with and without a bound, and the cut to fewer entries, at 16 to 128 slots."""
    n, k = (40, 50) if tiny(suite) else (1_280_000, 1000)
    graph = affinity(made_graph(n, k), device=suite.gpu.device)
    ops = backend_class("triton")(graph)
    for candidates in (16, 32) if tiny(suite) else (16, 32, 64, 128):
        base, z = lists(n, k, candidates, suite.gpu.device, 0)
        for bounded in (False, True):
            out = ops.sweep(base, z, out=z.empty_like(), bounded=bounded)
            error = sweep_error(base, graph, z, out, rows=min(n, CHECKED_ROWS))
            suite.check(f"sweep, {candidates} candidates, bounded {bounded}", error, 2e-6, rows=n)


def scores(suite: Suite) -> None:
    """Check fused and chunked scores of both types of features, and products of float32."""
    shapes = [(1 << 18, 1000, 1280, 32), (1 << 14, 21_000, 1024, 32), (1 << 14, 1000, 1000, 128)]
    for n, k, d, width in [(24, 40, 64, 16), (5, 300, 33, 40)] if tiny(suite) else shapes:
        features, weights, offset, out = score_operands(n, k, d, suite.gpu.device, 0, width)
        ops = backend_class("triton")(affinity(made_graph(n, k), device=suite.gpu.device))
        for rows in (features, features.float()):
            ops.score(rows, LinearScore(weights.float(), offset), out=out)
            error = score_error(rows, weights, offset, out, CHECKED_ROWS)
            suite.check(f"score, {k} to {width}, {rows.dtype}", error, 1e-5, rows=n, dim=d)
        ours, theirs = product_error(n, k, d, suite.gpu.device)
        allowed = GEMM_ERROR * theirs
        suite.check(f"float32 products, {k} x {d}", ours, allowed, rows=n, float32_gemm=theirs)


def sums(suite: Suite) -> None:
    """Check class sums of both types of features."""
    n, k, d = (60, 30, 16) if tiny(suite) else (1_280_000, 1000, 1280)
    ops = backend_class("triton")(affinity(made_graph(n, k), device=suite.gpu.device))
    z = lists(n, k, 16, suite.gpu.device, 0)[1]
    features = made_problem(n, k, d, suite.gpu.device)[0]
    for rows in (features, features.half()):
        suite.check(f"class sums, {rows.dtype}", sums_error(ops, z, rows), 1e-6, rows=n, dim=d)


def graphs(suite: Suite) -> None:
    """Check the exact graph against products in float64."""
    n, d = (50, 32) if tiny(suite) else (20_000, 1280)
    graph_errors(suite, made_problem(n, max(2, n // 20), d, suite.gpu.device)[0])


def fits(suite: Suite) -> None:
    """Check that labels are those of a CPU, held or streamed, in both types, and the same twice."""
    n, k, d = (20, 5, 33) if tiny(suite) else (20_000, 200, 512)
    features, prototypes = (x.cpu() for x in made_problem(n, k, d, suite.gpu.device))
    graph, devices = made_graph(n, k), [suite.gpu.device]
    if torch.cuda.device_count() > 1:
        devices.append("cuda:1")

    def labels(device: str, backend: str, precision: str, held: bool) -> torch.Tensor:
        parameters = Parameters(
            device=device, backend=backend, assignments="sparse", precision=precision, **STEPS
        )
        return labels_of(parameters, features, prototypes, graph, held=held).cpu()

    truth = labels("cpu", "torch", "float32", True)
    for device, precision, held in product(devices, ("float32", "float16"), (True, False)):
        differ = float((labels(device, "triton", precision, held) != truth).float().mean())
        name = f"labels, {device}, {precision}, {'held' if held else 'streamed'}"
        suite.check(name, differ, 1 - SAME_LABELS, rows=n)
    repeated(suite, n, k, d)


PARTS = {part.__name__: Part(part, 60) for part in (sweeps, scores, sums, graphs, fits)}

if __name__ == "__main__":
    raise SystemExit(main(__spec__, __doc__, PARTS, minutes=5))
