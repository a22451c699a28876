"""`transclip-fast plan`: memory, disk and work of a solve, by arithmetic, before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import click
import torch

from transclip_fast.cli import options, session
from transclip_fast.cli.command import Command
from transclip_fast.cli.outlook import describe_outlook, outlook
from transclip_fast.device import resolve_device
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.graph.build import choose_search
from transclip_fast.graph.centres import default_n_lists
from transclip_fast.graph.recall import SAMPLE_ROWS
from transclip_fast.ops.blocks import gemm_rows
from transclip_fast.ranks import current_ranks
from transclip_fast.solver import layout as layouts
from transclip_fast.solver.layout import PROCESS_BYTES, Layout, Size, parse_memory, show_bytes
from transclip_fast.solver.parameters import Parameters
from transclip_fast.solver.problem import Problem, Settings
from transclip_fast.store.features import Features, load_features

FIT_ARRAYS = tuple(name for name in options.ARRAYS if name not in ("labels", "class_names"))
CHECK_PASSES = 3  # over features in files: their hash, the manifest's hashes, norms
PROBED_LISTS = 8  # that a row is compared with, a usual number
TABLE_ROW_BYTES = 90  # of predictions.parquet
CHECKPOINT_ROW_BYTES = 40  # of a sparse state


@dataclass(frozen=True)
class Stage:
    """A stage of a solve: its work, disk traffic and memory."""

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
    graph: str  # the neighbour search, or "given"
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


@click.command(
    "plan",
    cls=Command,
    shown="queries classes dim graph_folder search text_features assignments memory device as_json",
)
@click.argument("features", type=options.PATH, required=False)
@click.option(
    "--queries", type=options.POSITIVE, help="Number of rows, if there are no FEATURES yet."
)
@click.option("--classes", type=options.POSITIVE, help="Classes.")
@click.option("--dim", type=options.POSITIVE, help="Dimensions of a feature.")
@click.option("--graph", "graph_folder", type=options.PATH, help="A graph folder: no search.")
@options.search_options
@options.device_option
@options.json_option
@options.array_options(*options.ARRAYS)
@options.parameter_options
def command(features: str | None, search: str, as_json: bool, **values: Any) -> None:
    """Show the memory, disk traffic and work of solving FEATURES.

    The arguments are FEATURES and the options of `solve`; or, without FEATURES, numbers of rows,
    classes and dimensions of features in float16 files. Memory is the peak of the process. A solve
    that needs more than --memory is refused with exit code 2, and with options that would fit.

    \b
    Examples:
      transclip-fast plan features
      transclip-fast plan --queries 10000000 --classes 21000 --dim 1024 --memory 32GiB
    """
    model = options.model_of(values)
    sizes = [values[name] for name in ("queries", "classes", "dim")]
    searched: str | None = "faiss" if values["index"] else search
    if values["graph_folder"]:
        searched = None
    if features is not None:
        if sizes != [None] * 3:
            raise InputError("plan takes FEATURES, or --queries, --classes and --dim; not both")
        with session.collected_warnings({}):
            stored = load_features(features, {name: values[name] for name in options.ARRAYS})
        origins = stored.origins | {"X": stored.origins["image_features"]}
        with session.collected_warnings(origins), session.errors_about(origins, stored.path):
            problem = problem_of(stored, model)
            plan = plan_of(problem, Settings.resolve(model, problem), searched)
            found = outlook(problem, model)
        text = describe_outlook(found, problem.prior.n_classes, stored.class_names)
        summary = plan.summary() | {"outlook": found}
        session.print_summary(summary, f"{plan.table()}\n{text}", as_json)
        return
    if None in sizes:
        raise InputError("plan needs FEATURES, or --queries, --classes and --dim")
    plan = plan_of_size(sizes, model, searched)
    session.print_summary(plan.summary(), plan.table(), as_json)


def problem_of(features: Features, model: TransCLIP) -> Problem:
    """The arrays of a feature folder or file, checked."""
    arrays = {name: features.get(name) for name in FIT_ARRAYS}
    X = features.get("image_features")
    problem = Problem.check(X, logit_scale=model.logit_scale, ranks=current_ranks(), **arrays)
    problem = replace(problem, corrected=features.corrected)
    if model.gamma is not None and problem.support is None:
        raise InputError(
            "gamma: is the weight of the support, and there is none; leave --gamma out, or give "
            "support_features and support_labels"
        )
    return problem


def plan_of(problem: Problem, settings: Settings, search: str | None) -> Plan:
    """The plan of a problem; `search` finds the neighbours, None where there is a graph."""
    parameters, device = settings.parameters, settings.device
    kept = None if settings.truncation is None else settings.truncation.candidates
    layout = replace(settings.layout, candidates=kept)
    return make_plan(problem.size(parameters, device), layout, parameters, device, search)


def plan_of_size(shape: Sequence[int], model: TransCLIP, search: str | None) -> Plan:
    """The plan of solving float16 files of (rows, classes, dimensions), with what fits of z."""
    (n_rows, n_classes, dim), device = shape, resolve_device(model.device)
    size = Size(n_rows, n_classes, dim, model.n_neighbors, file_bytes=2 * n_rows * dim)
    layout = layouts.choose_layout(
        size,
        device,
        form=model.form,
        candidates=model.candidates,
        memory=parse_memory(model.memory),
    )
    return make_plan(size, layout, model, device, search)


def make_plan(
    size: Size, layout: Layout, parameters: Parameters, device: torch.device, search: str | None
) -> Plan:
    """Plan a solve that is laid out; `search` finds the neighbours, None if there is a graph."""
    if search == "auto":
        search = choose_search(size.n_rows, device, layout.held)
    steps = parameters.max_iter + 1
    passes = size.runs * ((2 if size.linear else 1) + 2 * steps)
    if parameters.class_cost is not False:  # the start may read them once more
        passes += size.runs
    stages = _stages(size, layout, device, search, steps, passes)
    block = gemm_rows(device, size.n_classes)
    limit = layouts.limit_of(device, parse_memory(parameters.memory))
    plan = Plan(size, layout, passes, block, search or "given", limit, stages)
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
    size: Size, layout: Layout, device: torch.device, search: str | None, steps: int, passes: int
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
    if search is not None:
        work, lists = 2.0 * d * _search_products(n, search), 12 * n * size.n_neighbors
        stages.append(stage("graph", work, lists, layout.search_bytes(size, device)))
    work = 2.0 * n * n_classes * d * (steps + 1) * size.runs
    stages.append(stage("solve", work, read + size.runs * steps * n * row_bytes, solving))
    stages.append(stage("write", 0, TABLE_ROW_BYTES * n + 12 * n_classes * d, solving))
    return tuple(stages)


def _search_products(n_rows: int, search: str) -> float:
    """Products of two rows in a neighbour search."""
    if search == "exact":
        return float(n_rows) * n_rows
    lists = default_n_lists(n_rows)
    sample = min(n_rows, SAMPLE_ROWS)
    return float(n_rows) * (lists + PROBED_LISTS * n_rows / lists + sample)
