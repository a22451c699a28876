"""
Corrections: classes that a person gave to single rows, in a table of keys and labels.

The report's page writes them, and `suggest` a table to fill in. In these a ' goes before a text
that a spreadsheet would run, or that begins with ' itself, so that each text is read back as it
was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transclip_fast.data.labels import WHOLE
from transclip_fast.data.names import plain_name, positions_by_name
from transclip_fast.errors import InputError
from transclip_fast.store.tables import KEY, LABEL, PATH, ROW, read_columns, row_number

GUARDED = "=+-@\t\r'"  # starts of texts that a ' goes before
COLUMNS = {"key": (*KEY, *PATH), "row": ROW, "label": LABEL}


def guarded(text: str) -> str:
    """A text as it is written into a cell; `unguarded` is its inverse."""
    return f"'{text}" if text.startswith(tuple(GUARDED)) else text


def unguarded(text: str) -> str:
    """The text that a cell holds; one that nobody guarded is taken as it is."""
    return text[1:] if text[:1] == "'" and text[1:2] and text[1] in GUARDED else text


def label_texts(
    names: Sequence[str] | None, n_classes: int, longest: int | None = None
) -> list[str | None]:
    """
    What corrections call each class: its name; or its position, if the name is empty, has more
    than `longest` characters, or is that of another class, too.

    None of a class that neither would tell from the others.
    """
    positions = [str(k) for k in range(n_classes)]
    if names is None:
        return [*positions]
    single = _exact(names)
    return [
        name
        if single[name] is not None and name.strip() and len(name[:longest]) == len(name)
        else None
        if number in single
        else number
        for name, number in zip(names, positions, strict=True)
    ]


def read_corrections(
    path: str | Path, keys: Sequence[str | None] | None, names: Sequence[str] | None, n_rows: int
) -> dict[int, int]:
    """
    The class of each row in a .csv or .parquet table of corrections; none where a label is empty.

    Rows are named by a column `key` (or `path`), and if they have no keys by their numbers in a
    column `row`. A label is the name of a class; or its position, if no class has that name.

    Raises
    ------
    InputError
        A file that cannot be read or corrects nothing; a key or label that is not there, or could
        be two; a row with two labels.
    """
    path = Path(path)
    columns, _ = read_columns(path, COLUMNS, "label", exact=True)
    labels = [None if x is None else unguarded(str(x)) for x in columns["label"]]
    row_of, class_of = _row_finder(path, columns, keys, n_rows), _class_finder(path, names)
    found: dict[int, int] = {}
    for line, label in enumerate(labels):
        if label is None or not label.strip():
            continue
        row, k = row_of(line), class_of(label)
        if found.setdefault(row, k) != k:
            raise InputError(f"{path}: corrects row {row} twice, to different classes; keep one")
    if not found:
        raise InputError(f"{path}: corrects nothing; give a label in one of its lines")
    return found


def _row_finder(
    path: Path, columns: Mapping[str, Sequence[Any]], keys: Sequence[str | None] | None, n_rows: int
) -> Callable[[int], int]:
    """Return a function from a line of the table to the row that it names."""
    keyed = keys is not None and None not in keys
    if keys is not None and keyed and "key" in columns:
        by_key = _exact(keys)

        def by_name(line: int) -> int:
            key = columns["key"][line]
            key = "" if key is None else unguarded(str(key))
            key = key if key in by_key else key.strip()
            if key not in by_key:
                raise InputError(f"{path}: {key!r} is the key of no row, as {keys[0]!r} is of one")
            return _only(by_key[key], f"{path}: {key!r} is the key of several rows; name a row")

        return by_name
    if "row" not in columns:
        why = "" if keyed else ", and the features have no keys; name their rows in a column row"
        raise InputError(f"{path}: has no column {'key' if keyed else 'row'!r}{why}")

    def by_number(line: int) -> int:
        return row_number(path, columns["row"][line], n_rows)

    return by_number


def _class_finder(path: Path, names: Sequence[str] | None) -> Callable[[str], int]:
    """Return a function from a label to the class that it means."""
    exact, plain = _exact(names or ()), positions_by_name(names or ())

    def find(label: str) -> int:
        stripped = label.strip()
        for places, text in ((exact, label), (exact, stripped), (plain, plain_name(label))):
            if text in places:
                several = f"{path}: {label!r} is the name of several classes; give a position"
                return _only(places[text], several)
        number = WHOLE.fullmatch(stripped)
        if not number or (names is not None and int(number[1]) >= len(names)):
            raise InputError(f"{path}: {label!r} is none of the classes")
        return int(number[1])

    return find


def _only(place: int | None, several: str) -> int:
    if place is None:
        raise InputError(several)
    return place


def _exact(texts: Sequence[Any]) -> dict[Any, int | None]:
    """The place of each text; None where there are several."""
    places: dict[Any, int | None] = {}
    for place, text in enumerate(texts):
        places[text] = None if text in places else place
    return places


def corrected(known: np.ndarray, corrections: Mapping[int, int]) -> np.ndarray:
    """Known labels (N,), -1 where unknown, with corrections of single rows."""
    known = known.copy()
    known[[*corrections]] = [*corrections.values()]
    return known
