"""The operations of `bench.gpu.suite`: checked against float64, then timed beside rivals."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from bench.gpu.eva import EvaTower, eva_error
from bench.gpu.lines import Suite
from bench.gpu.problems import (
    lists,
    made_graph,
    made_problem,
    messages_to,
    score_error,
    score_operands,
    sums_error,
    sweep_bytes,
    sweep_error,
)
from bench.gpu.timing import INPUT_SETS, Arm, setting
from transclip_fast.data.feature_rows import Rows, evenly_spaced_rows
from transclip_fast.graph import exact as exact_search
from transclip_fast.graph.affinity import affinity
from transclip_fast.graph.build import build_graph
from transclip_fast.graph.candidates import SPARE_CANDIDATES, Candidates
from transclip_fast.graph.job import Job
from transclip_fast.ops import backend_class
from transclip_fast.types import LinearScore


def sweeps(suite: Suite, n: int = 1_280_000, k: int = 1000) -> None:
    """Time one sparse sweep at 16 and 32 candidates."""
    device = suite.gpu.device
    graph = affinity(made_graph(n, k), device=device)
    ours, eager = (backend_class(name)(graph) for name in ("triton", "torch"))
    for candidates in (16, 32):
        made = [lists(n, k, candidates, device, seed) for seed in range(INPUT_SETS)]
        out = made[0][1].empty_like()
        ours.sweep(made[0][0], made[0][1], out=out, bounded=False)
        messages = messages_to(graph, made[0][1], min(n, 2000))
        error = sweep_error(made[0][0], messages, out)

        def run(ops: Any, bounded: bool, i: int, made: Any = made, out: Any = out) -> None:
            ops.sweep(made[i][0], made[i][1], out=out, bounded=bounded)

        arms: dict[str, Arm] = {
            "kernel": partial(run, ours, False),
            "kernel, with its bound": partial(run, ours, True),  # the last sweep of a solve
            "torch eager": partial(run, eager, True),
        }
        suite.arms(
            f"sweep, {candidates} candidates", arms, sweep_bytes(graph, made[0][1]), "GB/s",
            {"kernel": error}, 2e-6, rows=n, classes=k,
        )  # fmt: skip


SCORES = ((1 << 20, 1024, 512, 16), (1_280_000 // 4, 1000, 1280, 32), (1 << 17, 21_000, 1024, 32))
CHUNK_ENTRIES = (1 << 25) // 4  # float32 products of a chunk: 32 MB stay in the cache


def chunk_candidates(
    rows: torch.Tensor, weights: torch.Tensor, offset: torch.Tensor, width: int
) -> Any:
    """Return log probabilities and classes of the candidates of one chunk of rows."""
    x = (rows @ weights.T).float() + offset
    return (x - x.logsumexp(1, keepdim=True)).topk(width, dim=1)


def scores(suite: Suite, shapes: tuple[tuple[int, int, int, int], ...] = SCORES) -> None:
    """Time F P^T to candidates, float16 operands: fused, and in chunks of cuBLAS's product."""
    for shape in shapes:
        _score(suite, *shape)


def _score(suite: Suite, n: int, k: int, d: int, width: int) -> None:
    from transclip_fast.kernels import score as fused

    device = suite.gpu.device
    ours = backend_class("triton")(affinity(made_graph(n, k), device=device))
    features = [score_operands(n, k, d, device, seed)[0] for seed in range(INPUT_SETS)]
    _, weights, offset, out = score_operands(n, k, d, device, 0, width)
    score, chunk_rows = LinearScore(weights.float(), offset), max(1, CHUNK_ENTRIES // k)
    # A chunk is what is compiled: a compiled loop over all of them would be unrolled.
    compiled = torch.compile(chunk_candidates, dynamic=False)

    def kernel(i: int) -> None:
        ours.score(features[i], score, out=out)

    def chunks(i: int) -> None:
        with setting(fused, "MAX_CANDIDATES", 0):
            kernel(i)

    def in_torch(choose: Any, i: int) -> None:
        for rows in torch.split(features[i], chunk_rows):
            choose(rows, weights, offset, width)

    def product(i: int) -> None:
        for rows in torch.split(features[i], chunk_rows):
            torch.mm(rows, weights.T)

    errors: dict[str, float] = {}
    for name, run in {"fused": kernel, "cuBLAS in chunks": chunks}.items():
        run(0)
        errors[name] = score_error(features[0], score, out)
    arms: dict[str, Arm] = {
        "fused": kernel,
        "cuBLAS in chunks": chunks,
        "torch eager": partial(in_torch, chunk_candidates),
        "torch.compile": partial(in_torch, compiled),
        "cuBLAS, no selection": product,
    }
    suite.arms(
        f"score, {k} to {width}, {d}", arms, 2.0 * n * k * d, "TFLOP/s", errors, 1e-5,
        rows=n, classes=k, dim=d, candidates=width,
    )  # fmt: skip


def sums(suite: Suite, n: int = 1_280_000, k: int = 1000, d: int = 1280) -> None:
    """Time Z^T F of sparse assignments, beside the dense product of chunks."""
    device = suite.gpu.device
    ours = backend_class("triton")(affinity(made_graph(n, k), device=device))
    z = [lists(n, k, 16, device, seed)[1] for seed in range(INPUT_SETS)]
    features = torch.nn.functional.normalize(torch.randn(n, d, device=device), dim=1).half()

    def kernel(i: int) -> Any:
        return ours.class_sums(z[i], features)

    def vendor(i: int) -> torch.Tensor:
        total = torch.zeros(k, d, device=device)
        for start in range(0, n, 1 << 16):
            part = z[i].take(slice(start, start + (1 << 16))).dense().half()
            total += part.T @ features[start : start + (1 << 16)]
        return total

    error = sums_error(ours, z[0], features)
    work = 2.0 * d * float((z[0].values > 0).sum())
    arms: dict[str, Arm] = {"kernel": kernel, "cuBLAS on dense chunks": vendor}
    suite.arms("class sums", arms, work, "GB/s", {"kernel": error}, 1e-6, rows=n, classes=k, dim=d)


NEIGHBOURS = (20_000, 131_072, 1_280_000)


def graph_errors(suite: Suite, features: torch.Tensor) -> None:
    """Check a graph of the kernels against one that is searched exactly throughout."""
    own = Rows(features, device=suite.gpu.device)
    graph = build_graph(own, 3, search="exact")
    with setting(exact_search, "certifiable", lambda rows, size: False):
        exact = build_graph(own, 3, search="exact")
    differ = float((graph.neighbors != exact.neighbors).mean())
    off = float(np.abs(graph.similarities - exact.similarities).max())
    suite.check("graph, other neighbours than exact search", differ, 0.0, rows=len(own))
    suite.check("graph, their similarities", off, 0.0, rows=len(own))


def neighbours(suite: Suite, sizes: tuple[int, int, int] = NEIGHBOURS, d: int = 1280) -> None:
    """Check the graph of a few rows; time that of more beside a product, and of all rows once."""
    (few, some, n), device = sizes, suite.gpu.device
    features = made_problem(n, max(2, min(1000, n // 8)), d, device)[0]
    graph_errors(suite, features[evenly_spaced_rows(n, few, device)])

    def search(rows: Rows) -> int:
        found = Candidates.empty(len(rows), 3 + SPARE_CANDIDATES, rows.device)
        return exact_search.search_certified(rows, found, 3, Job.of(len(rows)))

    small = Rows(features[:some].contiguous(), device=device)
    half = small.half()[:]

    def eager(i: int) -> None:
        for rows in torch.split(half, 4096):
            (rows @ half.T).topk(9, dim=1)

    arms: dict[str, Arm] = {"kernel": lambda i: search(small), "torch eager": eager}
    suite.arms(
        "neighbours", arms, 2.0 * some**2 * d, "TFLOP/s", {}, 0.0,
        rows=some, dim=d, again=search(small),
    )  # fmt: skip
    run = partial(suite.gpu.seconds, lambda: search(Rows(features, device=device)), warm=False)
    found = suite.attempt("neighbours of all rows", run)
    if found is not None:
        suite.timed(
            f"neighbours, {n} rows", "kernel", 1e3 * found[1], 2.0 * n**2 * d, "TFLOP/s",
            rows=n, dim=d, again=found[0], peak_gb=found[2] / 1e9,
        )  # fmt: skip


def eva(suite: Suite, batch: int = 64, **shape: int) -> None:
    """Time the image tower of EVA-CLIP-8B with random weights in bfloat16."""
    device = suite.gpu.device
    tower = EvaTower(device=device, dtype=torch.bfloat16, **shape).draw(0)
    side = shape.get("side", 224)
    shape_in = (batch, 3, side, side)
    images = [torch.randn(shape_in, device=device, dtype=torch.bfloat16) for _ in range(INPUT_SETS)]
    compiled = torch.compile(tower, dynamic=False)
    arms: dict[str, Arm] = {
        "torch": lambda i: tower(images[i]),
        "torch.compile": lambda i: compiled(images[i]),
    }
    with torch.inference_mode():
        suite.arms(
            "EVA-CLIP-8B image tower", arms, batch * tower.operations(), "TFLOP/s",
            {"torch": eva_error(device, **shape)}, 0.05,
            batch=batch, operations_per_image=tower.operations(),
        )  # fmt: skip
    for line in suite.lines[-2:]:
        if line.operation.startswith("EVA"):
            print(f"{line.operation}, {line.arm}: {1e3 * batch / line.milliseconds:.0f} images/s")
