"""`transclip-fast predict`: label new rows with a fitted mixture, without their neighbours."""

from __future__ import annotations

import os
import warnings
from typing import Any

import click
import torch

from transclip_fast.cli import options, session
from transclip_fast.cli.session import counted
from transclip_fast.cli.summary import describe_accuracy, describe_files, run_summary
from transclip_fast.cli.truth import true_labels
from transclip_fast.data.checks import as_unit_rows
from transclip_fast.data.names import first_difference
from transclip_fast.device import resolve_device
from transclip_fast.errors import InputError
from transclip_fast.memory import free_bytes, show_bytes
from transclip_fast.metrics import check_class_order
from transclip_fast.solver.loop import predict
from transclip_fast.solver.mixture import Mixture
from transclip_fast.solver.prior import LinearPrior, Prior, given_prior
from transclip_fast.store import results
from transclip_fast.store.atomic import new_folder, writing
from transclip_fast.store.features import Features, check_encoder, load_features
from transclip_fast.store.json_text import value_of
from transclip_fast.store.linear_maps import map_features

WEIGHTS = ("likelihood_weight", "kl_weight")  # of the solve
UNUSED = {"known_labels", "prototypes"}  # arrays that decide labels in a solve


@click.command("predict")
@click.argument("result", type=options.PATH)
@click.argument("path", metavar="NEW_FEATURES", type=options.PATH)
@click.option(
    "--out",
    required=True,
    type=options.PATH,
    help="Folder to write. An earlier result is replaced.",
)
@click.option("--prior", type=options.PATH, help="Probabilities (N, K) of the new rows.")
@click.option("--prior-logits", type=options.PATH, help="Logits (N, K) of the new rows.")
@click.option("--labels", type=options.PATH, help="True labels (N,) of the new rows.")
@options.array_options("keys")
@options.image_map_option
@options.device_option
@options.csv_option
@options.json_option
def command(result: str, path: str, out: str, as_json: bool, **values: Any) -> None:
    """Label the rows of NEW_FEATURES with the mixture that `solve` wrote to RESULT.

    Each row is labelled by itself, from the mixture and the prior. After a solve with a prior or
    prior logits the new rows need theirs too. --out receives the files of `solve`, with fewer
    columns.

    \b
    Example:
      transclip-fast predict result more.npz --out more
    """
    if os.path.realpath(out) == os.path.realpath(result):
        raise InputError(f"{out}: is the result to predict from; name another folder")
    if results.is_result(path) and not results.is_result(result):
        raise InputError(f"{path}: is a result folder; the order is RESULT NEW_FEATURES")
    stages, device = session.Stages(), resolve_device(values["device"])
    with stages.time("load"), session.collected_warnings({}) as noted:
        solved, mixture, weights = _load_solved(result)
        arrays = {name: values[name] for name in ("prior", "prior_logits", "labels", "keys")}
        n_classes, dim = mixture.means.shape
        features = load_features(path, arrays, shots=0, n_classes=n_classes)
        check_encoder(result, solved["encoder"], features)
        map_features(features, image=values["image_map"])
        _check_map(features, solved, result)
        _check_class_names(features, solved, result, values["labels"])
        for name in UNUSED & features.arrays.keys():
            session.warn(noted, f"{features.origins[name]}: not used: predict labels every row")
        features.class_names = solved["class_names"]
    with (
        session.collected_warnings(features.origins) as messages,
        new_folder(out, results.CONTENTS) as folder,
    ):
        with session.errors_about(features.origins, features.path):
            rows = as_unit_rows(features.get("image_features"), "image_features", columns=dim)
            row_prior, zero_shot_prior = _priors(features, weights, len(rows), n_classes, device)
            truth = true_labels(features, n_classes)
            _check_memory(len(rows), n_classes, device)
        with stages.time("predict"):
            rows = rows.to(device)
            strengths = {name: _weight(solved, result, name) for name in WEIGHTS}
            costs = weights.get("class_costs")
            costs = None if costs is None else costs.to(device)
            found = predict(rows, mixture.to(device), row_prior, class_costs=costs, **strengths)
            distributions = torch.cat([*found]).cpu().numpy()
            zero_shot = zero_shot_prior.predict(rows)
        labels = distributions.argmax(1)
        for sign in [] if truth is None else check_class_order(zero_shot[0], truth):
            session.warn(messages, sign)
        run = run_summary("predict", features, labels, zero_shot[0], truth, (n_classes, dim))
        run |= {"device": str(device), "config": solved["config"]}
        run["features"] = options.path_from(out, features.path)
        run |= {"seconds": stages.seconds, "warnings": [*noted, *messages]}
        tensors = {"means": mixture.means, "variances": mixture.variances, **weights}
        tables = results.prediction_tables(distributions, zero_shot, features, truth)
        with writing(out):
            run = results.save_result(folder, tables, run, tensors, csv=values["csv"])
    session.print_summary(run, f"{_describe(run)}\n{describe_files(out)}", as_json)


def _load_solved(result: str) -> tuple[dict[str, Any], Mixture, dict[str, torch.Tensor]]:
    """run.json, mixture and weights of a result; InputError if these label no other rows."""
    solved = results.load_run(result)
    if (method := solved.get("method", results.TRANSCLIP)) != results.TRANSCLIP:
        raise InputError(
            f"{result}: was solved by {method}, which has no mixture to label other rows with; "
            f"name a result of {results.TRANSCLIP}"
        )
    return solved, *results.load_mixture(result)


def _check_memory(n_rows: int, n_classes: int, device: torch.device) -> None:
    """Raise InputError unless z (N, K) fits into memory twice: in blocks, and as a whole."""
    needed = 2 * 4 * n_rows * n_classes
    free = min(free_bytes(place) for place in (device, torch.device("cpu")))
    if needed > free:
        raise InputError(
            f"image_features: probabilities of {n_rows:,} rows and {n_classes:,} classes take "
            f"{show_bytes(needed)}, there are {show_bytes(free)}; predict fewer rows at a time"
        )


def _describe(run: dict[str, Any]) -> str:
    """The run.json of a prediction as text."""
    text = (
        f"{counted(run['n_queries'], 'image')} labelled one by one, without neighbours: labels may "
        f"differ from the result's\n{counted(run['n_flipped'], 'label')} changed from zero-shot"
    )
    if run["accuracy"] is not None:
        text += f"\n{describe_accuracy(run)}"
    return text


def _check_map(features: Features, solved: dict[str, Any], result: str) -> None:
    """Raise InputError unless the new rows went through the image map of the solved ones."""
    known = solved["maps"].get("image_map")
    if features.maps.get("image_map") != known:
        how = "with an image map; give the same" if known else "without an image map; leave out"
        raise InputError(f"{result}: was solved {how} --image-map")


def _check_class_names(
    features: Features, solved: dict[str, Any], result: str, labels: str | None
) -> None:
    """
    Raise InputError if the labels of the new rows are positions among other classes.

    Warn of other classes where nothing is said in them.
    """
    own, names = features.class_names, solved["class_names"]
    if not own or not names or (k := first_difference(own, names)) is None:
        return
    if labels is None and features.arrays.get("labels") is not None:
        raise InputError(
            f"{features.path}: its class {k} is not that of {result}; encode both with the same "
            "class names, or give --labels"
        )
    text = f"its class {k} is not that of {result}, whose classes are used"
    warnings.warn(f"{features.path}: {text}", stacklevel=2)


def _priors(
    features: Features,
    weights: dict[str, torch.Tensor],
    n_rows: int,
    n_classes: int,
    device: torch.device,
) -> tuple[Prior, Prior]:
    """The prior of the new rows, and the one whose labels count as zero-shot."""
    names = [name for name in ("prior", "prior_logits") if features.get(name) is not None]
    prior: Prior
    if "prior_weights" in weights:
        if names:
            raise InputError(
                f"{names[0]}: the result was solved with prototypes, not with a prior; leave it out"
            )
        prior = LinearPrior(weights["prior_weights"].to(device))
    elif len(names) != 1:
        raise InputError(
            "the result was solved with a prior: give one of --prior and --prior-logits for the "
            "new rows"
        )
    else:
        tables = features.get("prior"), features.get("prior_logits")
        prior = given_prior(*tables, rows=n_rows).to(device)
        if prior.n_classes != n_classes:
            raise InputError(f"{names[0]}: has {prior.n_classes} classes, the result {n_classes}")
    zero_shot = weights.get("zero_shot_weights")
    return prior, prior if zero_shot is None else LinearPrior(zero_shot.to(device))


def _weight(solved: dict[str, Any], result: str, name: str) -> float:
    if type(solved["config"].get(name)) not in (int, float):
        raise InputError(f"{result}: run.json has no {name}; solve again")
    return float(value_of(solved["config"], name, float, f"{result}/run.json", minimum=0))
