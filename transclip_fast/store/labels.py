"""Labels from files of every kind."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transclip_fast.data.labels import label_positions
from transclip_fast.errors import InputError, reading
from transclip_fast.store.arrays import SUFFIXES, read_array
from transclip_fast.store.names import as_names
from transclip_fast.store.tables import (
    KEY,
    LABEL,
    PATH,
    ROW,
    TABLE_SUFFIXES,
    read_columns,
    row_number,
)

TEXT_SUFFIX = ".txt"
COLUMNS = {"label": LABEL, "key": (*KEY, *PATH), "row": ROW}


def read_labels(
    path: str | Path,
    name: str,
    keys: Sequence[str | None] | None = None,
    n_rows: int | None = None,
) -> Any:
    """
    Labels from a file: numbers, or texts that `data.labels.label_positions` understands.

    | file | labels |
    |---|---|
    | .npy, .npz, .pt, .safetensors | the array `name` or the only one |
    | .csv, .parquet | the column `label`; a column `key`, `path` or `row` tells the rows |
    | .txt | one a line, an empty one where there is none |

    Parameters
    ----------
    path : path
    name : str
        Of the array.
    keys : sequence of str (N,), optional
        Of the rows. Labels with a key go to the row that has it, in any order; rows that the file
        does not have get no label.
    n_rows : int, optional
        N, where the rows are numbered: without keys on either side, labels go to their number in a
        column `row`; without that, too, they are those of all rows in their order.

    Returns
    -------
    array
        Of numbers, NaN where there is no label; or of texts, "" where there is none.

    Raises
    ------
    InputError
        A file that cannot be read or has no labels; keys or numbers of no row, or twice with
        two labels.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == TEXT_SUFFIX:
        with reading(path, "cannot be read as UTF-8 text", "write it again"):
            lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
        return as_array([line.strip() for line in lines], str(path))
    if suffix in SUFFIXES:
        return read_array(path, name)
    if suffix not in TABLE_SUFFIXES:
        kinds = ", ".join((*SUFFIXES, *TABLE_SUFFIXES, TEXT_SUFFIX))
        raise InputError(f"{path}: labels are read from {kinds}")
    columns, _ = read_columns(path, COLUMNS, "label")
    labels = columns["label"]
    if "key" in columns and keys is not None and None not in keys:
        labels = _by_key(path, columns["key"], labels, keys)
    elif "row" in columns and n_rows is not None:
        rows = [row_number(path, row, n_rows) for row in columns["row"]]
        by_row = _each_once(path, rows, labels)
        labels = [by_row.get(row) for row in range(n_rows)]
    return as_array(labels, str(path))


def as_positions(array: Any, names: Sequence[str] | None, name: str) -> Any:
    """Labels (rows,) that are texts as positions in the list of classes; others as they are."""
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "US":
        return array
    return label_positions(as_names(array, name), names, lambda row: f"{name}: row {row}")


def as_array(labels: Sequence[Any] | np.ndarray, origin: str) -> np.ndarray:
    """Labels as an array of numbers, NaN for None; or of texts, "" for None."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind != "O":
        return labels
    with reading(origin, "holds neither numbers nor texts", "give one of these a row"):
        if any(isinstance(label, str) for label in labels):
            return np.array(["" if label is None else str(label) for label in labels])
        return np.array([np.nan if label is None else label for label in labels])


def _by_key(
    path: Path, given: Sequence[Any], labels: Sequence[Any], keys: Sequence[str | None]
) -> list[Any]:
    """The label of each of `keys`, None where the file does not have it."""
    found = _each_once(path, [*map(_plain_key, given)], labels)
    rows = [_plain_key(key) for key in keys]
    missing = found.keys() - set(rows)
    if len(missing) == len(found):
        raise InputError(
            f"{path}: none of its keys is a row's, e.g. {given[0]!r}; rows have keys such as "
            f"{keys[0]!r}"
        )
    if missing:
        warnings.warn(
            f"{path}: {len(missing)} of {len(found)} keys are no row's, e.g. {min(missing)!r}",
            stacklevel=2,
        )
    return [found.get(key) for key in rows]


def _each_once(path: Path, places: Sequence[Any], labels: Sequence[Any]) -> dict[Any, Any]:
    """The label of each place, None for NaN; InputError if one has two."""
    found: dict[Any, Any] = {}
    for place, label in zip(places, labels, strict=True):
        known = None if label != label else label
        if found.setdefault(place, known) != known:
            raise InputError(f"{path}: {place!r} is there with two labels")
    return found


def _plain_key(key: Any) -> str:
    return unicodedata.normalize("NFC", str(key))
