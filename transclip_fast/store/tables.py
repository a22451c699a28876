"""Columns of .csv and .parquet files, by the names that people give them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa

from transclip_fast.data.labels import WHOLE
from transclip_fast.errors import InputError, reading
from transclip_fast.store.arrays import read_table

TABLE_SUFFIXES = (".csv", ".parquet")
# The names of columns, best first; case, spaces around them and a plural do not matter.
KEY, PATH, ROW, LABEL = ("key",), ("path",), ("row",), ("label",)
SEPARATORS = ";\t|"  # of values, in files that are called .csv
GUARDED = "=+-@\t\r'"  # starts of texts that a ' goes before


def read_columns(
    path: Path,
    wanted: Mapping[str, Sequence[str]],
    needed: str,
    *,
    exact: bool = False,
    n_rows: int = 0,
) -> tuple[dict[str, list[Any]], dict[str, pa.ChunkedArray]]:
    """
    Some columns of a table, and the others by their names in the file.

    Values of a .csv are texts without spaces around them, unless they are to be `exact`; its first
    line has the names. Decimals of a .parquet are numbers, NaN is None.

    Parameters
    ----------
    path : Path
        A .csv or .parquet file.
    wanted : mapping
        The names in the file of each column, best first.
    needed : str
        The column without which the file is of no use.
    n_rows : int
        Empty lines that end a .csv of one column are values up to this number of rows.

    Raises
    ------
    InputError
        A file that is missing, damaged or no table, a line of another length, or not the needed
        column; two columns of one name, of a .csv only if they are wanted.
    """
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise InputError(f"{path}: is no table that is read here; give a .csv or .parquet")
    with reading(path, failure := "cannot be read as a table"):
        csv_file = path.suffix.lower() == ".csv"
        table = _read_csv(path, exact, n_rows) if csv_file else read_table(path, failure=failure)
        chosen = {
            name: column
            for name, names in wanted.items()
            if (column := find_column(path, table.column_names, names)) is not None
        }
        found = {
            name: [*map(_plain_value, table.column(column).to_pylist())]
            for name, column in chosen.items()
        }
    if needed not in found:
        raise InputError(
            f"{path}: has no column {needed!r}, only {', '.join(table.column_names) or 'none'}; "
            f"{_remedy(table.column_names)}"
        )
    names = enumerate(table.column_names)
    others = {name: table.column(k) for k, name in names if name not in chosen.values()}
    return found, others


def find_column(path: Path, columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The column with the first of these names, or None."""
    stripped = [column.strip() for column in columns]
    plain = [_singular(column) for column in stripped]
    for name in names:
        for spellings, spelled in ((stripped, name), (plain, _singular(name))):
            found = [columns[k] for k, column in enumerate(spellings) if column == spelled]
            if len(found) > 1:
                listed = ", ".join(map(repr, found))
                raise InputError(f"{path}: has several columns {name!r} ({listed}); leave one")
            if found:
                return found[0]
    return None


def _remedy(columns: Sequence[str]) -> str:
    """What to do about a table without the column that is needed."""
    mark = next((mark for mark in SEPARATORS if len(columns) == 1 and mark in columns[0]), None)
    if mark is not None:
        return f"its values are separated by {mark!r}: write it with commas"
    return "the first line of a .csv has the columns' names"


def check_line_order(path: Path, others: Mapping[str, pa.ChunkedArray]) -> None:
    """
    Refuse lines that a column numbers in another order, as of a table that was shuffled or sorted.

    `others` are the columns that are not read; numbers start at 0, or at 1 as R's do.
    """
    for name, column in others.items():
        cells = [WHOLE.fullmatch(str(cell)) for cell in column.to_pylist()]
        numbers = [int(match[1]) for match in cells if match]
        orders = [[*range(first, first + len(cells))] for first in (0, 1)]
        if numbers not in orders and sorted(numbers) in orders:
            raise InputError(
                f"{path}: its column {name or 'without a name'} numbers the lines in another order "
                "than theirs; if that order counts, call it row and count from 0, else take it out"
            )


def not_read(columns: Iterable[str]) -> str:
    """Columns that are left out, in words."""
    return f"not read: {', '.join(name or 'one without a name' for name in columns)}"


def guarded(text: str) -> str:
    """A text as it is written into a cell; `unguarded` is its inverse."""
    return f"'{text}" if text.startswith(tuple(GUARDED)) else text


def unguarded(text: str) -> str:
    """The text that a cell holds; one without a guard is taken as it is."""
    return text[1:] if text[:1] == "'" and text[1:2] and text[1] in GUARDED else text


def _plain_value(value: Any) -> Any:
    """A decimal, as databases write numbers, as an int where it is whole; NaN as None."""
    if value != value:
        return None
    if not isinstance(value, Decimal):
        return value
    return int(value) if value == value.to_integral_value() else float(value)


def _singular(name: str) -> str:
    return name.casefold().removesuffix("s")


def _read_csv(path: Path, exact: bool, n_rows: int) -> pa.Table:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, skipinitialspace=not exact, strict=True)
        header = next(reader, [])
        rows = [(reader.line_num, row) for row in reader]
    while len(rows) > n_rows and not rows[-1][1]:
        rows.pop()
    columns: list[list[str]] = [[] for _ in header]
    for line, row in rows:
        if not row and len(header) > 1:  # an empty line; in a single column it is a value
            continue
        values = row or [""]
        if len(values) != len(header):
            raise InputError(
                f"{path}: line {line} has {len(values)} values, the first line {len(header)}; "
                "quote values that have commas"
            )
        for column, value in zip(columns, values, strict=True):
            column.append(value if exact else value.strip())
    return pa.Table.from_arrays([pa.array(column, pa.string()) for column in columns], header)
