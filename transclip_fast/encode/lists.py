"""Lists of images: one path a line, or a table of paths and labels."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transclip_fast.errors import InputError, reading
from transclip_fast.store.tables import KEY, LABEL, PATH, read_columns

COLUMNS = {"path": PATH, "key": KEY, "label": LABEL}
REMEDY = "a .txt has one path a line; labels go in a .csv with the columns path,label"


def read_path_list(path: Path) -> tuple[list[str] | None, list[str], list[Any] | None]:
    """
    Keys, paths and labels in a .txt, .csv or .parquet list; None if it has no keys or labels.

    Raises
    ------
    InputError
        A file that cannot be read, no column of paths, or a row without a path.
    """
    if path.suffix.lower() == ".txt":
        with reading(path, "cannot be read as a list"):
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        paths = [line.strip() for line in lines if line.strip()]
        return None, paths, None
    columns, others = read_columns(path, COLUMNS, "path")
    if others and "label" not in columns:
        warnings.warn(f"{path}: has no column 'label'; not read: {', '.join(others)}", stacklevel=4)
    if None in columns["path"] or "" in columns["path"]:
        row = next(row for row, value in enumerate(columns["path"]) if not value)
        raise InputError(f"{path}: row {row} has no path")
    paths = [str(value) for value in columns["path"]]
    keys = [str(value) for value in columns["key"]] if "key" in columns else None
    return keys, paths, columns.get("label")


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
