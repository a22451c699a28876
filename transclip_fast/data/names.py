"""How class names are compared, and what is odd about them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

JOINERS = "\u200c\u200d"  # between the letters of some scripts
Odd = tuple[str, str, Callable[[str], Any]]  # what is odd, remedy, whether a line is so
MARKS: Sequence[Odd] = (  # of a line that is no plain text
    (
        "begins as a comment does ({0!r}) and is a {1}",
        "take it out if it is none",
        lambda line: line.startswith(("#", "//")),
    ),
    (
        "has a mark of lists or tables ({0!r}), which goes into the {2}",
        "take it off",
        lambda line: line.startswith(("- ", "* ")) or line.endswith((",", ";", ":", "|")),
    ),
    (
        "is in quotes ({0!r}), which go into the {2}",
        "take them off",
        lambda line: len(line) > 1 and line[0] == line[-1] and line[0] in "\"'`",
    ),
    (
        "has characters that do not show, or a tab ({0!r}), which go into the {2}",
        "write it again",
        lambda line: not all(c.isprintable() or c in JOINERS for c in line),
    ),
)
ODD_PROMPT_NAMES: Sequence[Odd] = (
    ("has '_' ({0!r}), which goes into the {2}", "write spaces", lambda name: "_" in name),
    (
        "has the braces of a template ({0!r}), which go into the {2}",
        "take them off",
        lambda name: "{}" in name or "{c}" in name,
    ),
    *MARKS,
)
HEADER = re.compile(r"(id|idx|index|labels?|class|classes|class_(id|name)|names?)([,;|].*)?", re.I)
LEADING, TRAILING = re.compile(r"^(\d{1,9})[\s:,;.)-]+\S"), re.compile(r"\S[\s:,;]+(\d{1,9})$")


def plain_name(name: str) -> str:
    """
    A name as it is compared: case, Unicode form, "_" and the number of spaces do not matter.

    Two names are one if their plain names are equal: of classes, folders, labels and prompts.
    """
    # Folding case can undo a form (Unicode, section 3.13: canonical caseless matching).
    folded = unicodedata.normalize("NFD", name).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).replace("_", " ").split())


def joined_name(name: str) -> str:
    """A plain name without its spaces, as folders have it: "BareLand" of "bare land"."""
    return plain_name(name).replace(" ", "")


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


def odd_names(names: Sequence[str], place: Callable[[int], str], use: str) -> Iterator[str]:
    """Messages about odd class names that go into `use`, prompts or labels; `place` of a class."""
    for what, remedy, is_odd in ODD_PROMPT_NAMES if use == "prompts" else MARKS:
        odd = [k for k, name in enumerate(names) if is_odd(name)]
        if odd:
            found = what.format(names[odd[0]], "class", use)
            yield f"{place(odd[0])} {found}{more(odd)}; {remedy}"
    if len(names) > 1 and HEADER.fullmatch(names[0]):
        yield (
            f"{place(0)} ({names[0]!r}) looks like a header and is the first class; take it out if "
            "it is none"
        )
    numbered = (("begin", LEADING), ("end", TRAILING)) if use == "prompts" else ()
    for where, pattern in numbered:
        if all_numbered(names, pattern):
            yield (
                f"all names {where} with another number ({names[0]!r}), which goes into the "
                "prompts; take it off if it is none of the name"
            )
    same = same_names(names)
    if same:
        first, k = same[0]
        otherwise = "it gets no images" if use == "prompts" else "their labels are one"
        yield (
            f"{place(k)} has the name of {place(first)} ({names[k]!r}){more(same)}; rename it or "
            f"take it out: {otherwise}"
        )


def same_names(names: Iterable[str]) -> list[tuple[int, int]]:
    """Names that are one with an earlier one, as `repeats`."""
    return repeats(map(plain_name, names))


def repeats(keys: Iterable[Hashable]) -> list[tuple[int, int]]:
    """The first place of each key that is there again, and the place where it is."""
    first: dict[Hashable, int] = {}
    places = [(first.setdefault(key, k), k) for k, key in enumerate(keys)]
    return [(known, k) for known, k in places if known != k]


def more(found: Sequence[object]) -> str:
    """The words ", as 2 more do" where there are others of that kind."""
    return f", as {len(found) - 1} more do" if len(found) > 1 else ""


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first of some names, with dots if there are more."""
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


def all_numbered(lines: Sequence[str], pattern: re.Pattern[str]) -> bool:
    """Whether there are several lines, and each has another number where the pattern has it."""
    numbers = {int(match[1]) for line in lines if (match := pattern.search(line))}
    return len(lines) == len(numbers) > 1
