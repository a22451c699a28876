"""Labels from files of every kind."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transclip_fast.data.checks import a_mask
from transclip_fast.data.labels import WHOLE, label_positions, number_doubt
from transclip_fast.errors import InputError, reading, user_level
from transclip_fast.store.arrays import SUFFIXES, read_array
from transclip_fast.store.named_rows import (
    COLUMNS,
    OF_PREDICTIONS,
    check_no_predictions,
    has_keys,
    rows_of_lines,
)
from transclip_fast.store.names import as_names
from transclip_fast.store.tables import (
    LABEL,
    TABLE_SUFFIXES,
    check_line_order,
    not_read,
    read_columns,
)

TEXT_SUFFIX = ".txt"


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
    | .txt | one a line, an empty one where there is none; further empty ones may follow |

    Where no column tells the rows, labels are those of all rows in their order.

    Parameters
    ----------
    path : path
    name : str
        Of the array.
    keys : sequence of str (N,), optional
        Of the rows. Labels with a key or a row number go to the row that has it, in any order; rows
        that the file does not have get no label. Where rows have no keys, those of a file must be
        the numbers of all rows.
    n_rows : int, optional
        N; by default the number of keys, and without them of the table's labels.

    Returns
    -------
    array
        Of numbers, NaN where there is no label; or of texts, "" where there is none.

    Raises
    ------
    InputError
        A file that cannot be read or has no labels; keys that are no row's or several rows', or
        rows that have none; numbers of no row, or twice; two labels of one key; lines that another
        column numbers in another order; predictions as known labels.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == TEXT_SUFFIX:
        with reading(path, "cannot be read as UTF-8 text", "write it again"):
            lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
        while len(lines) > (n_rows or 0) and not lines[-1].strip():
            lines.pop()
        return as_array([line.strip() for line in lines], str(path))
    if suffix in SUFFIXES:
        return read_array(path, name)
    if suffix not in TABLE_SUFFIXES:
        kinds = ", ".join((*SUFFIXES, *TABLE_SUFFIXES, TEXT_SUFFIX))
        raise InputError(f"{path}: labels are read from {kinds}")
    wanted = {**COLUMNS, "label": LABEL}
    columns, others = read_columns(path, wanted, "label", n_rows=n_rows or 0)
    if name == "known_labels":
        check_no_predictions(path, others, "known")
    elif OF_PREDICTIONS in others:
        text = "has a column 'label_name', as predictions do: are these true labels?"
        warnings.warn(f"{path}: {text}", stacklevel=user_level())
    labels = columns.pop("label")
    if not has_keys(columns.get("key")):
        columns.pop("key", None)
    if columns:
        if n_rows is None:
            n_rows = len(labels if keys is None else keys)
        labels = _placed(path, columns, labels, keys, n_rows)
    elif others:
        check_line_order(path, others)
        shown = f"labels go to the rows in their order; {not_read(others)}"
        warnings.warn(f"{path}: {shown}", stacklevel=2)
    return as_array(labels, str(path))


def as_positions(array: Any, names: Sequence[str] | None, name: str) -> Any:
    """Labels (rows,) that are texts as positions in the list of classes; others as they are."""
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "US":
        return array
    return label_positions(as_names(array, name), names, lambda row: f"{name}: row {row}")


def warn_of_numbers(array: Any, names: Sequence[str] | None, name: str) -> None:
    """Warn of a number among labels that is the position of a class and the name of another."""
    if isinstance(array, torch.Tensor) and not array.is_complex():
        array = array.double()  # numpy has no bfloat16
    numbers = np.asarray(array if names else [])
    if numbers.ndim != 1 or numbers.dtype.kind not in "iuf":
        return
    if doubt := number_doubt(np.unique(numbers).tolist(), names):
        warnings.warn(f"{name}: {doubt}", stacklevel=user_level())


def as_array(labels: Sequence[Any] | np.ndarray, origin: str) -> np.ndarray:
    """
    Labels as an array of numbers, NaN for None; or of texts, "" for None.

    InputError of a mask, also if it has gaps, and of what is neither.
    """
    if isinstance(labels, np.ndarray) and labels.dtype.kind != "O":
        return labels
    if any(isinstance(label, bool) for label in labels):
        raise a_mask(origin)  # which NaN in its gaps would turn into numbers
    with reading(origin, "holds neither numbers nor texts", "give one of these a row"):
        if any(isinstance(label, str) for label in labels):
            return np.array(["" if label is None else str(label) for label in labels])
        return np.array([np.nan if label is None else label for label in labels])


def _placed(
    path: Path,
    columns: Mapping[str, Sequence[Any]],
    labels: Sequence[Any],
    keys: Sequence[str | None] | None,
    n_rows: int,
) -> list[Any]:
    """The label of each row, None where the file, whose `columns` tell the rows, has none."""
    by_key = "row" not in columns
    if by_key and not has_keys(keys) and not _are_all_rows(columns["key"], n_rows):
        raise InputError(
            f"{path}: names rows by keys such as {columns['key'][0]!r}, but the rows have none; "
            "name them by number in a column row, or leave the keys out if labels are in the order "
            "of the rows"
        )
    found: dict[int | None, Any] = {}
    rows = rows_of_lines(path, columns, keys, n_rows)
    for line, (row, label) in enumerate(zip(rows, labels, strict=True)):
        if row is None:
            continue
        if row in found and not by_key:
            raise InputError(f"{path}: row {row} is there twice")
        if found.setdefault(row, label) != label:
            raise InputError(f"{path}: {columns['key'][line]!r} is there with two labels")
    if by_key:
        _check_found(path, columns["key"], rows, keys)
    return [found.get(row) for row in range(n_rows)]


def _are_all_rows(keys: Sequence[Any], n_rows: int) -> bool:
    """Whether keys are the numbers of all rows, each once."""
    numbers = {int(match[1]) for key in keys if (match := WHOLE.fullmatch(str(key)))}
    return len(keys) == n_rows and numbers == {*range(n_rows)}


def _check_found(
    path: Path,
    named: Sequence[Any],
    rows: Sequence[int | None],
    keys: Sequence[str | None] | None,
) -> None:
    """Warn of keys that are no row's; InputError if all are."""
    missing = {str(key) for key, row in zip(named, rows, strict=True) if row is None}
    if not missing:
        return
    if all(row is None for row in rows):
        example = next(key for key in keys or () if key is not None)
        raise InputError(
            f"{path}: none of its keys is a row's, e.g. {named[0]!r}; rows have keys such as "
            f"{example!r}"
        )
    warnings.warn(
        f"{path}: {len(missing)} of {len(set(map(str, named)))} keys are no row's, e.g. "
        f"{min(missing)!r}",
        stacklevel=2,
    )
