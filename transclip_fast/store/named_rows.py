"""Which rows of the features the lines of a table name: by key, by number, or by both."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transclip_fast.data.labels import WHOLE
from transclip_fast.data.names import positions
from transclip_fast.errors import InputError
from transclip_fast.store.tables import KEY, PATH, ROW, unguarded

COLUMNS = {"key": (*KEY, *PATH), "row": ROW}
OF_PREDICTIONS = "label_name"  # a column beside the label, which is a number there


def has_keys(keys: Sequence[str | None] | None) -> bool:
    """Whether any of these is a key: None and "" are none."""
    return keys is not None and any(key is not None and str(key) != "" for key in keys)


def check_no_predictions(path: Path, columns: Collection[str], meaning: str) -> None:
    """
    Refuse predictions where single rows are expected, which count as `meaning`.

    Edits are most likely in the names, which are not read.
    """
    if OF_PREDICTIONS in columns:
        raise InputError(
            f"{path}: has a column {OF_PREDICTIONS!r}, as predictions do: all its rows would count "
            f"as {meaning}; keep those that are, with a key and the name of the class as label"
        )


def rows_of_lines(
    path: Path,
    columns: Mapping[str, Sequence[Any]],
    keys: Sequence[str | None] | None,
    n_rows: int,
) -> list[int | None]:
    """
    The row (of `n_rows`) that each line names, None where its key is no row's.

    `columns` are those of `COLUMNS` that the table has, at least one. A number in `row` names the
    row; a key beside it must be the row's. A `key` alone names the row that has it, in any Unicode
    form; where rows have no keys it must be a row's number.

    Raises
    ------
    InputError
        A number that is no row's, a key that several rows have, or one that contradicts its number.
    """
    if "row" in columns:
        rows = [_row_number(path, cell, n_rows) for cell in columns["row"]]
        _check_keys(path, rows, columns.get("key"), keys)
        return [*rows]
    if keys is None or not has_keys(keys):
        return [_row_number(path, cell, n_rows) for cell in columns["key"]]
    exact, plain = positions(keys), positions(key and _plain_key(key) for key in keys)
    found: list[int | None] = []
    for cell in columns["key"]:
        key = str(cell)
        places, text = (exact, key) if key in exact else (plain, _plain_key(key))
        row = places.get(text)
        if row is None and text in places:
            raise InputError(
                f"{path}: {key!r} is the key of several rows; name a row by its number, in a "
                "column row"
            )
        found.append(row)
    return found


def _check_keys(
    path: Path,
    rows: Sequence[int],
    named: Sequence[Any] | None,
    keys: Sequence[str | None] | None,
) -> None:
    """Raise InputError if a line has the number of one row and the key of another."""
    if named is None or keys is None:
        return
    for row, cell in zip(rows, named, strict=True):
        key = keys[row]
        if key is None or cell is None or str(cell) == "":
            continue
        if str(cell) != key and _plain_key(cell) != _plain_key(key):
            raise InputError(
                f"{path}: has the key {str(cell)!r} for row {row}, whose key is {key!r}; leave out "
                "the column that is wrong"
            )


def _row_number(path: Path, cell: Any, n_rows: int) -> int:
    number = WHOLE.fullmatch(str(cell).strip())
    if not number or int(number[1]) >= n_rows:
        raise InputError(f"{path}: {str(cell).strip()!r} is no row; they are 0 .. {n_rows - 1}")
    return int(number[1])


def _plain_key(key: Any) -> str:
    """A key as it is compared: Unicode form, spaces around it and a guard do not matter."""
    return unicodedata.normalize("NFC", unguarded(str(key))).strip()
