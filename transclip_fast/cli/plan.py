"""`transclip-fast plan`: memory, disk and work of a solve, by arithmetic, before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import click
import torch

from transclip_fast.cli import options, session
from transclip_fast.cli.class_outlook import describe_outlook, outlook
from transclip_fast.cli.command import Command
from transclip_fast.cli.graph import refuse_search
from transclip_fast.cli.traffic import Traffic, bytes_a_second
from transclip_fast.cli.truth import check_class_names, true_labels
from transclip_fast.device import multiplies_bytes, resolve_device
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.graph.build import check_search, choose_search
from transclip_fast.graph.centres import default_n_lists
from transclip_fast.graph.cuvs import check_cuvs
from transclip_fast.graph.recall import RECALL_SAMPLE_ROWS
from transclip_fast.memory import limit_of, parse_memory, show_bytes
from transclip_fast.ranks import current_ranks
from transclip_fast.solver.class_cost import may_be_undecided
from transclip_fast.solver.layout import Layout, Size, choose_layout
from transclip_fast.solver.parameters import Parameters
from transclip_fast.solver.problem import Problem, Settings
from transclip_fast.solver.runs import passes_of_fit
from transclip_fast.store.features import Features, load_features
from transclip_fast.store.graphs import load_manifest

PLAN_ARRAYS = tuple(
    name for name in options.ARRAYS if name not in ("labels", "class_names", "keys")
)
CPU = torch.device("cpu")
CHECK_PASSES = 3  # over features in files: their hash, the manifest's hashes, norms
PROBED_LISTS = 8  # that a row is compared with, a usual number
NEIGHBORS = {  # by how they are searched
    "exact": "exact neighbours",
    "faiss": "neighbours searched by FAISS",
    "cuvs": "neighbours searched by cuVS",
    "given": "given neighbours",
}
TABLE_ROW_BYTES = 90  # of predictions.parquet
CHECKPOINT_ROW_BYTES = 40  # of a sparse state
# Core-seconds of a row and step of 5 sweeps, operations a second of products, how many times faster
# another CPU was, and the solves that tell them, in bench/results: `bench.speed.stream` and
# `bench.speed.ranks`, on an Intel Xeon and an AMD EPYC.
STEP_ROW_SECONDS, OPERATIONS, FASTEST = 5e-6, 1.1e11, 2
MEASURED_ROWS, MEASURED_CLASSES, MEASURED_DIM = (50_000, 1_000_000), (1000, 21_000), 512


@dataclass(frozen=True)
class Stage:
    """A stage of a solve: its work, disk traffic and memory."""

    name: str
    work: float  # floating-point operations
    disk: int  # bytes read or written
    host: int  # most bytes of memory of the process
    device: int  # and of a GPU; 0 on the CPU


@dataclass(frozen=True)
class Plan:
    """How a problem will be solved."""

    size: Size
    layout: Layout  # with as many candidates as there will be
    passes: int  # over the features
    graph: str  # the neighbour search, or "given"
    limit: int  # bytes that may be used
    stages: tuple[Stage, ...]
    traffic: Traffic | None  # of several ranks
    core_seconds: tuple[float, float] | None  # of solving; None: nothing like it was measured

    @property
    def peak(self) -> int:
        """The most memory of a GPU, if one does the work; else of the process."""
        on_gpu = max(stage.device for stage in self.stages)
        return on_gpu or max(stage.host for stage in self.stages)

    def line(self) -> str:
        """The plan in one line."""
        kept = self.layout.candidates
        form = "every class of each image (dense)"
        if kept is not None:
            form = f"the {kept} likeliest classes of each image (sparse)"
        features = "in memory" if self.layout.held else f"read {self.passes} times"
        each = "" if self.traffic is None else " in a rank"
        return (
            f"plan: {form}, features {features}, {NEIGHBORS[self.graph]}, at most "
            f"{show_bytes(self.peak)} of {show_bytes(self.limit)}{each}"
        )

    def table(self, network: float | None = None) -> str:
        """The plan as text, a line a stage; `network` has so many bytes a second."""
        size, on_gpu = self.size, any(stage.device for stage in self.stages)
        lines = [
            f"{size.n_rows:,} rows, {size.n_classes:,} classes, {size.dim} dimensions, "
            f"{size.n_neighbors} neighbours",
            f"{'':<8}{'GFLOP':>12}{'disk':>10}{'memory':>10}" + f"{'on GPU':>10}" * on_gpu,
        ]
        for stage in self.stages:
            work = f"{stage.work / 1e9:,.3g}" if stage.work < 1e12 else f"{stage.work / 1e9:,.0f}"
            numbers = (stage.disk, stage.host, stage.device)[: 2 + on_gpu]
            sizes = [show_bytes(x) if x else "" for x in numbers]
            lines.append(f"{stage.name:<8}{work:>12}" + "".join(f"{x:>10}" for x in sizes))
        if self.traffic is not None:
            lines[1:1] = [
                f"{size.ranks} ranks of at most {size.own_rows:,} rows, assumed to be neighbours "
                f"of {size.most_remote * size.own_rows:,} rows of others"
            ]
            lines += [self.traffic.table(network), self._core_time()]
        return "\n".join([*lines, self.line()])

    def _core_time(self) -> str:
        """The time of computing, of all ranks."""
        if self.core_seconds is None:
            return "computing: not predicted, as no solve like it was measured"
        fast, slow = self.core_seconds
        return f"computing: about {fast:,.0f} to {slow:,.0f} core-seconds with AVX512-VNNI"

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
    "--queries", type=options.COUNT, help="Number of rows, as 10M, if there are no FEATURES yet."
)
@click.option("--classes", type=options.COUNT, help="Classes.")
@click.option("--dim", type=options.COUNT, help="Dimensions of a feature.")
@click.option("--graph", "graph_folder", type=options.PATH, help="A graph folder: no search.")
@click.option(
    "--ranks", default=1, type=options.POSITIVE, help="Processes of torchrun that share the rows."
)
@click.option("--network", help="What a rank sends in a second, as 25GB/s: how long it takes.")
@options.search_options
@options.device_option
@options.json_option
@options.array_options(*options.ARRAYS)
@options.shots_option
@options.parameter_options
def command(
    features: str | None,
    search: str,
    ranks: int,
    network: str | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Show the memory, disk traffic and work of solving FEATURES.

    The arguments are FEATURES and the options of `solve`, without heads, maps, other methods and
    corrections; or, without FEATURES, numbers of rows, classes and dimensions of features in
    float16 files. Memory is the peak of the process. A solve that needs more than --memory is
    refused with exit code 2, and with options that would fit.

    \b
    Examples:
      transclip-fast plan features
      transclip-fast plan --queries 10M --classes 21000 --dim 1024 --memory 32GiB
      transclip-fast plan features --ranks 4 --network 1GB/s
    \f
    With --ranks memory, disk and work are those of the rank that has most. What ranks send in a
    solve, without the search of a graph, is an upper bound, where all neighbours of a row are on
    other ranks and edges are spread evenly. A GPU that is planned for without FEATURES need not be
    here if --memory tells what it has.
    """
    if network is not None and ranks == 1:
        raise InputError("--network: one process sends nothing; give --ranks, too")
    rate = None if network is None else bytes_a_second(network)
    check_search(values["n_neighbors"], search, values["recall"], values["index"], ranks=ranks)
    device = None
    if features is None and values["memory"] and values["device"].startswith("cuda"):
        device, values["device"] = torch.device("cuda"), "cpu"
    model = options.model_of(values)
    sizes = [values[name] for name in ("queries", "classes", "dim")]
    refuse_search(values)
    searched: str | None = "faiss" if values["index"] else search
    if values["graph_folder"]:
        searched = None
    if features is not None:
        if sizes != [None] * 3:
            raise InputError("plan takes FEATURES, or --queries, --classes and --dim; not both")
        with session.collected_warnings({}):
            arrays = {name: values[name] for name in options.ARRAYS}
            stored = load_features(features, arrays, shots=values["shots"])
        if values["graph_folder"]:
            _check_graph(values["graph_folder"], len(stored.get("image_features")))
        origins = stored.origins | {"X": stored.origins["image_features"]}
        with session.collected_warnings(origins), session.errors_about(origins, stored.path):
            problem = problem_of(stored, model)
            plan = plan_of(problem, Settings.resolve(model, problem, ranks), searched, ranks)
            check_class_names(stored, problem.prior.n_classes)
            true_labels(stored, problem.prior.n_classes)
            found = outlook(problem, model)
        text = describe_outlook(found, problem.prior.n_classes, stored.class_names)
        summary = plan.summary() | {"outlook": found}
        session.print_summary(summary, f"{plan.table(rate)}\n{text}", as_json)
        return
    if None in sizes:
        raise InputError("plan needs FEATURES, or --queries, --classes and --dim")
    options.refuse_unused((*options.ARRAYS, "gamma"), "is of FEATURES, and there are none")
    plan = plan_of_size(sizes, model, searched, ranks, device)
    session.print_summary(plan.summary(), plan.table(rate), as_json)


def _check_graph(folder: str, n_rows: int) -> None:
    """Raise InputError unless a folder has a graph of so many rows; `solve` checks the rest."""
    found = load_manifest(folder).get("n_rows", n_rows)  # earlier versions have none
    if found != n_rows:
        raise InputError(f"{folder}: has {found} rows, the features have {n_rows}; build it again")


def problem_of(features: Features, model: TransCLIP) -> Problem:
    """The arrays of a feature folder or file, checked."""
    arrays = {name: features.get(name) for name in PLAN_ARRAYS}
    X = features.get("image_features")
    problem = Problem.check(X, logit_scale=model.logit_scale, ranks=current_ranks(), **arrays)
    problem = replace(problem, corrected=features.corrected)
    if model.gamma is not None and problem.support is None:
        raise InputError(
            "gamma: is the weight of the support, and there is none; leave --gamma out, or give "
            "support_features and support_labels"
        )
    return problem


def plan_of(
    problem: Problem, settings: Settings, search: str | None, ranks: int | None = None
) -> Plan:
    """
    The plan of a problem, by default for the ranks there are.

    `search` finds the neighbours, None where there is a graph.
    """
    parameters, device = settings.parameters, settings.device
    kept = None if settings.truncation is None else settings.truncation.candidates
    layout = replace(settings.layout, candidates=kept)
    if search == "cuvs":
        check_cuvs(device, layout.held)
    size = problem.size(parameters, device, ranks)
    passes = passes_of_fit(
        parameters,
        problem.gammas(parameters),
        linear=size.linear,
        support=problem.support is not None,
        validation=problem.validation is not None,
    )
    return make_plan(size, layout, parameters, device, search, passes, settings.limit)


def plan_of_size(
    shape: Sequence[int],
    model: TransCLIP,
    search: str | None,
    ranks: int = 1,
    device: torch.device | None = None,
) -> Plan:
    """
    The plan of solving float16 files of (rows, classes, dimensions), with what fits of z.

    On the model's device, or on one that need not be here.
    """
    if search == "cuvs" and device is None:
        check_cuvs(resolve_device(model.device), held=True)
    (n_rows, n_classes, dim), device = shape, device or resolve_device(model.device)
    files = 2 * n_rows * dim
    undecided = may_be_undecided(model.class_cost, few_shot=False)
    size = Size(
        n_rows,
        n_classes,
        dim,
        model.n_neighbors,
        file_bytes=files,
        undecided=undecided,
        ranks=ranks,
    )
    processes = current_ranks().on_this_machine
    limit = limit_of(device, parse_memory(model.memory), processes)
    layout = choose_layout(
        size,
        device,
        form=model.form,
        candidates=model.candidates,
        rank=model.rank,
        memory=limit,
    )
    return make_plan(size, layout, model, device, search, passes_of_fit(model), limit)


def make_plan(
    size: Size,
    layout: Layout,
    parameters: Parameters,
    device: torch.device,
    search: str | None,
    passes: int,
    limit: int,
) -> Plan:
    """
    Plan a solve that is laid out within a limit and reads the features in so many passes.

    `search` finds the neighbours, None if there is a graph.
    """
    if search == "auto":
        search = choose_search(size.n_rows, device, layout.held and size.ranks == 1)
    stages = _stages(size, layout, device, search, parameters.max_iter + 1, passes)
    traffic = Traffic.of(size, layout, parameters) if size.ranks > 1 else None
    seconds = None
    if size.ranks > 1 and multiplies_bytes(size.dim):  # as where it was measured
        seconds = core_seconds(size, layout, parameters, device)
    plan = Plan(size, layout, passes, search or "given", limit, stages, traffic, seconds)
    if plan.peak <= limit:
        return plan
    # The solve fits, as it was laid out within the same limit.
    raise InputError(
        f"memory: searching the neighbours of {size.n_rows:,} rows needs "
        f"{show_bytes(plan.peak)}, there are {show_bytes(limit)}; what fits: --memory "
        f"{math.ceil(plan.peak / 2**30)}GiB, or --graph with neighbours from another machine"
    )


def _stages(
    size: Size, layout: Layout, device: torch.device, search: str | None, steps: int, passes: int
) -> tuple[Stage, ...]:
    n, n_classes, d, own = size.n_rows, size.n_classes, size.dim, size.own_rows
    solving = layout.solve_bytes(size, device)
    own_files = size.file_bytes * own // n
    read = own_files * (1 if layout.held else passes)
    row_bytes = 4 * n_classes if layout.candidates is None else CHECKPOINT_ROW_BYTES
    # What is sent from a GPU, or comes to it, is in its host's memory, too.
    travelling = layout.travelling_bytes(size) if device.type == "cuda" else 0

    def stage(name: str, work: float, disk: int, memory: int, host: int = 0) -> Stage:
        if device.type == "cuda":
            return Stage(name, work, disk, size.host_bytes + host, memory)
        return Stage(name, work, disk, size.used(device) + memory + host, 0)

    checks = (CHECK_PASSES - 1) * size.file_bytes + own_files
    stages = [stage("load", 0, checks, 0)]
    if search is not None:
        work, lists = 2.0 * d * _search_products(n, search) * own / n, 12 * own * size.n_neighbors
        if search == "faiss":  # on the CPU, wherever the solve is
            stages.append(stage("graph", work, lists, 0, layout.search_bytes(size, CPU)))
        else:
            stages.append(stage("graph", work, lists, layout.search_bytes(size, device)))
    work = 2.0 * own * n_classes * d * (steps + 1) * size.runs
    saved = size.runs * steps * own * row_bytes
    stages.append(stage("solve", work, read + saved, solving, travelling))
    table = TABLE_ROW_BYTES * own + 12 * n_classes * d
    stages.append(stage("write", 0, table, solving))
    return tuple(stages)


def core_seconds(
    size: Size, layout: Layout, parameters: Parameters, device: torch.device
) -> tuple[float, float] | None:
    """
    The time that all cores spend in one solve, of the CPUs measured the least and the most.

    None unless a solve like it was measured.
    """
    measured = (
        device.type == "cpu"
        and layout.candidates is not None
        and size.linear
        and size.runs == 1
        and parameters.inner_iter == 5
        and size.dim == MEASURED_DIM
        and MEASURED_CLASSES[0] <= size.n_classes <= MEASURED_CLASSES[1]
        and MEASURED_ROWS[0] <= size.own_rows <= MEASURED_ROWS[1]
    )
    if not measured:
        return None
    products = 2.0 * size.n_classes * size.dim / OPERATIONS
    slow = size.n_rows * (parameters.max_iter + 2) * (products + STEP_ROW_SECONDS)
    return slow / FASTEST, slow


def _search_products(n_rows: int, search: str) -> float:
    """Products of two rows in a neighbour search."""
    if search == "exact":
        return float(n_rows) * n_rows
    lists = default_n_lists(n_rows)
    sample = min(n_rows, RECALL_SAMPLE_ROWS)
    return float(n_rows) * (lists + PROBED_LISTS * n_rows / lists + sample)
