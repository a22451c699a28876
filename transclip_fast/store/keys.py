"""Keys of rows from files: the names of images, by which tables and pages know a row."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from transclip_fast.data.names import repeats
from transclip_fast.errors import InputError, reading
from transclip_fast.store.arrays import read_array
from transclip_fast.store.named_rows import COLUMNS, rows_of_lines
from transclip_fast.store.names import ARRAY_SUFFIXES, as_names
from transclip_fast.store.tables import (
    LABEL,
    TABLE_SUFFIXES,
    check_line_order,
    read_columns,
    unguarded,
)


def read_keys(path: str | Path, n_rows: int) -> list[str | None]:
    """
    The key of each of `n_rows` rows, in their order.

    | file | keys |
    |---|---|
    | .txt | one a line |
    | .csv, .parquet | the column `key` or `path`; a column `row` tells the rows |
    | .npy, .npz | an array of fixed-width strings or whole numbers |

    Raises
    ------
    InputError
        Another file, a missing or damaged one, another number of keys, an empty one, numbers of no
        row, or twice, or lines that a column that is not read numbers in another order.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        found = _from_table(path, n_rows)
    elif suffix in ARRAY_SUFFIXES:
        found = read_array(path, "keys")
    elif suffix == ".txt":
        with reading(path, "cannot be read as UTF-8 text", "write it again"):
            found = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    else:
        raise InputError(f"{path}: keys are read from .txt (one a line), .csv, .parquet and .npy")
    return as_keys(found, str(path), n_rows)


def _from_table(path: Path, n_rows: int) -> list[Any]:
    wanted = {**COLUMNS, "label": LABEL}  # as labels number no lines
    columns, others = read_columns(path, wanted, "key", exact=True)
    keys = columns["key"]
    if path.suffix.lower() == ".csv":
        keys = [unguarded(key) for key in keys]
    if "row" not in columns:
        check_line_order(path, others)
        return keys
    rows = rows_of_lines(path, {"row": columns["row"]}, None, n_rows)
    if found := repeats(rows):
        raise InputError(f"{path}: row {rows[found[0][1]]} is there twice")
    return [key for _, key in sorted(zip(rows, keys, strict=True), key=itemgetter(0))]


def as_keys(keys: Any, origin: str, n_rows: int) -> list[str | None]:
    """Texts or whole numbers as the keys of so many rows."""
    if isinstance(keys, list):
        found = ["" if key is None else str(key) for key in keys]
    elif np.ndim(keys) == 1 and np.asarray(keys).dtype.kind in "iu":
        found = [str(key) for key in np.asarray(keys).tolist()]
    else:
        found = as_names(keys, origin)
    if len(found) != n_rows:
        raise InputError(f"{origin}: {len(found):,} keys for {n_rows:,} rows; give one a row")
    if (row := next((row for row, key in enumerate(found) if not key.strip()), None)) is not None:
        raise InputError(f"{origin}: row {row} has an empty key; give it one")
    return [*found]
