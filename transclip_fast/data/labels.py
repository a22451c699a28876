"""Labels of any kind as positions in the list of classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np

from transclip_fast.data.names import joined_name, plain_name, positions, positions_by_name
from transclip_fast.data.synsets import SYNSET, synset_positions
from transclip_fast.errors import InputError

UNKNOWN = -1  # position of a row without a label
NO_LABEL = ("", "nan", "-1", "-1.0")
WHOLE = re.compile(r"(\d{1,18})(\.0*)?")


def label_positions(
    labels: Sequence[Any],
    names: Sequence[str] | None,
    where: Callable[[int], str],
    ids: Sequence[str] | None = None,
) -> np.ndarray:
    """
    Labels as positions in the list of classes, (rows,) int64, -1 for a row without a label.

    A label is a position (3, 3.0, "3"), or a text: the name of a class, its id, or a synset of
    ImageNet that has its name. Texts are all names or all positions. None, NaN, -1 and "" are no
    label.

    Parameters
    ----------
    labels : sequence (rows,)
    names : sequence of str (K,), optional
        Of the classes; without them texts are positions.
    where : callable
        From a row to what a message calls it.
    ids : sequence of str (K,), optional
        Of the classes, such as synsets.

    Raises
    ------
    InputError
        A label that is none of the classes, or could be two of them.
    """
    rows: dict[str, int] = {}  # the first of each text
    for row, label in enumerate(labels):
        if isinstance(label, str):
            rows.setdefault(label, row)
    of_text = _text_positions(rows, names, where, ids)
    found = np.empty(len(labels), dtype=np.int64)
    for row, label in enumerate(labels):
        position = of_text[label] if isinstance(label, str) else _whole(label)
        if position is None or position < UNKNOWN or (names and position >= len(names)):
            raise _no_class(where(row), label, names)
        found[row] = position
    return found


def number_doubt(labels: Iterable[Any], names: Sequence[str] | None) -> str | None:
    """Which number among labels is a position, and another class's name; None if none is."""
    called = {
        int(match[1]): k
        for k, name in enumerate(names or ())
        if (match := WHOLE.fullmatch(plain_name(name)))
    }
    for number in labels:
        if names and called.get(number, number) != number and number in range(len(names)):
            return (
                f"{int(number)} is taken as a position, of class {names[int(number)]!r}, and not "
                "as the class of that name; if names are meant, give classes names that are no "
                "numbers"
            )
    return None


def _text_positions(
    rows: Mapping[str, int],
    names: Sequence[str] | None,
    where: Callable[[int], str],
    ids: Sequence[str] | None,
) -> dict[str, int | None]:
    """The position of each text, by the first row that has it; None if it is no class."""
    known = positions_by_name(names or ())
    for place, text in enumerate(map(plain_name, ids or ())):
        known[text] = place if known.get(text, place) == place else None
    plain = {text: plain_name(text) for text in rows}
    found: dict[str, int | None] = dict.fromkeys(rows, UNKNOWN)
    texts = [text for text in rows if plain[text] in known or plain[text] not in NO_LABEL]
    named = {text: known[plain[text]] for text in texts if plain[text] in known}
    joined = positions(map(joined_name, names or ()))
    for text in texts:
        k = joined.get(joined_name(text))
        if text not in named and k is not None and not WHOLE.fullmatch(joined_name(text)):
            named[text] = k
    if names and not ids:
        synsets = [text for text in texts if text not in named and SYNSET.fullmatch(text)]
        named |= synset_positions(synsets, names) if synsets else {}
    numbers = {text: int(match[1]) for text in texts if (match := WHOLE.fullmatch(plain[text]))}
    for text, k in named.items():
        if k is None and plain[text] in known:
            raise InputError(
                f"{where(rows[text])}: label {text!r} is the name of several classes; give each "
                "class its own"
            )
        number = numbers.get(text)
        if number not in (None, k) and number in range(len(names or ())):
            raise InputError(
                f"{where(rows[text])}: label {text!r} is the name of class {k} and the position of "
                "another; give names that are no numbers, or labels in a .npy"
            )
    return found | {text: (named if named else numbers).get(text) for text in texts}


def _whole(label: Any) -> int | None:
    """The position that a number is, or None."""
    if label is None or label != label:  # NaN
        return UNKNOWN
    if isinstance(label, float):
        return int(label) if label.is_integer() else None
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def _no_class(row: str, label: Any, names: Sequence[str] | None) -> InputError:
    if not names:
        return InputError(f"{row}: label {label!r} is no position; give the class names, too")
    remedy = "; positions count from 0" if str(label) == str(len(names)) else ""
    if isinstance(label, str) and SYNSET.fullmatch(label):
        remedy = f"; give the names as lines with synsets, such as '{label} NAME'"
    elif isinstance(label, str) and (near := get_close_matches(label, names, n=1)):
        remedy = f"; did you mean {near[0]!r}?"
    return InputError(f"{row}: label {label!r} is none of the {len(names)} classes{remedy}")
