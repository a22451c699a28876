"""`transclip-fast plan`: memory, disk and work of a solve, before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click

from transclip_fast.cli import options, session
from transclip_fast.cli.planning import Plan, make_plan
from transclip_fast.device import resolve_device
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.solver.layout import Size, choose_layout, parse_memory
from transclip_fast.solver.problem import Problem, Settings
from transclip_fast.store.features import Features, load_features

FIT_ARRAYS = tuple(name for name in options.ARRAYS if name not in ("labels", "class_names"))


@click.command("plan", cls=options.SectionedCommand)
@click.argument("features", type=click.Path(), required=False)
@click.option("--queries", type=options.POSITIVE, help="Rows, where there is no FEATURES yet.")
@click.option("--classes", type=options.POSITIVE, help="Classes.")
@click.option("--dim", type=options.POSITIVE, help="Dimensions of a feature.")
@click.option("--graph", "graph_folder", type=click.Path(), help="A graph folder: no search.")
@options.method_option("--graph-method")
@options.device_option
@options.json_option
@options.array_options(*options.ARRAYS)
@options.parameter_options
def command(features: str | None, method: str, as_json: bool, **values: Any) -> None:
    """Say what solving FEATURES will take: memory, disk and work.

    Takes FEATURES and the options of `solve`; or, without FEATURES, numbers of rows, classes and
    dimensions, which are then thought to be in float16 files. Memory is that of the process, at
    most; what needs more than --memory is refused with what would fit, exit code 2.

    \b
    Examples:
      transclip-fast plan features
      transclip-fast plan --queries 10000000 --classes 21000 --dim 1024 --memory 32GiB
    """
    model = options.model_of(values)
    sizes = [values[name] for name in ("queries", "classes", "dim")]
    search = None if values["graph_folder"] else method
    if features is not None:
        if sizes != [None] * 3:
            raise InputError("plan takes FEATURES, or --queries, --classes and --dim; not both")
        stored = load_features(features, {name: values[name] for name in options.ARRAYS})
        with session.errors_about(stored.origins, stored.path):
            problem = problem_of(stored, model)
            plan = plan_of(problem, Settings.resolve(model, problem), search)
    elif None in sizes:
        raise InputError("plan needs FEATURES, or --queries, --classes and --dim")
    else:
        plan = plan_of_size(sizes, model, search)
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


def plan_of_size(shape: Sequence[int], model: TransCLIP, method: str | None) -> Plan:
    """The plan of solving float16 files of (rows, classes, dimensions), with what fits of z."""
    (n_rows, n_classes, dim), device = shape, resolve_device(model.device)
    size = Size(n_rows, n_classes, dim, model.n_neighbors, file_bytes=2 * n_rows * dim)
    layout = choose_layout(
        size,
        device,
        form=model.form,
        candidates=model.candidates,
        memory=parse_memory(model.memory),
    )
    return make_plan(size, layout, model, device, method)
