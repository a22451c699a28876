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
    """A stage of a solve, and what it takes."""

    name: str
    work: float  # floating-point operations
    disk: int  # bytes read or written
    host: int  # most bytes of memory of the process
    device: int  # and of a GPU; 0 on the CPU

    @property
    def peak(self) -> int:
        """The most memory on the device that does the work."""
        return self.device or self.host


@dataclass(frozen=True)
class Plan:
    """How a problem will be solved."""

    size: Size
    layout: Layout  # with as many candidates as there will be
    passes: int  # over the features
    block_rows: int  # of one matrix product
    graph: str  # method of the neighbour search, or "given"
    limit: int  # bytes that may be used
    stages: tuple[Stage, ...]

    @property
    def peak(self) -> int:
        """The most memory on the device that does the work."""
        return max(stage.peak for stage in self.stages)

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
    size: Size, layout: Layout, parameters: Parameters, device: torch.device, method: str | None
) -> Plan:
    """Plan a solve that is laid out; `method` searches the neighbours, None if there is a graph."""
    if method == "auto":
        method = "exact" if size.n_rows <= EXACT_ROWS else "anchored"
    steps = parameters.max_iter + 1
    passes = size.runs * ((2 if size.linear else 1) + 2 * steps)
    stages = _stages(size, layout, device, method, steps, passes)
    block = gemm_rows(device, size.n_classes)
    limit = limit_of(device, parse_memory(parameters.memory))
    plan = Plan(size, layout, passes, block, method or "given", limit, stages)
    if plan.peak <= limit:
        return plan
    remedies = [f"--memory {math.ceil(plan.peak / 2**30)}GiB"]
    if max(stage.peak for stage in stages if stage.name != "graph") <= limit:
        remedies.append("--graph with neighbours from another machine")
    raise InputError(
        f"memory: searching the neighbours of {size.n_rows:,} rows needs "
        f"{show_bytes(plan.peak)}, there are {show_bytes(limit)}; what fits: "
        f"{', or '.join(remedies)}"
    )


def _stages(
    size: Size, layout: Layout, device: torch.device, method: str | None, steps: int, passes: int
) -> tuple[Stage, ...]:
    n, n_classes, d = size.n_rows, size.n_classes, size.dim
    solving = sum(layout.bytes(size, device).values())
    read = size.file_bytes * (1 if layout.held else passes)
    row_bytes = 4 * n_classes if layout.candidates is None else CHECKPOINT_ROW_BYTES

    def stage(name: str, work: float, disk: int, memory: int) -> Stage:
        if device.type == "cuda":
            return Stage(name, work, disk, PROCESS_BYTES + size.input_bytes, memory)
        return Stage(name, work, disk, size.used(device) + memory, 0)

    stages = [stage("load", 0, CHECK_PASSES * size.file_bytes, 0)]
    if method is not None:
        work, lists = 2.0 * d * _search_products(n, method), 12 * n * size.n_neighbors
        stages.append(stage("graph", work, lists, layout.search_bytes(size, device)))
    work = 2.0 * n * n_classes * d * (steps + 1) * size.runs
    stages.append(stage("solve", work, read + size.runs * steps * n * row_bytes, solving))
    stages.append(stage("write", 0, TABLE_ROW_BYTES * n + 12 * n_classes * d, solving))
    return tuple(stages)


def _search_products(n_rows: int, method: str) -> float:
    """Products of two rows in a neighbour search."""
    if method == "exact":
        return n_rows * n_rows / 2
    lists = default_n_lists(n_rows)
    sample = min(n_rows, RECALL_SAMPLE_ROWS)
    return float(n_rows) * (lists + PROBED_LISTS * n_rows / lists + sample)
