"""The tables of `bench.accuracy.rivals` and `bench.speed.methods`."""

from __future__ import annotations

import statistics as stats
from collections.abc import Callable
from pathlib import Path

from bench.accuracy.rivals import (
    SETS,
    SHOTS,
    TRANSCLIP,
    WITH_TEXT,
    WITHOUT_TEXT,
    ZERO_SHOT,
    Arm,
    settings,
)
from bench.tables import Row, newest, seconds, size, source, spread, table

NOTHING = "Not recorded yet: `python -m bench.accuracy.rivals`."
Found = dict[tuple[str, str], Row]  # the line of a family and a setting
Columns = dict[str, list[Row]]  # the lines whose mean a column is of


def recorded(folder: Path) -> Found:
    """Return the newest line of each setting, in the order in which they are measured; or none."""
    rows = {
        (row["family"], row["setting"]): row
        for row in newest("rivals", "family", "setting", folder=folder)
    }
    return {key: rows[key] for key in settings()} if rows.keys() >= settings().keys() else {}


def of_arms(row: Row) -> dict[Arm, Row]:
    """Return what each method found in a line."""
    return {Arm(found["method"], found["text"]): found for found in row["methods"]}


def columns(found: Found) -> Columns:
    """Return the columns of the short table."""
    columns = {name: [row] for (family, name), row in found.items() if family == ZERO_SHOT}
    for family, what in ((WITH_TEXT, " and text"), (WITHOUT_TEXT, "")):
        for shots in SHOTS:
            title = f"{shots} shot{'s' * (shots > 1)}{what}"
            names = [f"{name}, {shots}" for name in SETS] if not what else [f"{shots}"]
            columns[title] = [found[family, name] for name in names]
    return columns


def means(rows: list[Row]) -> dict[str, float]:
    """
    Return the accuracy of each method that ran in all lines: the mean of their means.

    Of a method that learns from shots alone, and from both shots and text, the better one.
    """
    by_line, found = [of_arms(row) for row in rows], dict[str, float]()
    for arm in by_line[0]:
        if all(arm in line for line in by_line):
            mean = stats.mean(stats.mean(line[arm]["accuracy"]) for line in by_line)
            found[arm.method] = max(mean, found.get(arm.method, mean))
    return found


def tried(rows: list[Row]) -> str:
    """Return the settings tried of a method, the most of some lines of it."""
    return f"{max(max(row['runs']) for row in rows):,}"


def assumed(rows: list[Row]) -> str:
    """Return what a method assumes."""
    return "equal classes" if any(any(row["assumes_balanced"]) for row in rows) else ""


def short(folder: Path) -> str:
    """Tabulate each method in all settings; the best of a column is bold."""
    found = recorded(folder)
    if not found:
        return NOTHING
    by_column = {title: means(rows) for title, rows in columns(found).items()}
    names = list(dict.fromkeys(name for column in by_column.values() for name in column))
    names.sort(key=lambda name: not name.startswith(TRANSCLIP))
    lines = []
    for name in names:
        own = [x for row in found.values() for x in row["methods"] if x["method"] == name]
        cells = [_cell(column, name) for column in by_column.values()]
        lines.append([name, tried(own), assumed(own), *cells])
    head = ["method", "settings tried", "assumes", *by_column]
    return "\n\n".join([table(head, lines), source(list(found.values()))])


def _cell(column: dict[str, float], name: str) -> str:
    if name not in column:
        return ""
    text = f"{column[name]:.1f}"
    return f"**{text}**" if column[name] == max(column.values()) else text


def lost(folder: Path) -> str:
    """Name the settings in which another method is ahead of TransCLIP."""
    found = recorded(folder)
    if not found:
        return NOTHING
    behind, in_all = [], columns(found)
    for title, rows in in_all.items():
        accuracies = means(rows)
        others = {k: v for k, v in accuracies.items() if not k.startswith(TRANSCLIP)}
        best = max(others, key=others.__getitem__)
        if others[best] > accuracies[TRANSCLIP]:
            ours = f"{accuracies[TRANSCLIP]:.1f}"
            behind.append(f"{title} ({best} {others[best]:.1f}, TransCLIP {ours})")
    where = f"In {len(behind)} of {len(in_all)} settings measured another method is ahead"
    return f"{where}: {'; '.join(behind)}." if behind else f"{where}."


def every(folder: Path) -> str:
    """Tabulate every method in every setting, family by family."""
    found = recorded(folder)
    if not found:
        return NOTHING
    parts = [
        "Mean accuracy in percent; in brackets the worst change against zero-shot of a draw, in "
        "points.",
        _family(found, ZERO_SHOT, _beside_zero_shot),
        _family(found, WITH_TEXT, _beside_zero_shot),
        "Mean and deviation of three draws.",
        _family(found, WITHOUT_TEXT, lambda _, row: spread(row["accuracy"])),
    ]
    return "\n\n".join([*parts, source(list(found.values()))])


def _beside_zero_shot(line: Row, row: Row) -> str:
    """The mean accuracy of a method in a line, and its worst draw against zero-shot."""
    before = of_arms(line)[Arm("zero-shot", "texts")]["accuracy"]
    worst = min(a - b for a, b in zip(row["accuracy"], before, strict=True))
    return f"{stats.mean(row['accuracy']):.2f} ({worst:+.1f})"


def _family(found: Found, family: str, cell: Callable[[Row, Row], str]) -> str:
    """The table of a family."""
    lines = {name: row for (own, name), row in found.items() if own == family}
    arms = {name: of_arms(row) for name, row in lines.items()}
    cells = []
    for arm in next(iter(arms.values())):
        rows = [of[arm] for of in arms.values()]
        shown = [cell(lines[name], of[arm]) for name, of in arms.items()]
        cells.append([arm.method, arm.text, tried(rows), assumed(rows), *shown])
    return table([family, "learns from", "settings tried", "assumes", *lines], cells)


def costs(folder: Path) -> str:
    """Tabulate time and memory of methods on many rows."""
    rows = newest("methods", "queries", "classes", "dim", folder=folder)
    if not rows:
        return "Not recorded yet: `python -m bench.speed.methods`."
    cells = [
        [
            *(f"{line[x]:,}" for x in ("queries", "classes", "dim")),
            row["method"],
            row["text"],
            seconds(row["seconds"]),
            size(row["peak_bytes"]),
            f"{row['accuracy']:.1f}",
        ]
        for line in rows
        for row in line["rows"]
    ]
    head = ["N", "K", "d", "method", "learns from", "time", "peak of the process", "accuracy"]
    return table(head, cells) + "\n\n" + source(rows)


BLOCKS = {"method-costs": costs, "rivals": short, "rivals-lost": lost, "rivals-settings": every}
