"""Keys of rows from files: the names of images, by which tables and pages know a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from transclip_fast.errors import InputError, reading
from transclip_fast.store.arrays import read_array
from transclip_fast.store.names import ARRAY_SUFFIXES, as_names
from transclip_fast.store.tables import KEY, PATH, TABLE_SUFFIXES, read_columns


def read_keys(path: str | Path, n_rows: int) -> list[str | None]:
    """
    The key of each of `n_rows` rows, in their order.

    | file | keys |
    |---|---|
    | .txt | one a line |
    | .csv, .parquet | the column `key` or `path` |
    | .npy, .npz | an array of fixed-width strings or whole numbers |

    Raises
    ------
    InputError
        Another file, a missing or damaged one, another number of keys, or an empty one.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        columns, _ = read_columns(path, {"key": (*KEY, *PATH)}, "key", exact=True)
        found = columns["key"]
    elif suffix in ARRAY_SUFFIXES:
        found = read_array(path, "keys")
    elif suffix == ".txt":
        with reading(path, "cannot be read as UTF-8 text", "write it again"):
            found = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    else:
        raise InputError(f"{path}: keys are read from .txt (one a line), .csv, .parquet and .npy")
    return as_keys(found, str(path), n_rows)


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
    if "" in found:
        raise InputError(f"{origin}: row {found.index('')} has an empty key; give it one")
    return [*found]
