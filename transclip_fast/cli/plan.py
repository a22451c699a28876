"""`transclip-fast plan`: memory and time of a solve, before it."""

from __future__ import annotations

import warnings
from typing import Any

import click
import torch

from transclip_fast.cli import session
from transclip_fast.cli.options import (
    SectionedCommand,
    array_options,
    device_option,
    json_option,
    method_option,
    model_of,
    parameter_options,
)
from transclip_fast.cli.planning import Plan, make_plan
from transclip_fast.data.checks import as_log_probabilities, as_logits, as_unit_rows, check_rows
from transclip_fast.device import resolve_device
from transclip_fast.errors import InputError
from transclip_fast.estimator import GAMMAS, TransCLIP
from transclip_fast.solver.layout import Size, choose_layout, parse_memory, show_bytes
from transclip_fast.solver.prior import LinearPrior
from transclip_fast.solver.problem import size_of
from transclip_fast.solver.truncation import choose_truncation, sample_ids
from transclip_fast.store.features import ARRAYS, Features, load_features

LARGE_WORK = 1e12  # operations of a solve from which a trial is worth its second
GIVEN = (("prior", as_log_probabilities), ("prior_logits", as_logits))


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
    """Say what solving FEATURES will take: memory, disk, work, and time from a short trial here.

    Takes FEATURES and the options of `solve`; or, without FEATURES, numbers of rows, classes and
    dimensions, which are then thought to be in float16 files. Memory is that of the process; exit
    code 2 if it is more than --memory.

    \b
    Examples:
      transclip-fast plan features
      transclip-fast plan --queries 10000000 --classes 21000 --dim 1024 --memory 16GiB
    """
    model = model_of(options, device)
    sizes, search = (queries, classes, dim), None if graph_folder else method
    if features is not None:
        if any(size is not None for size in sizes):
            raise InputError("plan takes FEATURES, or --queries, --classes and --dim; not both")
        stored = load_features(features, {name: options[name] for name in ARRAYS[1:]})
        with session.errors_about(stored.origins, stored.path):
            found = plan_of(stored, model, search, trial=True)
    elif queries is None or classes is None or dim is None:
        raise InputError("plan needs FEATURES, or --queries, --classes and --dim")
    else:
        found = plan_of_size(queries, classes, dim, model, search, trial=True)
    session.print_summary(found.summary(), found.table(), as_json)


def plan_of(
    stored: Features, model: TransCLIP, method: str | None, *, trial: bool | None = None
) -> Plan:
    """
    The plan of solving stored features; `method` is None where there is a graph.

    Raises
    ------
    InputError
        It does not fit into memory; arrays of no use.
    """
    few_shot = stored.get("support_features") is not None
    sample = _prior_sample(stored, model)
    size = size_of(
        stored.get("image_features"),
        sample.shape[1],
        model,
        resolve_device(model.device),
        linear=all(stored.get(name) is None for name, _ in GIVEN),
        runs=len(GAMMAS) if few_shot and model.gamma is None else 1,
    )
    kl_weight = (0.5 if few_shot else 1.0) if model.kl_weight is None else model.kl_weight
    return _plan(size, sample * kl_weight, model, method, trial)


def plan_of_size(
    n_rows: int,
    n_classes: int,
    dim: int,
    model: TransCLIP,
    method: str | None,
    *,
    trial: bool | None = None,
) -> Plan:
    """The plan of solving so many rows in float16 files; candidates are as many as there may be."""
    size = Size(n_rows, n_classes, dim, model.n_neighbors, stored=2 * n_rows * dim)
    return _plan(size, None, model, method, trial)


def _plan(
    size: Size,
    sample: torch.Tensor | None,
    model: TransCLIP,
    method: str | None,
    trial: bool | None,
) -> Plan:
    """`sample` is lambda log y_hat; `trial` None: where the work is worth it."""
    if trial is None:
        trial = size.n_rows * size.n_classes * size.dim * model.max_iter > LARGE_WORK
    device = resolve_device(model.device)
    layout = choose_layout(
        size,
        device,
        form=model.form(),
        candidates=model.candidates,
        memory=parse_memory(model.memory),
    )
    candidates = layout.candidates
    if sample is not None:
        truncation = choose_truncation(
            sample,
            size.n_rows,
            kl_weight=1.0,
            most=candidates,
            candidates=model.candidates,
            rank=model.rank,
        )
        candidates = truncation.candidates if truncation else None
    plan = make_plan(size, layout, candidates, model, device, method=method, trial=trial)
    if plan.peak > plan.limit:
        raise InputError(
            f"memory: searching the neighbours of {size.n_rows:,} rows needs "
            f"{show_bytes(plan.peak)}, there are {show_bytes(plan.limit)}; allow more, or make the "
            "graph elsewhere"
        )
    return plan


def _prior_sample(stored: Features, model: TransCLIP) -> torch.Tensor:
    """log y_hat (n, K) of some rows."""
    matrix = stored.get("image_features")
    ids = sample_ids(len(matrix))
    with warnings.catch_warnings():  # solving says it again, of all rows
        warnings.simplefilter("ignore")
        for name, check in GIVEN:
            given = stored.get(name)
            if given is not None:
                check_rows(given, name, len(matrix))
                return check(given[ids.numpy()], name, rows=len(ids))
        name = "text_features" if stored.get("prototypes") is None else "prototypes"
        if stored.get(name) is None:
            raise InputError(
                "no text features and no prior: give text_features, prototypes, prior or "
                "prior_logits"
            )
        prototypes = as_unit_rows(stored.get(name), name, columns=matrix.shape[1])
        rows = as_unit_rows(matrix[ids.numpy()], "image_features")
        return LinearPrior.from_prototypes(prototypes, model.logit_scale).at(ids, rows)
