"""`transclip-fast suggest`: which images to correct first."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import click

from transclip_fast.cli import options, session
from transclip_fast.cli.session import command_line, counted
from transclip_fast.data.names import positions
from transclip_fast.errors import InputError, reading
from transclip_fast.report.gallery import suggested_rows
from transclip_fast.report.view import View
from transclip_fast.store.atomic import writing
from transclip_fast.store.results import load_result
from transclip_fast.store.tables import guarded
from transclip_fast.whole_files import new_file

HEAD = ["label", "now", "zero-shot"]  # of the table, behind the column that names the row
SHOWN = (  # columns of the predictions
    *("row", "key", "label", "label_name"),
    *("zero_shot_label", "zero_shot_label_name", "confidence", "calibrated_confidence"),
)


@click.command("suggest")
@click.argument("result", type=options.PATH)
@click.option(
    "-n", "number", default=30, type=options.POSITIVE, help="Images, the most helpful first."
)
@click.option(
    "--csv",
    "table",
    type=options.PATH,
    help="Also write a table of them with an empty column label, for `solve --corrections`.",
)
@options.json_option
def command(result: str, number: int, table: str | None, as_json: bool) -> None:
    """List the images of RESULT whose correction helps most.

    They have the smallest confidence: the solution itself wavers there. Correcting those of the
    smallest calibrated confidence, the percentage that is printed, gains less. The page of `report`
    shows the same images first.

    \b
    Examples:
      transclip-fast suggest result -n 30
      transclip-fast suggest result --csv to_check.csv
    """
    loaded = load_result(result, (*SHOWN, "known"))
    rows = loaded.predictions.select([name for name in SHOWN if loaded.has(name)])
    found = rows.take(suggested_rows(loaded, number)).to_pylist()
    names = loaded.run["class_names"] or [str(k) for k in range(loaded.run["n_classes"])]
    for row in found:  # results of earlier versions have no names of zero-shot's labels
        row.setdefault("zero_shot_label_name", names[row["zero_shot_label"]])
    if not found:
        raise InputError(f"{result}: the class of every image was given; there is none to correct")
    lines = [
        f"{_shown(row['key'] or str(row['row']))}: {_shown(row['label_name'])} "
        f"({100 * row.get('calibrated_confidence', row['confidence']):.0f} %), zero-shot "
        f"{_shown(row['zero_shot_label_name'])}"
        for row in found
    ]
    if table is not None:
        rows_of = positions(loaded.predictions.column("key").to_pylist())
        by_key = all(row["key"] is not None and rows_of[row["key"]] is not None for row in found)
        _write(Path(table), found, "key" if by_key else "row")
        unnamed = ["solve", "FEATURES", "--corrections", table, "--out", "result2"]
        line = command_line(*(View(loaded).solve_again(table) or unnamed))
        lines.append(f"{counted(len(found), 'image')} to label in {table}; then {line}")
    session.print_summary({"suggested": found}, "\n".join(lines), as_json)


def _shown(text: str) -> str:
    """A text in one line, in which nothing is hidden."""
    return text if text.isprintable() else repr(text)


def _write(path: Path, found: list[dict[str, Any]], name: str) -> None:
    """A table to fill in; the column `name` tells the rows."""
    _check_place(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with (
        writing(path),
        new_file(path) as partial,
        open(partial, "w", newline="", encoding="utf-8") as file,
    ):
        lines = csv.writer(file)
        lines.writerow([name, *HEAD])
        for row in found:
            cells = (row[name], "", row["label_name"], row["zero_shot_label_name"])
            lines.writerow([guarded(str(cell)) for cell in cells])


def _check_place(path: Path) -> None:
    """InputError if another file would be replaced, or for a name that no table has."""
    if path.is_file():
        _check_replaced(path)
    if path.suffix.lower() != ".csv":
        raise InputError(f"{path}: name a file that ends in .csv, as `solve --corrections` reads")


def _check_replaced(path: Path) -> None:
    """InputError for a file of another kind, or labels that were filled in."""
    with (
        reading(path, "is no table of `suggest`", "name another file"),
        open(path, newline="", encoding="utf-8-sig") as file,
    ):
        head, *lines = [*csv.reader(file)] or [[]]
    if head[1:] != HEAD:
        raise InputError(f"{path}: exists and is no table of `suggest`; name another file")
    if any(line[1:2] not in ([], [""]) for line in lines):
        raise InputError(f"{path}: has labels that were filled in; name another file")
