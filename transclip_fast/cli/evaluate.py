"""`transclip-fast evaluate`: a result against the true labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import click

from transclip_fast.cli import common
from transclip_fast.data.checks import as_labels
from transclip_fast.errors import InputError
from transclip_fast.metrics import Evaluation, evaluate
from transclip_fast.store.arrays import read_array
from transclip_fast.store.results import load_result

SHOWN = 5


@click.command("evaluate")
@click.argument("result", type=click.Path())
@click.option("--labels", type=click.Path(), help="True labels (N,), where the result has none.")
@common.json_option
def command(result: str, labels: str | None, as_json: bool) -> None:
    """Compare the labels in RESULT with the truth: accuracy, what changed, the worst classes.

    \b
    Example:
      transclip-fast evaluate result --labels labels.npy
    """
    scores, name = evaluate_result(result, labels)
    for message in scores.warnings:
        common.warn([], message)
    common.summarise(asdict(scores), text(scores, name), as_json)


def evaluate_result(
    result: str, labels: str | None = None
) -> tuple[Evaluation, Callable[[int], str]]:
    """The evaluation of a result folder, and the name of each class."""
    loaded = load_result(result)
    n_classes, names = loaded.run["n_classes"], loaded.run["class_names"]
    predicted = loaded.labels("label")
    if labels is not None:
        truth = as_labels(
            read_array(labels, "labels"), labels, rows=len(predicted), n_classes=n_classes
        ).numpy()
    elif "true_label" in loaded.predictions.column_names:
        truth = loaded.labels("true_label")
    else:
        raise InputError(f"{result}: was solved without labels; give --labels")
    scores = evaluate(predicted, loaded.labels("zero_shot_label"), truth)
    return scores, lambda k: str(names[k]) if names else f"class {k}"


def text(scores: Evaluation, name: Callable[[int], str]) -> str:
    """An evaluation for a reader."""
    lines = [
        f"{scores.n_queries:,} images",
        f"accuracy {scores.zero_shot_accuracy:.2f} % zero-shot -> {scores.accuracy:.2f} %, "
        f"mean over classes {scores.mean_class_accuracy:.2f} %",
        f"{scores.n_flipped:,} labels changed: {scores.corrected:,} corrected, "
        f"{scores.broken:,} broken",
        "",
        "worst classes           images  zero-shot  transductive",
    ]
    for k, rows, before, after in scores.per_class[:SHOWN]:
        lines.append(f"  {name(k):20.20}  {rows:7,}  {before:7.2f} %     {after:7.2f} %")
    if scores.confusions:
        lines += ["", "most frequent errors    (true -> predicted)"]
    for true, predicted, rows in scores.confusions[:SHOWN]:
        lines.append(f"  {name(true)} -> {name(predicted)}: {rows:,}")
    return "\n".join(lines)
