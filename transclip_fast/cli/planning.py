"""What a solve will take, before anything runs: memory by arithmetic, time by a short trial."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from transclip_fast.data.feature_rows import Rows
from transclip_fast.estimator import TransCLIP
from transclip_fast.graph.build import EXACT_ROWS, RECALL_SAMPLE_ROWS, build_graph
from transclip_fast.graph.exact import allows_int8
from transclip_fast.graph.search import default_n_lists
from transclip_fast.ops import choose_backend
from transclip_fast.ops.blocks import gemm_rows
from transclip_fast.solver.layout import PROCESS, Layout, Size, limit_of, parse_memory, show_bytes
from transclip_fast.solver.loop import solve
from transclip_fast.solver.parameters import Parameters
from transclip_fast.solver.prior import LinearPrior
from transclip_fast.types import NeighborGraph, Truncation

# Of a trial: operations of a pass, as a share of the real one, and in numbers; rows at most.
TRIAL_SHARE, TRIAL_WORK, TRIAL_ROWS = 5e-4, (2e10, 1e11), 16384
TRIAL_STEPS = 2
GRAPH_ROWS = 4096
PROBES = 8  # lists that each row is compared with, where their number is not known yet
CHECKS = 3  # passes over features in files: their hash, that of the manifest, norms
FILE_RATE = 1e9  # bytes a second
TABLE_BYTES = 90  # of a row of predictions.parquet
TABLE_RATE = 1e6  # rows a second
LIST_BYTES = 1750  # of a row, in a search of some 30 lists: what was found, and is sorted
TERM_BYTES = 16  # of a row, beside its products in 8 bits
STATE_BYTES = 40  # of a row, in a state that is kept after a step


@dataclass(frozen=True)
class Stage:
    """
    A stage: seconds (None where nothing was tried), floating-point operations, bytes on disk
    that it reads or writes, and the most memory of the process and of a GPU meanwhile.
    """

    name: str
    seconds: float | None
    work: float
    disk: int
    host: int
    device: int


@dataclass(frozen=True)
class Plan:
    """
    How a problem will be solved, and what that takes.

    Parameters
    ----------
    layout : Layout
        With as many candidates as there will be.
    passes : int
        How often the features are read.
    block_rows : int
        Rows of one product.
    graph : str
        How it is searched, or "given".
    limit : int
        Bytes that are allowed, or free.
    """

    size: Size
    layout: Layout
    passes: int
    block_rows: int
    graph: str
    limit: int
    stages: tuple[Stage, ...]

    @property
    def peak(self) -> int:
        """The most memory on the device that does the work."""
        return max(stage.device or stage.host for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """Of all stages."""
        times = [stage.seconds for stage in self.stages]
        return None if None in times else float(sum(filter(None, times)))

    def line(self) -> str:
        """The plan in one line."""
        kept = self.layout.candidates
        form = "dense" if kept is None else f"sparse, {kept} candidates a row"
        features = "held" if self.layout.held else f"read {self.passes} times"
        took = "" if self.seconds is None else f", about {show_seconds(self.seconds)}"
        return (
            f"plan: {form}, features {features}, {self.graph} graph, at most "
            f"{show_bytes(self.peak)} of {show_bytes(self.limit)}{took}"
        )

    def table(self) -> str:
        """The plan for a reader, a line a stage."""
        size = self.size
        lines = [
            f"{size.n_rows:,} rows, {size.n_classes:,} classes, {size.dim} dimensions, "
            f"{size.n_neighbors} neighbours; products of {self.block_rows} rows",
            f"{'':<8}{'time':>8}{'GFLOP':>12}{'disk':>10}{'memory':>10}{'on GPU':>10}",
        ]
        for stage in self.stages:
            took = "" if stage.seconds is None else show_seconds(stage.seconds)
            work = f"{stage.work / 1e9:,.3g}" if stage.work < 1e12 else f"{stage.work / 1e9:,.0f}"
            sizes = [show_bytes(x) if x else "" for x in (stage.disk, stage.host, stage.device)]
            lines.append(f"{stage.name:<8}{took:>8}{work:>12}" + "".join(f"{x:>10}" for x in sizes))
        return "\n".join([*lines, self.line()])

    def summary(self) -> dict[str, Any]:
        """The plan as JSON."""
        return {**asdict(self), "peak": self.peak, "seconds": self.seconds}


def show_seconds(seconds: float) -> str:
    """A time for a reader."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.2g} h"


def make_plan(
    size: Size,
    layout: Layout,
    candidates: int | None,
    model: TransCLIP,
    device: torch.device,
    *,
    method: str | None = "auto",
    trial: bool = True,
) -> Plan:
    """
    The plan of a solve that is laid out.

    Parameters
    ----------
    candidates : int or None
        Of a row; None where z is dense.
    method : str or None
        How the graph is searched; None where there is one.
    trial : bool
        Whether to run small problems of this shape for a second or two, to predict the time.
    """
    if method == "auto":
        method = "exact" if size.n_rows <= EXACT_ROWS else "anchored"
    n, n_classes, d = size.n_rows, size.n_classes, size.dim
    if candidates is not None:
        layout = replace(layout, candidates=candidates)
    steps = model.max_iter + 1
    passes = size.runs * ((2 if size.linear else 1) + 2 * steps)
    parts = layout.bytes(size, device)
    solving = sum(parts.values())
    searching = parts["features"] + LIST_BYTES * n
    if allows_int8(n, d, device, held=layout.held):
        searching += (d + TERM_BYTES) * n
    read = size.stored * (1 if layout.held else passes)
    state = size.runs * steps * n * (4 * n_classes if candidates is None else STATE_BYTES)
    solve_time = graph_time = None
    if trial:
        solve_time = _solve_seconds(size, layout, model, device) + read / FILE_RATE
    if trial and method is not None:
        graph_time = _graph_seconds(size, method, device)

    def stage(name: str, seconds: float | None, work: float, disk: int, memory: int) -> Stage:
        on_gpu = device.type == "cuda"
        host = PROCESS + size.given if on_gpu else size.used(device) + memory
        return Stage(name, seconds, work, int(disk), host, memory if on_gpu else 0)

    stages = [stage("load", CHECKS * size.stored / FILE_RATE, 0, CHECKS * size.stored, 0)]
    if method is not None:
        work = 2.0 * d * _products(n, method)
        stages.append(stage("graph", graph_time, work, 12 * n * size.n_neighbors, searching))
    work = 2.0 * n * n_classes * d * (steps + 1) * size.runs
    stages.append(stage("solve", solve_time, work, read + state, solving))
    written = TABLE_BYTES * n + 12 * n_classes * d
    stages.append(stage("write", n / TABLE_RATE, 0, written, solving))
    limit = limit_of(device, parse_memory(model.memory))
    block, how = gemm_rows(device, n_classes), method or "given"
    return Plan(size, layout, passes, block, how, limit, tuple(stages))


def _solve_seconds(size: Size, layout: Layout, model: TransCLIP, device: torch.device) -> float:
    """Of a solve, from two small ones: a part for each row, and one for each step."""
    a_pass = 2.0 * size.n_classes * size.dim  # operations of a row
    work = min(max(TRIAL_SHARE * a_pass * size.n_rows, TRIAL_WORK[0]), TRIAL_WORK[1])
    rows = int(min(max(64, work // a_pass), TRIAL_ROWS, max(2, size.n_rows)))
    truncation = layout.candidates and Truncation(layout.candidates, layout.candidates)
    backend = choose_backend(model.backend, device, truncation or None)
    given = {field.name: getattr(model, field.name) for field in fields(Parameters)}
    parameters = Parameters(**given | {"max_iter": TRIAL_STEPS, "tol": 0.0})

    def seconds(n: int) -> float:
        features, prior, graph = _made(n, size, device)
        source = Rows(features.half(), device=device, held=layout.held)

        def run() -> None:
            how = {"kl_weight": 1.0, "truncation": truncation or None, "backend": backend}
            solve(source, prior, graph, parameters, **how)  # type: ignore[arg-type]
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return _timed(run)

    few = rows // 2 + 1
    seconds(few // 2 + 1)  # loads what is compiled
    half, whole = seconds(few), seconds(rows)
    a_row = max(0.0, whole - half) / max(1, rows - few)
    a_step = max(0.0, whole - rows * a_row)
    steps = (model.max_iter + 2) / (TRIAL_STEPS + 2) * size.runs
    return steps * (a_step + size.n_rows * a_row)


def _graph_seconds(size: Size, method: str, device: torch.device) -> float:
    n = min(size.n_rows, GRAPH_ROWS)
    features, _, _ = _made(n, size, device)
    exact = _timed(lambda: build_graph(features, size.n_neighbors, method="exact", device=device))
    return exact * _products(size.n_rows, method) / _products(n, "exact")


def _products(n_rows: int, method: str) -> float:
    """Products of two rows in a search."""
    if method == "exact":
        return n_rows * n_rows / 2
    lists = default_n_lists(n_rows)
    return float(n_rows) * (lists + PROBES * n_rows / lists + min(n_rows, RECALL_SAMPLE_ROWS))


def _made(n: int, size: Size, device: torch.device) -> tuple[Any, LinearPrior, NeighborGraph]:
    """A made problem of that many rows: each near the prototype of its class."""
    draw = torch.Generator().manual_seed(0)
    normal = torch.nn.functional.normalize
    prototypes = normal(torch.randn(size.n_classes, size.dim, generator=draw))
    own = prototypes[torch.arange(n) % size.n_classes]
    features = normal(own + 2 / size.dim**0.5 * torch.randn(n, size.dim, generator=draw))
    near = (np.arange(n)[:, None] + 1 + np.arange(size.n_neighbors)) % n
    graph = NeighborGraph(near, np.full(near.shape, 0.8, np.float32))
    return features, LinearPrior.from_prototypes(prototypes, 100.0).to(device), graph


def _timed(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    seconds: float = time.perf_counter() - start
    return seconds
