"""`transclip-fast evaluate`: a result against the true labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import click
import numpy as np

from transclip_fast.cli import options, session
from transclip_fast.cli.session import counted
from transclip_fast.data.checks import as_labels
from transclip_fast.errors import InputError
from transclip_fast.metrics import Evaluation, evaluate
from transclip_fast.store.labels import as_positions, read_labels
from transclip_fast.store.results import Result, load_result

SHOWN_ROWS = 5  # of each table


@click.command("evaluate")
@click.argument("result", type=options.PATH)
@click.option(
    "--labels",
    type=options.PATH,
    help="True labels (N,), if the result has none: positions or "
    "names in a .npy, .csv, .txt or .parquet; a column key or path tells the rows.",
)
@options.json_option
def command(result: str, labels: str | None, as_json: bool) -> None:
    """Compare the labels in RESULT with the truth: accuracy, changed labels, the worst classes.

    \b
    Example:
      transclip-fast evaluate result --labels labels.npy
    """
    with session.collected_warnings({}):
        scores, class_name = evaluate_result(result, labels)
    for message in scores.warnings:
        session.warn([], message)
    session.print_summary(asdict(scores), describe_evaluation(scores, class_name), as_json)


def evaluate_result(
    result: str, labels: str | None = None
) -> tuple[Evaluation, Callable[[int], str]]:
    """The evaluation of a result folder, and the name of each class."""
    loaded = load_result(result)
    names = loaded.run["class_names"]
    predicted = loaded.labels("label")
    if labels is not None:
        truth = _given_labels(loaded, labels)
    elif "true_label" in loaded.predictions.column_names:
        truth = loaded.labels("true_label")
    else:
        raise InputError(f"{result}: was solved without labels; give --labels")
    scores = evaluate(predicted, loaded.labels("zero_shot_label"), truth)
    return scores, lambda k: str(names[k]) if names else f"class {k}"


def _given_labels(result: Result, file: str) -> np.ndarray:
    """The labels (N,) int64 in a file, -1 where it has none."""
    table, run = result.predictions, result.run
    keys = table.column("key").to_pylist() if "key" in table.column_names else None
    given = as_positions(read_labels(file, "labels", keys), run["class_names"], file)
    truth = as_labels(given, file, rows=table.num_rows, n_classes=run["n_classes"], lowest=-1)
    if (truth < 0).all():
        raise InputError(f"{file}: no row has a label")
    return truth.numpy()


def describe_evaluation(scores: Evaluation, class_name: Callable[[int], str]) -> str:
    """An evaluation as text."""
    lines = [
        counted(scores.n_queries, "image")
        + (
            ""
            if scores.n_labelled == scores.n_queries
            else f", {scores.n_labelled:,} of them with a true label"
        ),
        f"accuracy {scores.zero_shot_accuracy:.2f} % zero-shot -> {scores.accuracy:.2f} %, "
        f"mean over classes {scores.mean_class_accuracy:.2f} %",
        f"{counted(scores.n_flipped, 'label')} changed: {scores.corrected:,} corrected, "
        f"{scores.broken:,} broken",
        "",
        "worst classes           images  zero-shot  transductive",
    ]
    for k, rows, before, after in scores.per_class[:SHOWN_ROWS]:
        lines.append(f"  {class_name(k):20.20}  {rows:7,}  {before:7.2f} %     {after:7.2f} %")
    if scores.confusions:
        lines += ["", "most frequent errors    (true -> predicted)"]
    for true, predicted, rows in scores.confusions[:SHOWN_ROWS]:
        lines.append(f"  {class_name(true)} -> {class_name(predicted)}: {rows:,}")
    return "\n".join(lines)
