"""
Corrections: classes that a person gave to single rows, in a table of keys and labels.

The report's page writes them, and `suggest` a table to fill in. In these a ' goes before a text
that a spreadsheet would run, or that begins with ' itself, so that each text is read back as it
was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from transclip_fast.data.labels import WHOLE
from transclip_fast.data.names import plain_name, positions, positions_by_name
from transclip_fast.errors import InputError, user_level
from transclip_fast.store.named_rows import COLUMNS, check_no_predictions, has_keys, rows_of_lines
from transclip_fast.store.tables import LABEL, read_columns, unguarded


def label_texts(
    names: Sequence[str] | None, n_classes: int, longest: int | None = None
) -> list[str | None]:
    """
    The text that names each class in corrections: its name; or its position, if the name is empty,
    has more than `longest` characters, or is that of another class, too.

    None of a class that neither would tell from the others.
    """
    numbers = [str(k) for k in range(n_classes)]
    if names is None:
        return [*numbers]
    single = positions(names)

    def text(name: str, number: str) -> str | None:
        if single[name] is not None and name.strip() and len(name[:longest]) == len(name):
            return name
        return None if number in single else number

    return [text(name, number) for name, number in zip(names, numbers, strict=True)]


def read_corrections(
    path: str | Path, keys: Sequence[str | None] | None, names: Sequence[str] | None, n_rows: int
) -> dict[int, int]:
    """
    The class of each row in a .csv or .parquet table of corrections; none where a label is empty.

    Rows are named by a column `key` (or `path`), by their numbers in a column `row`, or by both, as
    in `rows_of_lines`. A label is the name of a class; or its position, if no class has that name.

    Raises
    ------
    InputError
        A file that cannot be read or corrects nothing; a key or label that is not there, or could
        be two; a row with two labels.
    """
    path = Path(path)
    columns, others = read_columns(path, {**COLUMNS, "label": LABEL}, "label", exact=True)
    check_no_predictions(path, others, "corrected")
    texts = {
        name: ["" if cell is None else unguarded(str(cell)) for cell in cells]
        for name, cells in columns.items()
    }
    filled = [line for line, label in enumerate(texts["label"]) if label.strip()]
    if not filled:
        raise InputError(f"{path}: corrects nothing; give a label in one of its lines")
    named = {name: [texts[name][line] for line in filled] for name in COLUMNS if name in texts}
    if "row" not in named and not ("key" in named and has_keys(keys)):
        column, why = "key", ""
        if not has_keys(keys):
            column, why = "row", ", and the features have no keys; name their rows in a column row"
        raise InputError(f"{path}: has no column {column!r}{why}")
    class_of = _class_finder(names)
    found: dict[int, int] = {}
    doubtful: list[tuple[str, int]] = []
    for line, row in zip(filled, rows_of_lines(path, named, keys, n_rows), strict=True):
        if row is None:
            example = next(key for key in keys or () if key is not None)
            raise InputError(
                f"{path}: {texts['key'][line]!r} is the key of no row, as {example!r} is of one"
            )
        column = "key" if "key" in named else "row"
        k = class_of(texts["label"][line], f"{path}: {column} {texts[column][line]!r}")
        if found.setdefault(row, k) != k:
            raise InputError(f"{path}: corrects row {row} twice, to different classes; keep one")
        if names and _is_doubtful(texts["label"][line], k, names):
            doubtful.append((texts["label"][line], k))
    if names and doubtful:
        label, k = doubtful[0]
        warnings.warn(
            f"{path}: {label!r} is taken as class {names[k]!r}, at position {k}: a name counts "
            f"before a position ({len(doubtful):,} such labels)",
            stacklevel=user_level(),
        )
    return found


def _is_doubtful(label: str, k: int, names: Sequence[str]) -> bool:
    """Whether a number that was taken for class k may mean another, as names are numbers, too."""
    number, name = WHOLE.fullmatch(label.strip()), WHOLE.fullmatch(names[k].strip())
    if not number or int(number[1]) >= len(names):
        return False
    return int(number[1]) != k or (name is not None and int(name[1]) != k)


def _class_finder(names: Sequence[str] | None) -> Callable[[str, str], int]:
    """Return a function from a label, and where it stands, to the class that it means."""
    exact, plain = positions(names or ()), positions_by_name(names or ())

    def find(label: str, place: str) -> int:
        stripped = label.strip()
        for places, text in ((exact, label), (exact, stripped), (plain, plain_name(label))):
            if (k := places.get(text)) is not None:
                return k
            if text in places:
                raise InputError(
                    f"{place}: {label!r} is the name of several classes; give a position"
                )
        number = WHOLE.fullmatch(stripped)
        if not number or (names is not None and int(number[1]) >= len(names)):
            near = get_close_matches(label, names or (), n=1)
            remedy = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{place}: label {label!r} is none of the classes{remedy}")
        return int(number[1])

    return find


def corrected(known: np.ndarray, corrections: Mapping[int, int]) -> np.ndarray:
    """Known labels (N,), -1 where unknown, with corrections of single rows."""
    known = known.copy()
    known[[*corrections]] = [*corrections.values()]
    return known
