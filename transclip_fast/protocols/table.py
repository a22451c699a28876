"""Rows of runs to a table: mean and deviation over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MEASURES = ("zero_shot_accuracy", "head_accuracy", "accuracy")
AVERAGE = "(average)"
BASE, NEW, HARMONIC = "base", "new", "harmonic mean"
HEADINGS = {
    "source": "trained on",
    "data": "data",
    "classes": "classes",
    "head": "head",
    "shots": "shots",
    "seeds": "seeds",
    "zero_shot_accuracy": "zero-shot",
    "head_accuracy": "head alone",
    "accuracy": "TransCLIP",
}


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    A row for each data set, head and number of shots, and their averages over data sets.

    Accuracies are means over seeds, and beside them the sample standard deviation over seeds, None
    for a single one. That of an average is the deviation of the seeds' averages. Base and new
    classes have a third row: the harmonic mean of what the two rows say, as papers have it, beside
    the deviation of the seeds' harmonic means.
    """
    groups = ("source", "data", "classes", "head", "shots")
    names = [name for name in groups if name in rows[0]]
    parts: dict[Key, Sequence[Mapping[str, Any]]] = {**_split(rows, names)}
    if len({row["data"] for row in rows}) > 1:
        over = [name for name in names if name != "data"]
        for others, part in _split(rows, over).items():
            seeds = [_average(of_seed) for of_seed in _split(part, ["seed"]).values()]
            average: Key = (("data", AVERAGE), *others)
            parts[average] = seeds
    found = []
    for key, of_group in parts.items():
        found.append(_group(of_group, key))
        if ("classes", NEW) in key:
            found.append(_harmonic(parts[_with(key, BASE)], of_group, _with(key, HARMONIC)))
    return [{name: row[name] for name in (*names, *row) if name in row} for row in found]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of `summarise` in Markdown, accuracies in percent."""
    columns = [name for name in HEADINGS if name in rows[0]]
    lines = [
        "| " + " | ".join(HEADINGS[name] for name in columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row, name) for name in columns) + " |")
    return "\n".join(lines) + "\n"


Key = tuple[tuple[str, Any], ...]


def _split(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[Key, list[Mapping[str, Any]]]:
    """Rows by the values of some columns, in order of appearance."""
    parts: dict[Key, list[Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault(tuple((name, row[name]) for name in names), []).append(row)
    return parts


def _group(rows: Sequence[Mapping[str, Any]], key: Key) -> dict[str, Any]:
    group: dict[str, Any] = {**dict(key), "seeds": len(rows)}
    for name in MEASURES:
        values = [row[name] for row in rows]
        known = None not in values
        group[name] = round(float(np.mean(values)), 4) if known else None
        several = known and len(values) > 1
        group[f"{name}_std"] = round(float(np.std(values, ddof=1)), 4) if several else None
    return group


def _harmonic(
    base: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], key: Key
) -> dict[str, Any]:
    """The harmonic mean of two rows of the table, from what is behind them."""
    seeds = [_harmonic_mean(*pair) for pair in zip(base, new, strict=True)]
    of_means = _harmonic_mean(_group(base, key), _group(new, key))
    rounded = {name: mean and round(mean, 4) for name, mean in of_means.items()}
    return {**_group(seeds, key), **rounded}


def _harmonic_mean(base: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in MEASURES:
        a, b = base[name], new[name]
        found[name] = None if a is None or b is None else 2 * a * b / (a + b) if a + b else 0.0
    return found


def _with(key: Key, classes: str) -> Key:
    return tuple((name, classes if name == "classes" else value) for name, value in key)


def _average(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the data sets of one seed."""
    values = {name: [row[name] for row in rows] for name in MEASURES}
    return {
        name: None if None in column else float(np.mean(column)) for name, column in values.items()
    }


def _cell(row: Mapping[str, Any], name: str) -> str:
    if name not in MEASURES:
        return str(row[name])
    if row[name] is None:
        return ""
    deviation = row[f"{name}_std"]
    return f"{row[name]:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")
