"""Tables of a protocol: means and deviations over seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

Row = Mapping[str, Any]

KEYS = ("source", "data", "classes", "head", "shots")  # columns that identify a row
MEASURES = ("zero_shot_accuracy", "head_accuracy", "accuracy")
AVERAGE = "(average)"
BASE, NEW, HARMONIC = "base", "new", "harmonic mean"
HEADINGS = {  # of the columns that have others than their names
    "source": "trained on",
    "zero_shot_accuracy": "zero-shot",
    "head_accuracy": "head alone",
    "accuracy": "TransCLIP",
}
# A missing value makes the mean and the deviation missing.
MEAN = ("mean", pc.ScalarAggregateOptions(skip_nulls=False))
DEVIATION = ("stddev", pc.VarianceOptions(ddof=1, skip_nulls=False))  # missing for one seed


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """
    A row for each data set, head and number of shots, and their averages over data sets.

    Accuracies are means over seeds; beside each is the sample standard deviation over seeds, None
    for a single seed. An average has the deviation of the seeds' averages. Base and new classes
    get a third row: the harmonic mean of the two rows, as in papers, with the deviation of the
    seeds' harmonic means.
    """
    keys = [name for name in KEYS if name in rows[0]]
    seeds = list(_with_harmonic_means([*rows, *_averages(rows, keys)], keys))
    statistics = [(name, *kind) for name in MEASURES for kind in (MEAN, DEVIATION)]
    found: list[dict[str, Any]] = []
    for group in _aggregate(seeds, keys, [*statistics, ("seed", "count", pc.CountOptions("all"))]):
        row = {**{name: group[name] for name in keys}, "seeds": group["seed_count"]}
        for name in MEASURES:
            row[name] = _rounded(group[f"{name}_mean"])
            row[f"{name}_std"] = _rounded(group[f"{name}_stddev"])
        if row.get("classes") == HARMONIC:  # its base and new classes are the last two rows
            row |= {name: _rounded(mean) for name, mean in _harmonic_mean(*found[-2:]).items()}
        found.append(row)
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The table of `summarise` in Markdown, accuracies in percent."""
    columns = [name for name in (*KEYS, "seeds", *MEASURES) if name in rows[0]]
    lines = [[HEADINGS.get(name, name) for name in columns]]
    lines += [[_cell(row, name) for name in columns] for row in rows]
    text = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([text[0], "|" + "---|" * len(columns), *text[1:]]) + "\n"


def _aggregate(
    rows: Sequence[Row], keys: Sequence[str], statistics: Sequence[tuple[Any, ...]]
) -> list[dict[str, Any]]:
    """Groups of rows with equal keys, in order of appearance."""
    kinds = dict.fromkeys((*KEYS, "seed"), pa.string()) | dict.fromkeys(MEASURES, pa.float64())
    kinds |= {"shots": pa.int64(), "seed": pa.int64()}
    present = [(name, kind) for name, kind in kinds.items() if name in rows[0]]
    table = pa.Table.from_pylist(list(rows), schema=pa.schema(present))
    table = table.append_column("row", pa.array(range(len(rows))))
    grouped = table.group_by(list(keys)).aggregate([*statistics, ("row", "min")])
    groups: list[dict[str, Any]] = grouped.sort_by("row_min").to_pylist()
    return groups


def _averages(rows: Sequence[Row], keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Means over the data sets for each seed, if there are several data sets."""
    if len({row["data"] for row in rows}) > 1:
        over = [*(name for name in keys if name != "data"), "seed"]
        for group in _aggregate(rows, over, [(name, *MEAN) for name in MEASURES]):
            means = {name: group[f"{name}_mean"] for name in MEASURES}
            yield {"data": AVERAGE, **{name: group[name] for name in over}, **means}


def _with_harmonic_means(rows: Sequence[Row], keys: Sequence[str]) -> Iterator[Row]:
    """The rows, and after each of new classes its harmonic mean with that of base classes."""
    bases = {}
    for row in rows:
        yield row
        same = tuple(row[name] for name in (*keys, "seed") if name != "classes")
        if row.get("classes") == BASE:
            bases[same] = row
        elif row.get("classes") == NEW:
            yield {**row, "classes": HARMONIC, **_harmonic_mean(bases[same], row)}


def _harmonic_mean(base: Row, new: Row) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in MEASURES:
        a, b = base[name], new[name]
        found[name] = None if a is None or b is None else 2 * a * b / (a + b) if a + b else 0.0
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _cell(row: Row, name: str) -> str:
    if name not in MEASURES:
        return str(row[name])
    if row[name] is None:
        return ""
    deviation = row[f"{name}_std"]
    return f"{row[name]:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")
