"""`transclip-fast plan`: memory and time of a solve, before it."""

from __future__ import annotations

import warnings

import click
import torch

from transclip_fast.cli import common
from transclip_fast.cli.graph import method_option
from transclip_fast.device import resolve_device
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.inputs import as_log_probabilities, as_logits, as_unit_rows, check_rows
from transclip_fast.memory import Size, choose_layout, limit_of, parse_memory
from transclip_fast.plan import Plan, make_plan
from transclip_fast.prior import LinearPrior
from transclip_fast.store.features import Features, load_features
from transclip_fast.stored import StoredRows
from transclip_fast.truncation import choose_truncation, sample_ids

LARGE_WORK = 1e12  # operations of a solve from which a trial is worth its second


@click.command("plan")
@click.argument("features", type=click.Path(), required=False)
@click.option("--queries", type=click.IntRange(min=1), help="Rows, where there is no FEATURES yet.")
@click.option("--classes", type=click.IntRange(min=1), help="Classes.")
@click.option("--dim", type=click.IntRange(min=1), help="Dimensions of a feature.")
@common.memory_option
@click.option("--assignments", default="auto", show_default=True)
@click.option("--candidates", type=click.IntRange(min=1), help="Classes of a row that are kept.")
@method_option("--graph-method")
@common.device_option
@common.json_option
def command(
    features: str | None,
    queries: int | None,
    classes: int | None,
    dim: int | None,
    memory: str | None,
    assignments: str,
    candidates: int | None,
    method: str,
    device: str,
    as_json: bool,
) -> None:
    """Say what solving FEATURES will take: memory, disk, work, and time from a short trial here.

    Without FEATURES, of so many rows, classes and dimensions, stored in float16. Memory is that
    of the process; exit code 2 if it is more than --memory.

    \b
    Examples:
      transclip-fast plan features
      transclip-fast plan --queries 10000000 --classes 21000 --dim 1024 --memory 16GiB
    """
    model = TransCLIP(device=device, memory=memory, assignments=assignments, candidates=candidates)
    model.check()
    sizes = (queries, classes, dim)
    if features is not None:
        if any(size is not None for size in sizes):
            raise InputError("plan takes FEATURES, or --queries, --classes and --dim; not both")
        found = plan_of(load_features(features), model, method, trial=True)
    elif queries is None or classes is None or dim is None:
        raise InputError("plan needs FEATURES, or --queries, --classes and --dim")
    else:
        found = plan_of_size(queries, classes, dim, model, method, trial=True)
    common.summarise(found.summary(), found.table(), as_json)


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
    matrix = stored.get("image_features")
    sample = _prior_sample(stored, model)
    n_rows, dim = matrix.shape
    on_disk = isinstance(matrix, StoredRows)
    device = resolve_device(model.device)
    copied = on_disk or "float32" not in str(matrix.dtype) or device.type != "cpu"
    size = Size(n_rows, sample.shape[1], dim, model.n_neighbors, copied=copied)
    nbytes = n_rows * dim * matrix.dtype.itemsize if on_disk else 0
    return _plan(size, nbytes, sample, model, method, trial=trial)


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
    size = Size(n_rows, n_classes, dim, model.n_neighbors)
    return _plan(size, 2 * n_rows * dim, None, model, method, trial=trial)


def _plan(
    size: Size,
    stored_bytes: int,
    sample: torch.Tensor | None,
    model: TransCLIP,
    method: str | None,
    *,
    trial: bool | None,
) -> Plan:
    """`trial` None: where the work is worth a second."""
    if trial is None:
        trial = size.n_rows * size.n_classes * size.dim * model.max_iter > LARGE_WORK
    device = resolve_device(model.device)
    memory = parse_memory(model.memory)
    layout = choose_layout(
        size, device, form=model.form(), candidates=model.candidates, memory=memory
    )
    candidates = layout.candidates
    if sample is not None and candidates is not None:
        truncation = choose_truncation(
            sample,
            size.n_rows,
            kl_weight=1.0 if model.kl_weight is None else model.kl_weight,
            most=candidates,
            candidates=model.candidates,
            rank=model.rank,
        )
        candidates = truncation.candidates if truncation else None
    return make_plan(
        size,
        layout,
        model,
        device,
        limit=limit_of(device, memory),
        candidates=candidates,
        stored_bytes=stored_bytes,
        method=method,
        backend=model.backend,
        trial=trial,
    )


def _prior_sample(stored: Features, model: TransCLIP) -> torch.Tensor:
    """log y_hat (n, K) of some rows."""
    matrix = stored.get("image_features")
    ids = sample_ids(len(matrix))
    with warnings.catch_warnings():  # solving says it again, of all rows
        warnings.simplefilter("ignore")
        for name, check in (("prior", as_log_probabilities), ("prior_logits", as_logits)):
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
