"""Memory, disk and work of a solve, by arithmetic, before anything runs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from transclip_fast.errors import InputError
from transclip_fast.graph.build import EXACT_ROWS, RECALL_SAMPLE_ROWS
from transclip_fast.graph.search import default_n_lists
from transclip_fast.ops.blocks import gemm_rows
from transclip_fast.solver.layout import (
    PROCESS_BYTES,
    Layout,
    Size,
    limit_of,
    parse_memory,
    show_bytes,
)
from transclip_fast.solver.parameters import Parameters

CHECK_PASSES = 3  # over features in files: their hash, that of the manifest, norms
PROBED_LISTS = 8  # that a row is compared with, a usual number
TABLE_ROW_BYTES = 90  # of predictions.parquet
CHECKPOINT_ROW_BYTES = 40  # of a sparse state


@dataclass(frozen=True)
class Stage:
    """
    A stage: floating-point operations, bytes that it reads or writes on disk, and the most memory
    of the process and of a GPU meanwhile.
    """

    name: str
    work: float
    disk: int
    host: int
    device: int


@dataclass(frozen=True)
class Plan:
    """
    How a problem will be solved.

    Parameters
    ----------
    layout : Layout
        With as many candidates as there will be.
    passes : int
        Passes over the features.
    block_rows : int
        Rows of one matrix product.
    graph : str
        Method of the neighbour search, or "given".
    limit : int
        Bytes that may be used.
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

    def line(self) -> str:
        """The plan in one line."""
        kept = self.layout.candidates
        form = "dense" if kept is None else f"sparse, {kept} candidates a row"
        features = "held" if self.layout.held else f"read {self.passes} times"
        return (
            f"plan: {form}, features {features}, {self.graph} graph, at most "
            f"{show_bytes(self.peak)} of {show_bytes(self.limit)}"
        )

    def table(self) -> str:
        """The plan as text, a line a stage."""
        size = self.size
        lines = [
            f"{size.n_rows:,} rows, {size.n_classes:,} classes, {size.dim} dimensions, "
            f"{size.n_neighbors} neighbours; products of {self.block_rows} rows",
            f"{'':<8}{'GFLOP':>12}{'disk':>10}{'memory':>10}{'on GPU':>10}",
        ]
        for stage in self.stages:
            work = f"{stage.work / 1e9:,.3g}" if stage.work < 1e12 else f"{stage.work / 1e9:,.0f}"
            sizes = [show_bytes(x) if x else "" for x in (stage.disk, stage.host, stage.device)]
            lines.append(f"{stage.name:<8}{work:>12}" + "".join(f"{x:>10}" for x in sizes))
        return "\n".join([*lines, self.line()])

    def summary(self) -> dict[str, Any]:
        """The plan as JSON."""
        return {**asdict(self), "peak": self.peak}


def make_plan(
    size: Size,
    layout: Layout,
    parameters: Parameters,
    device: torch.device,
    method: str | None = "auto",
) -> Plan:
    """
    Plan a solve that is laid out; `method` searches the neighbours, None where there is a graph.

    Raises
    ------
    InputError
        The search does not fit into memory; the message says what does.
    """
    plan = _plan(size, layout, parameters, device, method)
    if plan.peak <= plan.limit:
        return plan
    remedies = [f"--memory {math.ceil(plan.peak / 2**30)}GiB"]
    if _plan(size, layout, parameters, device, None).peak <= plan.limit:
        remedies.append("--graph with neighbours from another machine")
    raise InputError(
        f"memory: searching the neighbours of {size.n_rows:,} rows needs "
        f"{show_bytes(plan.peak)}, there are {show_bytes(plan.limit)}; what fits: "
        f"{', or '.join(remedies)}"
    )


def _plan(
    size: Size,
    layout: Layout,
    parameters: Parameters,
    device: torch.device,
    method: str | None,
) -> Plan:
    if method == "auto":
        method = "exact" if size.n_rows <= EXACT_ROWS else "anchored"
    n, n_classes, d = size.n_rows, size.n_classes, size.dim
    steps = parameters.max_iter + 1
    passes = size.runs * ((2 if size.linear else 1) + 2 * steps)
    parts = layout.bytes(size, device)
    solving = sum(parts.values())
    searching = layout.search_bytes(size, device)
    read = size.file_bytes * (1 if layout.held else passes)
    row_bytes = 4 * n_classes if layout.candidates is None else CHECKPOINT_ROW_BYTES

    def stage(name: str, work: float, disk: int, memory: int) -> Stage:
        on_gpu = device.type == "cuda"
        host = PROCESS_BYTES + size.input_bytes if on_gpu else size.used(device) + memory
        return Stage(name, work, disk, host, memory if on_gpu else 0)

    stages = [stage("load", 0, CHECK_PASSES * size.file_bytes, 0)]
    if method is not None:
        work, lists = 2.0 * d * _search_products(n, method), 12 * n * size.n_neighbors
        stages.append(stage("graph", work, lists, searching))
    work = 2.0 * n * n_classes * d * (steps + 1) * size.runs
    stages.append(stage("solve", work, read + size.runs * steps * n * row_bytes, solving))
    stages.append(stage("write", 0, TABLE_ROW_BYTES * n + 12 * n_classes * d, solving))
    block, limit = gemm_rows(device, n_classes), limit_of(device, parse_memory(parameters.memory))
    return Plan(size, layout, passes, block, method or "given", limit, tuple(stages))


def _search_products(n_rows: int, method: str) -> float:
    """Products of two rows in a neighbour search."""
    if method == "exact":
        return n_rows * n_rows / 2
    lists = default_n_lists(n_rows)
    sample = min(n_rows, RECALL_SAMPLE_ROWS)
    return float(n_rows) * (lists + PROBED_LISTS * n_rows / lists + sample)
