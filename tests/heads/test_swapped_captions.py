"""Captions with two attributes swapped."""

from __future__ import annotations

import pytest

from transclip_fast.heads.swapped_captions import attribute_swapper


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("the red hat and the blue dog", "the blue hat and the red dog"),
        ("A red car, a Blue house", "A blue car, a Red house"),
        ("Red car near blue house", "Blue car near red house"),
        ("an orange cat on a red mat", "a red cat on an orange mat"),
        ("a small dog with an old man", "an old dog with a small man"),
        ("a large red car by a blue house", "a blue red car by a large house"),
        ("a black and white cat on a wooden chair", "a wooden and white cat on a black chair"),
        ("red hat, red shoe, green bag", "green hat, red shoe, red bag"),
        ("a large red car", None),
        ("a black and white cat", None),
        ("red, blue or green", None),
        ("a red hat and a red shoe", None),
        ("one hat", None),
        ("a gray cat on a grey mat", None),
        ("A metallic lamp over a Metal table", None),
        ("a big dog near a large house", None),
        ("a little dog near a tiny house", None),
        ("a big dog near a large red house", "a red dog near a large big house"),
        ("a blue-green hat beside a red shoe", None),
        ("bored men covered the redwood with tallow", None),
        ("", None),
    ],
)
def test_swapped_attributes(caption, expected):
    assert attribute_swapper()(caption) == expected


def test_attributes_of_ones_own():
    swapped = attribute_swapper(["light blue", "blue", "c++"])
    assert swapped("light blue hat, blue shoe") == "blue hat, light blue shoe"
    assert swapped("C++ code in a blue book") == "Blue code in a c++ book"
    assert swapped("a red hat and a green shoe") is None
