"""How class names are compared."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any


def plain_name(name: str) -> str:
    """
    A name as it is compared: case, Unicode form, "_" and the number of spaces do not matter.

    Two names are one if their plain names are equal: of classes, folders, labels and prompts.
    """
    # Folding case can undo a form (Unicode, section 3.13: canonical caseless matching).
    folded = unicodedata.normalize("NFD", name).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).replace("_", " ").split())


def class_name(k: int, names: Sequence[str] | None) -> str:
    """The name of a class, or its number where there are no names."""
    return names[k] if names else f"class {k}"


def first_difference(names: Sequence[str], others: Sequence[str]) -> int | None:
    """The first place where two lists have different names, or one has none; None if nowhere."""
    for k, (name, other) in enumerate(zip_longest(names, others)):
        if name is None or other is None or plain_name(name) != plain_name(other):
            return k
    return None


def positions(texts: Iterable[Any]) -> dict[Any, int | None]:
    """The position of each text; None where several are equal."""
    found: dict[Any, int | None] = {}
    for k, text in enumerate(texts):
        found[text] = None if text in found else k
    return found


def positions_by_name(names: Iterable[str]) -> dict[str, int | None]:
    """The position of each plain name; None where several names are one."""
    return positions(map(plain_name, names))
