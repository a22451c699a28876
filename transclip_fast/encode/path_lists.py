"""Lists of images: one path a line, or a table of paths and labels."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transclip_fast.data.names import plain_name
from transclip_fast.errors import InputError, reading, user_level
from transclip_fast.store.tables import KEY, LABEL, PATH, not_read, read_columns

COLUMNS = {"path": PATH, "key": KEY, "label": LABEL}
REMEDY = "a .txt has one path a line; labels go in a .csv with the columns path,label"


def read_path_list(path: Path) -> tuple[list[str] | None, list[str], list[Any] | None]:
    """
    Keys, paths and labels in a .txt, .csv or .parquet list; None if it has no keys or labels.

    Raises
    ------
    InputError
        A file that cannot be read, no column of paths, a row without a path, or with a key that is
        empty or another row's.
    """
    if path.suffix.lower() == ".txt":
        with reading(path, "cannot be read as a list"):
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        paths = [line.strip() for line in lines if line.strip()]
        return None, paths, None
    columns, others = read_columns(path, COLUMNS, "path")
    if others and "label" not in columns:
        warnings.warn(f"{path}: has no column 'label'; {not_read(others)}", stacklevel=4)
    if empty := [row for row, value in enumerate(columns["path"]) if value in (None, "")]:
        raise InputError(f"{path}: row {empty[0]} has no path")
    paths = [str(value) for value in columns["path"]]
    keys = _keys(path, columns["key"]) if "key" in columns else None
    return keys, paths, columns.get("label")


def _keys(path: Path, values: Sequence[Any]) -> list[str]:
    """A column of keys as texts; InputError unless each row has one of its own."""
    rows: dict[str, int] = {}
    for row, value in enumerate(values):
        key = "" if value is None else str(value)
        if not key.strip():
            raise InputError(f"{path}: row {row} has no key; give each row one, or drop the column")
        if rows.setdefault(key, row) != row:
            raise InputError(
                f"{path}: rows {rows[key]} and {row} have the key {key!r}; give each row its own"
            )
    return [*rows]


def check_repeats(path: Path, files: Sequence[str], labels: Sequence[Any] | None) -> None:
    """Warn of rows of a list with the file of an earlier one; InputError if labels differ."""
    first: dict[str, int] = {}
    repeats = []
    for row, file in enumerate(files):
        plain = os.path.abspath(file)
        if ".." in file:  # which a link in the path can lead to any folder
            with suppress(ValueError):  # of a zero byte; reading the file fails, and is reported
                plain = os.path.realpath(file)
        before = first.setdefault(plain, row)
        if before == row:
            continue
        repeats.append((before, row))
        of_both = (None, None) if labels is None else (labels[before], labels[row])
        if _plain_label(of_both[0]) != _plain_label(of_both[1]):
            raise InputError(
                f"{path}: rows {before} and {row} are one image, {file}, with the labels "
                f"{of_both[0]!r} and {of_both[1]!r}; keep the one that is right"
            )
    if repeats:
        before, row = repeats[0]
        warnings.warn(
            f"{path}: {len(repeats):,} of {len(files):,} rows are images of earlier rows, first "
            f"row {row} ({files[row]}, as row {before}), and count again; leave them out",
            stacklevel=user_level(),
        )


def _plain_label(label: Any) -> str:
    return "" if label is None or label != label else plain_name(str(label))  # NaN


def check_any_there(path: Path, paths: Sequence[str], files: Sequence[str]) -> None:
    """
    Raise InputError if none of a list's files exists: its paths have another start, or labels.

    Single files that are missing are failures of the encode, which lists them.
    """
    if not files or any(map(os.path.exists, files)):
        return
    lines = path.suffix.lower() == ".txt"
    for gap in re.finditer(r"[\s,;]+", paths[0]) if lines else ():
        start = paths[0][: gap.start()]
        if os.path.isfile(path.parent / start):
            raise InputError(f"{path}: {paths[0]!r} is no file, but {start!r} is; {REMEDY}")
    raise InputError(
        f"{path}: none of its {len(files)} files exists, the first should be {files[0]}; correct "
        "the start of the paths" + (f"; {REMEDY}" if lines else "")
    )
