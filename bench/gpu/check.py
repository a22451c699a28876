"""Is everything right on this GPU? Every kernel at real sizes against float64, and whole fits.

To be run before `bench.gpu.suite`: it times nothing. Each group is a process of its own with a time
limit. Every line goes to DIR/gpu_suite.jsonl, as it comes. Needs numpy, torch and triton only.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch

from bench.common import SAME_LABELS
from bench.gpu.arms import graph_errors
from bench.gpu.lines import Suite
from bench.gpu.parts import Part, main
from bench.gpu.problems import (
    GEMM_ERROR,
    bound_error,
    energies_error,
    lists,
    made_graph,
    made_problem,
    messages_to,
    product_error,
    score_error,
    score_operands,
    start_errors,
    sums_error,
    sweep_error,
)
from bench.gpu.solves import labels_of, repeated
from transclip_fast.graph.affinity import affinity
from transclip_fast.ops import backend_class
from transclip_fast.solver.parameters import Parameters
from transclip_fast.types import Affinity, Assignments, LinearScore, Messages, Truncation

CHECKED_ROWS = 2000
ROWS = (1_280_000, 1000, 1280)  # of sweeps and class sums
HUB = (100_000, 1000, 10_000)  # rows, classes, and neighbours of one of them
SLOTS, HUB_SLOTS = (16, 32, 64, 128), (16, 128)
SCORES = ((1 << 18, 1000, 1280, 32), (1 << 14, 21_000, 1024, 32), (1 << 14, 1000, 1000, 128))
SEARCHED, FITTED = (20_000, 1280), (20_000, 200, 512)
STEPS: dict[str, Any] = {"max_iter": 2, "inner_iter": 2}


def tiny(suite: Suite) -> bool:
    """Whether this is the interpreter."""
    return suite.gpu.device == "cpu"


def sweeps(suite: Suite) -> None:
    """Check sweeps and energies at 16 to 128 slots, and at hubs, whose messages are cut."""
    n, k = (40, 50) if tiny(suite) else ROWS[:2]
    graph = affinity(made_graph(n, k), device=suite.gpu.device)
    for candidates in SLOTS[:2] if tiny(suite) else SLOTS:
        _sweep(suite, graph, k, candidates, "")
    n, k, hub = (520, 50, 519) if tiny(suite) else HUB
    graph = affinity(made_graph(n, k, hub=hub), device=suite.gpu.device)
    # So little that no class of the hub has all of its mass.
    graph = replace(graph, weights=graph.weights * (10 / hub))
    for candidates in HUB_SLOTS[:1] if tiny(suite) else HUB_SLOTS:
        _sweep(suite, graph, k, candidates, ", with a hub")


def _sweep(suite: Suite, graph: Affinity, k: int, candidates: int, what: str) -> None:
    """Check sweeps with and without their bound, and energies."""
    from transclip_fast.kernels.messages import OUTSIDE_CLASSES

    n = len(graph.offsets) - 1
    ops = backend_class("triton")(graph)
    base, z = lists(n, k, candidates, suite.gpu.device, 0)
    messages = messages_to(graph, z, min(n, CHECKED_ROWS))
    name = f"{candidates} candidates{what}"
    for bounded in (False, True):
        out = ops.sweep(base, z, out=z.empty_like(), bounded=bounded)
        error = sweep_error(base, messages, out)
        suite.check(f"sweep, {name}, bounded {bounded}", error, 2e-6, rows=n)
    suite.check(f"bound, {name}", bound_error(base, messages, out, OUTSIDE_CLASSES), 1e-7, rows=n)
    error = energies_error(messages, z, ops.row_energies(z))
    suite.check(f"energies, {name}", error, 2e-6, rows=n)


def scores(suite: Suite) -> None:
    """Check fused and chunked scores of both types of features, and products of float32."""
    for n, k, d, width in ((24, 40, 64, 16), (5, 300, 33, 40)) if tiny(suite) else SCORES:
        features, weights, offset, out = score_operands(n, k, d, suite.gpu.device, 0, width)
        ops = backend_class("triton")(affinity(made_graph(n, k), device=suite.gpu.device))
        score = LinearScore(weights.float(), offset)
        for rows in (features, features.float()):
            ops.score(rows, score, out=out)
            error = score_error(rows, score, out, CHECKED_ROWS)
            suite.check(f"score, {k} to {width}, {rows.dtype}", error, 1e-5, rows=n, dim=d)
        ours, theirs = product_error(n, k, d, suite.gpu.device)
        allowed = GEMM_ERROR * theirs
        suite.check(f"float32 products, {k} x {d}", ours, allowed, rows=n, float32_gemm=theirs)
    # Few-shot, with a prior (N, K) and a shot of each row.
    shots, log_prior = torch.arange(n, device=offset.device), features.float() @ weights.float().T
    messages = Messages.of(shots, shots % k, torch.ones_like(log_prior[:, 0]), n)
    score = replace(score, log_prior=log_prior.log_softmax(1), prior_weight=0.5, messages=messages)
    ops.score(features, score, out=out)
    error = score_error(features, score, out, CHECKED_ROWS)
    suite.check(f"score, {k} to {width}, few-shot", error, 1e-5, rows=n, dim=d)


def starts(suite: Suite) -> None:
    """Check z = y_hat and the rows that means start from, of both types of features."""
    n, k, d = (40, 5, 33) if tiny(suite) else FITTED
    features, prototypes = made_problem(n, k, d, suite.gpu.device)
    weights = (100 * prototypes).half().float()  # as float16 features take them
    for rows in (features, features.half()):
        truncation = Truncation(min(16, k), min(16, k))
        z = Assignments.empty(n, k, truncation, rows.device)
        top = backend_class("triton").start(rows, weights, None, out=z)[1:]
        of_mass, of_top = start_errors(rows, weights, z, top)
        # Of log y_hat up to 100 nats, of which a matrix unit truncates the sums.
        suite.check(f"start, {rows.dtype}", of_mass, 1e-4, rows=n, dim=d)
        suite.check(f"top rows, {rows.dtype}", of_top, 5e-4, rows=n, dim=d)


def sums(suite: Suite) -> None:
    """Check class sums of both types of features."""
    n, k, d = (60, 30, 16) if tiny(suite) else ROWS
    ops = backend_class("triton")(affinity(made_graph(n, k), device=suite.gpu.device))
    z = lists(n, k, 16, suite.gpu.device, 0)[1]
    features = made_problem(n, k, d, suite.gpu.device)[0]
    for rows in (features, features.half()):
        suite.check(f"class sums, {rows.dtype}", sums_error(ops, z, rows), 1e-6, rows=n, dim=d)


def graphs(suite: Suite) -> None:
    """Check the exact graph against products in float64."""
    n, d = (50, 32) if tiny(suite) else SEARCHED
    graph_errors(suite, made_problem(n, max(2, n // 20), d, suite.gpu.device)[0])


def fits(suite: Suite) -> None:
    """Check that labels are those of a CPU, held or streamed, in both types, and the same twice."""
    n, k, d = (20, 5, 33) if tiny(suite) else FITTED
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


PARTS = {part.__name__: Part(part, 60) for part in (sweeps, scores, starts, sums, graphs, fits)}

if __name__ == "__main__":
    raise SystemExit(main(__spec__, __doc__, PARTS, minutes=6, all_parts=True))
