"""`transclip-fast plan`: memory, disk and work of a solve, before it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from transclip_fast.cli import session
from transclip_fast.cli.options import (
    ARRAYS,
    SectionedCommand,
    array_options,
    device_option,
    json_option,
    method_option,
    model_of,
    parameter_options,
)
from transclip_fast.cli.planning import Plan, make_plan
from transclip_fast.device import resolve_device
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.solver.layout import Size, choose_layout, parse_memory
from transclip_fast.solver.problem import Problem, Settings
from transclip_fast.store.features import Features, load_features

FIT_ARRAYS = tuple(name for name in ARRAYS if name not in ("labels", "class_names"))


@click.command("plan", cls=SectionedCommand)
@click.argument("features", type=click.Path(), required=False)
@click.option("--queries", type=click.IntRange(min=1), help="Rows, where there is no FEATURES yet.")
@click.option("--classes", type=click.IntRange(min=1), help="Classes.")
@click.option("--dim", type=click.IntRange(min=1), help="Dimensions of a feature.")
@click.option("--graph", "graph_folder", type=click.Path(), help="A graph folder: no search.")
@method_option("--graph-method")
@device_option
@json_option
@array_options
@parameter_options
def command(
    features: str | None,
    queries: int | None,
    classes: int | None,
    dim: int | None,
    graph_folder: str | None,
    method: str,
    device: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Say what solving FEATURES will take: memory, disk and work.

    Takes FEATURES and the options of `solve`; or, without FEATURES, numbers of rows, classes and
    dimensions, which are then thought to be in float16 files. Memory is that of the process, at
    most; what needs more than --memory is refused with what would fit, exit code 2.

    \b
    Examples:
      transclip-fast plan features
      transclip-fast plan --queries 10000000 --classes 21000 --dim 1024 --memory 32GiB
    """
    model = model_of(options, device)
    sizes, search = (queries, classes, dim), None if graph_folder else method
    if features is not None:
        if any(size is not None for size in sizes):
            raise InputError("plan takes FEATURES, or --queries, --classes and --dim; not both")
        stored = load_features(features, {name: options[name] for name in ARRAYS})
        with session.errors_about(stored.origins, stored.path):
            problem = problem_of(stored, model)
            plan = plan_of(problem, Settings.resolve(model, problem), search)
    elif queries is None or classes is None or dim is None:
        raise InputError("plan needs FEATURES, or --queries, --classes and --dim")
    else:
        plan = plan_of_size(queries, classes, dim, model, search)
    session.print_summary(plan.summary(), plan.table(), as_json)


def problem_of(features: Features, model: TransCLIP) -> Problem:
    """The arrays of a feature folder or file, checked."""
    arrays = {name: features.get(name) for name in FIT_ARRAYS}
    X = features.get("image_features")
    return Problem.check(X, logit_scale=model.logit_scale, **arrays)


def plan_of(problem: Problem, settings: Settings, method: str | None) -> Plan:
    """The plan of a problem; `method` searches the neighbours, None where there is a graph."""
    parameters, device = settings.parameters, settings.device
    kept = None if settings.truncation is None else settings.truncation.candidates
    layout = replace(settings.layout, candidates=kept)
    return make_plan(problem.size(parameters, device), layout, parameters, device, method)


def plan_of_size(
    n_rows: int, n_classes: int, dim: int, model: TransCLIP, method: str | None
) -> Plan:
    """The plan of solving so many rows in float16 files, with as many candidates as fit."""
    device = resolve_device(model.device)
    size = Size(n_rows, n_classes, dim, model.n_neighbors, file_bytes=2 * n_rows * dim)
    layout = choose_layout(
        size,
        device,
        form=model.form,
        candidates=model.candidates,
        memory=parse_memory(model.memory),
    )
    return make_plan(size, layout, model, device, method)
