"""How class names are compared."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from itertools import zip_longest


def plain_name(name: str) -> str:
    """
    A name as it is compared: case, Unicode form, "_" and the number of spaces do not matter.

    Two names are one if their plain names are equal: of classes, folders, labels and prompts.
    """
    # Folding case can undo a form (Unicode, section 3.13: canonical caseless matching).
    folded = unicodedata.normalize("NFD", name).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).replace("_", " ").split())


def first_difference(names: Sequence[str], others: Sequence[str]) -> int | None:
    """The first place where two lists have different names, or one has none; None if nowhere."""
    for k, (name, other) in enumerate(zip_longest(names, others)):
        if name is None or other is None or plain_name(name) != plain_name(other):
            return k
    return None


def positions_by_name(names: Iterable[str]) -> dict[str, int | None]:
    """The position of each plain name; None where several names are one."""
    positions: dict[str, int | None] = {}
    for k, name in enumerate(names):
        plain = plain_name(name)
        positions[plain] = None if plain in positions else k
    return positions
