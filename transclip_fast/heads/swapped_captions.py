"""False captions: two attributes of a caption change places."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

# Words that stand before a noun far more often than they are one.
ATTRIBUTES = (
    *("black", "white", "gray", "grey", "red", "green", "blue", "yellow", "orange", "purple"),
    *("pink", "brown", "beige", "golden", "silver", "dark", "bright", "colorful", "striped"),
    *("wooden", "metal", "metallic", "plastic", "leather", "brick", "concrete", "furry", "shiny"),
    *("small", "little", "tiny", "large", "big", "huge", "tall", "short", "long", "round"),
    *("old", "young", "empty", "wet", "dry", "clean", "dirty"),
)
# To these the words before them are equal: swapped, a caption would still be true.
EQUAL = {
    "grey": "gray",
    "metallic": "metal",
    "big": "large",
    "huge": "large",
    "little": "small",
    "tiny": "small",
}
WORD = re.compile(r"[^\W_]+")
LINKS = frozenset({"a", "an", "and", "or", "the"})  # between attributes of one thing


def attribute_swapper(words: Iterable[str] = ATTRIBUTES) -> Callable[[str], str | None]:
    """
    Return a function from a caption to the same with two attributes swapped.

    They are the first two that differ, by `EQUAL` too, with a word between them that is neither an
    attribute nor one of `LINKS`: "large red car" and "black and white cat" describe one thing each,
    and say the same in another order. Where there are no two such attributes it returns None. Case
    stays at its place, and "a" and "an" follow the words.

    Examples
    --------
    >>> swapped = attribute_swapper()
    >>> swapped("An orange cat on a large red chair")
    'A large cat on an orange red chair'
    >>> swapped("a black and white cat")
    """
    listed = "|".join(re.escape(word) for word in sorted({*words}, key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w-])(?:(an?)(\s+))?({listed})(?![\w-])", re.IGNORECASE)

    def swapped(caption: str) -> str | None:
        found = [*pattern.finditer(caption)]
        for place, first in enumerate(found):
            for second in found[place + 1 :]:
                between = caption[first.end() : second.start()]
                other = {word.casefold() for word in WORD.findall(pattern.sub(" ", between))}
                if other - LINKS and _meaning(first[3]) != _meaning(second[3]):
                    start = caption[: first.start()] + _instead(second[3], first)
                    return start + between + _instead(first[3], second) + caption[second.end() :]
        return None

    return swapped


def _meaning(word: str) -> str:
    """The word that stands for this one and those equal to it."""
    word = word.casefold()
    return EQUAL.get(word, word)


def _instead(word: str, match: re.Match[str]) -> str:
    """A word in the place of an attribute, with its article if it has one."""
    word = _like(word, match[3])
    if match[1] is None:
        return word
    article = _like("an" if word[0].casefold() in "aeiou" else "a", match[1])
    return f"{article}{match[2]}{word}"


def _like(word: str, other: str) -> str:
    """A word whose first letter has the case of another's."""
    first = word[0].upper() if other[0].isupper() else word[0].lower()
    return first + word[1:]
