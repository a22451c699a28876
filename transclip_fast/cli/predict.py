"""`transclip-fast predict`: label new rows with a fitted mixture, without their neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from transclip_fast.cli import common
from transclip_fast.data.checks import as_labels, as_unit_rows
from transclip_fast.data.priors import as_log_probabilities, as_logits
from transclip_fast.device import resolve_device
from transclip_fast.errors import InputError
from transclip_fast.metrics import accuracy
from transclip_fast.solver.loop import predict
from transclip_fast.solver.prior import GivenPrior, LinearPrior, Prior
from transclip_fast.store.atomic import new_folder, writing
from transclip_fast.store.features import Features, load_features
from transclip_fast.store.linear_maps import map_features
from transclip_fast.store.results import (
    CONTENTS,
    load_mixture,
    load_run,
    prediction_tables,
    save_result,
)


@click.command("predict")
@click.argument("result", type=click.Path())
@click.argument("new_features", type=click.Path())
@common.out_option
@click.option("--prior", type=click.Path(), help="Probabilities (N, K) of the new rows.")
@click.option("--prior-logits", type=click.Path(), help="Logits (N, K) of the new rows.")
@click.option("--labels", type=click.Path(), help="True labels (N,) of the new rows.")
@common.image_map_option
@common.device_option
@common.json_option
def command(
    result: str,
    new_features: str,
    out: str,
    prior: str | None,
    prior_logits: str | None,
    labels: str | None,
    image_map: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Label the rows of NEW_FEATURES with the mixture that `solve` left in RESULT.

    Each row is labelled by itself, from the mixture and the prior. After a solve with a prior or
    prior logits the new rows need theirs too. --out receives the same files as that of `solve`.

    \b
    Example:
      transclip-fast predict result more_features.npz --out more_labels
    """
    if Path(out).resolve() == Path(result).resolve():
        raise InputError(f"{out}: is the result to predict from; name another folder")
    stages = common.Stages()
    chosen = resolve_device(device)
    with stages.time("load"):
        solved = load_run(result)
        mixture, weights = load_mixture(result)
        if "prior_weights" in weights and (prior or prior_logits):
            raise InputError(
                f"{prior or prior_logits}: {result} was solved with prototypes, not with a prior; "
                "leave the option out"
            )
        stored = load_features(
            new_features,
            {"prior": prior, "prior_logits": prior_logits, "labels": labels},
            shots=0,
            n_classes=len(mixture.means),
        )
        map_features(stored, image=image_map)
        known = solved.get("maps", {}).get("image_map")
        if stored.maps.get("image_map") != known:
            raise InputError(
                f"{result}: was solved without an image map; leave out --image-map"
                if known is None
                else f"{result}: was solved with an image map; give the same --image-map"
            )
        stored.class_names = solved["class_names"]
    n_classes, d = mixture.means.shape
    with common.collected_warnings(stored.origins) as warnings, new_folder(out, CONTENTS) as folder:
        with common.named(stored.origins, stored.path):
            rows = as_unit_rows(stored.get("image_features"), "image_features", columns=d)
            priors = _priors(stored, weights, rows, n_classes, chosen)
            truth = stored.get("labels")
            if truth is not None:
                checked = as_labels(truth, "labels", rows=len(rows), n_classes=n_classes)
                truth = checked.cpu().numpy()
        with stages.time("predict"):
            z = predict(
                rows.to(chosen),
                mixture.to(chosen),
                priors[0],
                likelihood_weight=_weight(solved, result, "likelihood_weight"),
                kl_weight=_weight(solved, result, "kl_weight"),
            )
            distributions = z.cpu().numpy()
            zero_shot = priors[1].predict(rows.to(chosen))
        run = _summary(distributions.argmax(1), zero_shot[0], truth, (n_classes, d))
        run |= {
            "kind": "predict",
            "seconds": stages.seconds,
            "device": str(chosen),
            "class_names": stored.class_names,
            "config": solved["config"],
            "inputs_sha256": stored.inputs_sha256(),
            "maps": stored.maps,
            "versions": common.versions(),
            "warnings": warnings,
        }
        tensors = {"means": mixture.means, "variances": mixture.variances, **weights}
        tables = prediction_tables(distributions, zero_shot, stored, truth)
        with writing(out):
            save_result(folder, tables, run, tensors)
    text = f"{run['n_queries']:,} rows labelled, {run['n_flipped']:,} unlike zero-shot"
    if truth is not None:
        text += f"\naccuracy {run['zero_shot_accuracy']:.2f} % zero-shot -> {run['accuracy']:.2f} %"
    common.summarise(run, f"{text}\nwritten to {out}", as_json)


def _priors(
    stored: Features,
    weights: dict[str, torch.Tensor],
    rows: torch.Tensor,
    n_classes: int,
    device: torch.device,
) -> tuple[Prior, Prior]:
    """The prior of the new rows, and the one whose labels count as zero-shot."""
    linear = weights.get("prior_weights")
    given = [name for name in ("prior", "prior_logits") if stored.get(name) is not None]
    prior: Prior
    if linear is not None:
        prior = LinearPrior(linear.to(device))
    elif len(given) == 1:
        read = as_log_probabilities if given[0] == "prior" else as_logits
        table = read(stored.get(given[0]), given[0], rows=len(rows))
        if table.shape[1] != n_classes:
            raise InputError(f"{given[0]}: has {table.shape[1]} classes, the result {n_classes}")
        prior = GivenPrior(table.to(device))
    else:
        raise InputError(
            "the result was solved with a prior: give one of --prior and --prior-logits for the "
            "new rows"
        )
    zero_shot = weights.get("zero_shot_weights")
    return prior, prior if zero_shot is None else LinearPrior(zero_shot.to(device))


def _weight(solved: dict[str, Any], result: str, name: str) -> float:
    value = solved["config"].get(name)
    if not isinstance(value, int | float):
        raise InputError(f"{result}: run.json has no {name}; solve again")
    return float(value)


def _summary(
    labels: np.ndarray, zero_shot: np.ndarray, truth: np.ndarray | None, shape: tuple[int, int]
) -> dict[str, Any]:
    return {
        "accuracy": None if truth is None else accuracy(labels, truth),
        "zero_shot_accuracy": None if truth is None else accuracy(zero_shot, truth),
        "n_queries": len(labels),
        "n_classes": shape[0],
        "dim": shape[1],
        "n_flipped": int((labels != zero_shot).sum()),
    }
