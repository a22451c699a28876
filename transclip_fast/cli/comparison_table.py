"""The rows of a comparison of methods, kept as they come, and their table."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transclip_fast.cli import session
from transclip_fast.cli.session import counted
from transclip_fast.cli.summary import describe_sizes
from transclip_fast.errors import InputError
from transclip_fast.memory import show_bytes
from transclip_fast.store.atomic import beside, read_json, write_json, writing, written_file
from transclip_fast.store.json_text import parse_json
from transclip_fast.whole_files import check_replaced, new_file

HEADINGS = (
    "method",
    "text",
    "accuracy",
    "changed",
    "time",
    "peak memory",
    "settings chosen",
    "runs",
    "assumes",
)
FIRST = [*HEADINGS[:2]]  # words of a table
SUFFIXES = (".md", ".json", ".txt")
KIND = "compare"  # of a table in JSON


class KeptTable:
    """
    The rows of a comparison by method, in a hidden file beside its table; in memory without one.

    Rows of other input or options, which `identity` has, are not used.
    """

    def __init__(self, out: str | None, identity: Mapping[str, Any], warnings: list[str]) -> None:
        self._out, self._identity = out, dict(identity)
        self._file = None if out is None else beside(out, "compare.json")
        self.rows: dict[str, dict[str, Any]] = {}
        if self._file is None or not self._file.exists():
            return
        with suppress(InputError, KeyError, TypeError, ValueError, AttributeError):  # damaged
            state = read_json(self._file)
            rows = state.get("rows")
            if state.get("identity") == self._identity and isinstance(rows, dict):
                for row in rows.values():
                    cells(row)
                self.rows = rows
                return
        session.warn(
            warnings,
            f"{self._file}: was made with other input or options, or is damaged; begins anew",
        )

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keep the row of a method."""
        self.rows[name] = row
        if self._file is not None and self._out is not None:
            with writing(self._out), new_file(self._file) as partial:
                rows = dict(sorted(self.rows.items()))  # in whatever order they came
                write_json(partial, {"identity": self._identity, "rows": rows})


def cells(row: Mapping[str, Any]) -> list[str]:
    """The row of a method as text, in the order of HEADINGS."""
    accuracy, changed, peak = row["accuracy"], row["changed"], row["peak_bytes"]
    settings = ", ".join(f"{name} {value:g}" for name, value in row["searched"].items())
    return [
        row["method"],
        row["anchors"],
        "" if accuracy is None else f"{accuracy:.2f} %",
        "" if changed is None else f"{changed:,}",
        f"{row['seconds']:.1f} s",
        "" if peak is None else show_bytes(peak),
        settings or "as published",
        f"{row['runs']:,}",
        "equal classes" if row["assumes_balanced"] else "",
    ]


def notes(summary: Mapping[str, Any]) -> list[str]:
    """The sizes of a comparison, and the methods that were not run."""
    lines = [
        f"{describe_sizes(summary)}, {counted(summary['n_shots'], 'shot')}, "
        f"{counted(summary['n_validation'], 'validation row')}",
    ]
    if not summary["n_labelled"]:
        lines.append("no accuracy, as no image has a true label: give --labels")
    lines += [f"not run: {reason}" for reason in summary["not_run"].values()]
    return [*lines, "choose a method by labelled images that you do not report on"]


def as_text(summary: dict[str, Any]) -> str:
    """A comparison for a terminal."""
    table = [list(HEADINGS), *(cells(row) for row in summary["rows"])]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
    return "\n".join([*lines, "", *notes(summary)])


def as_markdown(summary: dict[str, Any]) -> str:
    """A comparison in Markdown."""
    table = [list(HEADINGS), ["---"] * len(HEADINGS), *(cells(row) for row in summary["rows"])]
    lines = ["| " + " | ".join(line) + " |" for line in table]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(summary))])


def check_place(out: str) -> None:
    """Raise InputError if a table cannot have this name, or would replace another file."""
    if Path(out).suffix not in SUFFIXES:
        raise InputError(f"{out}: name a file that ends in {', '.join(SUFFIXES)}")
    check_replaced(out, "table of `compare`", _is_table)


def _is_table(file: Path) -> bool:
    """Whether a file is a comparison in the format of its suffix."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".json":
        return text.replace("|", " ").split()[: len(FIRST)] == FIRST
    found = parse_json(text)
    return isinstance(found, dict) and found.get("kind") == KIND


def write_table(out: str, summary: dict[str, Any]) -> None:
    """Write a comparison in the format of the file's suffix."""
    suffix = Path(out).suffix
    with written_file(out) as partial:
        if suffix == ".json":
            write_json(partial, summary)
        else:
            text = as_markdown(summary) if suffix == ".md" else as_text(summary)
            partial.write_text(f"{text}\n", encoding="utf-8")
