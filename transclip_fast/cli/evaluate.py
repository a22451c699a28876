"""`transclip-fast evaluate`: a result against the true labels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import click
import numpy as np

from transclip_fast.cli import options, session
from transclip_fast.cli.session import counted
from transclip_fast.cli.summary import describe_others, of_others
from transclip_fast.data.checks import as_labels
from transclip_fast.data.names import class_name
from transclip_fast.errors import InputError
from transclip_fast.metrics import Evaluation, evaluate
from transclip_fast.store.json_text import value_of
from transclip_fast.store.labels import as_positions, read_labels, warn_of_numbers
from transclip_fast.store.results import Result, load_result

SHOWN_ROWS = 5  # of each table


@click.command("evaluate")
@click.argument("result", type=options.PATH)
@click.option(
    "--labels",
    type=options.PATH,
    help="True labels (N,): positions or names in a .npy, .csv, .txt or .parquet; a column key, "
    "path or row tells the rows.  [default: those of the result]",
)
@options.json_option
def command(result: str, labels: str | None, as_json: bool) -> None:
    """Compare the labels in RESULT with the truth: accuracy, changed labels, the worst classes.

    --json also has the modality gap that `solve` found in the features: the distance of the mean
    image from the mean class text, and their cosine.

    \b
    Example:
      transclip-fast evaluate result --labels labels.npy
    """
    with session.collected_warnings({}) as warnings:
        found = evaluate_result(result, labels)
    for message in found.scores.warnings:
        session.warn(warnings, message)
    summary = asdict(found.scores) | {"modality_gap": found.gap, "known_labels": found.others}
    summary["warnings"] = warnings
    session.print_summary(summary, describe_evaluation(found), as_json)


@dataclass(frozen=True)
class Evaluated:
    """The evaluation of a result."""

    scores: Evaluation
    class_names: list[str] | None
    gap: dict[str, float | None] | None  # the `modality_gap` of run.json
    others: dict[str, Any] | None  # how many rows were labelled by hand, and accuracy of the others


def evaluate_result(result: str, labels: str | None = None) -> Evaluated:
    """The evaluation of a result folder."""
    loaded = load_result(result)
    predicted = loaded.labels("label")
    if labels is not None:
        truth = _given_labels(loaded, labels)
    elif "true_label" in loaded.predictions.column_names:
        truth = loaded.labels("true_label")
    else:
        raise InputError(f"{result}: was solved without labels; give --labels")
    before, known = loaded.labels("zero_shot_label"), loaded.flags("known")
    scores = evaluate(predicted, before, truth)
    others = of_others("known", known, predicted, before, truth) if known.any() else None
    return Evaluated(scores, loaded.run["class_names"], _modality_gap(loaded), others)


def _modality_gap(result: Result) -> dict[str, float | None] | None:
    """The `modality_gap` of run.json; earlier results have none."""
    gap, file = result.run.get("modality_gap"), result.folder / "run.json"
    if gap is None:
        return None
    gap = value_of(result.run, "modality_gap", dict, file)
    return {
        "distance": value_of(gap, "distance", float, file),
        "cosine": value_of(gap, "cosine", (float, type(None)), file),  # a mean of zero has none
    }


def _given_labels(result: Result, file: str) -> np.ndarray:
    """The labels (N,) int64 in a file, -1 where it has none."""
    table, run = result.predictions, result.run
    keys = table.column("key").to_pylist() if "key" in table.column_names else None
    labels = read_labels(file, "labels", keys, table.num_rows)
    warn_of_numbers(labels, run["class_names"], file)
    given = as_positions(labels, run["class_names"], file)
    truth = as_labels(given, file, rows=table.num_rows, n_classes=run["n_classes"], lowest=-1)
    if (truth < 0).all():
        raise InputError(f"{file}: no row has a label")
    return truth.numpy()


def describe_evaluation(found: Evaluated) -> str:
    """An evaluation as text."""
    scores, names = found.scores, found.class_names
    images = counted(scores.n_queries, "image")
    if scores.n_labelled < scores.n_queries:
        images += f", {scores.n_labelled:,} of them with a true label"
    lines = [
        images,
        f"accuracy {scores.zero_shot_accuracy:.2f} % zero-shot -> {scores.accuracy:.2f} %, "
        f"mean over classes {scores.mean_class_accuracy:.2f} %",
        f"{counted(scores.n_flipped, 'label')} changed: {scores.corrected:,} corrected, "
        f"{scores.broken:,} broken",
    ]
    if found.others is not None:
        lines.insert(2, describe_others("known", found.others))
    lines += ["", "worst classes           images  zero-shot  transductive"]
    for k, rows, before, after in scores.per_class[:SHOWN_ROWS]:
        lines.append(
            f"  {class_name(k, names):20.20}  {rows:7,}  {before:7.2f} %     {after:7.2f} %"
        )
    if scores.confusions:
        lines += ["", "most frequent errors    (true -> predicted)"]
    for true, predicted, rows in scores.confusions[:SHOWN_ROWS]:
        lines.append(f"  {class_name(true, names)} -> {class_name(predicted, names)}: {rows:,}")
    return "\n".join(lines)
