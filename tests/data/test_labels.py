"""Labels of every kind as positions."""

from __future__ import annotations

import re
import unicodedata

import pytest

from transclip_fast.data.labels import label_positions, number_doubt
from transclip_fast.errors import InputError


def found(labels, names, synsets=None):
    return label_positions(labels, names, lambda row: f"y: row {row}", synsets).tolist()


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([2, 0, 1], [2, 0, 1]),
        ([2.0, 0.0, 1.0], [2, 0, 1]),
        (["2", " 0", "1.0"], [2, 0, 1]),
        (["polar bear", "CAT", unicodedata.normalize("NFD", "café")], [2, 0, 1]),
        ([None, 1, float("nan"), -1], [-1, 1, -1, -1]),
        (["", "cat", None, "-1", "nan", "-1.0"], [-1, 0, -1, -1, -1, -1]),
        ([], []),
    ],
)
def test_kinds(labels, expected):
    assert found(labels, ["cat", "café", "polar_bear"]) == expected


def test_names_of_folders_may_lack_the_spaces():
    names = ["bare land", "Land", "ice cream", "icecream"]
    assert found(["BareLand", "bareland", "bare_land", "La nd"], names) == [0, 0, 0, 1]
    assert found(["ice cream", "IceCream"], names) == [2, 3]  # a name as it stands comes first
    with pytest.raises(InputError, match="'i cecream' is none of the 4 classes"):
        found(["i cecream"], names)
    with pytest.raises(InputError, match="'1 2' is none of the 2 classes"):
        found(["1 2"], ["12", "a"])


def test_positions_without_names():
    assert found(["7", "", "0"], None) == [7, -1, 0]


def test_names_that_are_numbers():
    assert found(["8", "3", "8"], ["3", "8"]) == [1, 0, 1]  # 3 and 8 are no positions
    assert found(["1", "0"], ["0", "1"]) == [1, 0]
    assert found(["nan", "-1"], ["-1", "nan"]) == [1, 0]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 3], ["a", "b"], "y: row 1: label 3 is none of the 2 classes"),
        ([0, -2], ["a", "b"], "y: row 1: label -2 is none of the 2 classes"),
        ([0.5], ["a", "b"], "y: row 0: label 0.5 is none of the 2 classes"),
        ([float("inf")], ["a", "b"], "y: row 0: label inf is none of the 2 classes"),
        ([True], ["a", "b"], "y: row 0: label True is none of the 2 classes"),
        ([[1]], ["a", "b"], "y: row 0: label [1] is none of the 2 classes"),
        (["sea", "dessert"], ["desert", "sea"], "none of the 2 classes; did you mean 'desert'?"),
        (["a", "c", "c"], ["a", "b"], "y: row 1: label 'c' is none of the 2 classes"),
        (["a", "1"], ["a", "b"], "y: row 1: label '1' is none of the 2 classes"),
        (["2"], ["a", "b"], "y: row 0: label '2' is none of the 2 classes"),
        (["1.5"], ["a", "b"], "y: row 0: label '1.5' is none of the 2 classes"),
        (["null"], ["a", "b"], "y: row 0: label 'null' is none of the 2 classes"),
        (["a", "A"], ["a", "A"], "y: row 0: label 'a' is the name of several classes"),
        (["2", "1"], ["1", "2", "3"], "y: row 0: label '2' is the name of class 1 and the posi"),
        (["1", "2"], ["1", "1", "2"], "y: row 0: label '1' is the name of several classes"),
        ([10**400], ["a"], "none of the 1 classes"),
        (["9" * 400], ["a"], "none of the 1 classes"),
        (["9" * 400], None, "is no position"),
        (["1", "cat"], None, "y: row 1: label 'cat' is no position; give the class names"),
    ],
)
def test_no_class(labels, names, message):
    with pytest.raises(InputError, match=re.escape(message)):
        found(labels, names)


def test_synsets_of_the_list():
    synsets = ["n02123045", "n01443537"]
    assert found(["n01443537", "n02123045"], ["tabby", "goldfish"], synsets) == [1, 0]
    assert found(["Goldfish", "n02123045"], ["tabby", "goldfish"], synsets) == [1, 0]
    with pytest.raises(InputError, match="'n01440764' is none of the 2 classes; give the names as"):
        found(["n01440764"], ["tabby", "goldfish"], synsets)


def test_a_synset_of_several_classes_is_none_of_them():
    names, synsets = ["tabby", "goldfish", "carp"], ["n02123045", "n01443537", "n01443537"]
    assert found(["n02123045", "carp"], names, synsets) == [0, 2]
    with pytest.raises(InputError, match="'n01443537' is the name of several classes"):
        found(["n01443537"], names, synsets)
    assert found(["Tabby"], names, ["tabby", "x", "y"]) == [0]
    with pytest.raises(InputError, match="'Tabby' is the name of several classes"):
        found(["Tabby"], names, ["x", "tabby", "y"])


def test_a_synset_goes_to_its_name():
    names = ["goldfish", "Tench", "construction crane", "crane bird"]
    labels = ["n01440764", "n01443537", "n02012849", "n03126707"]
    assert found(labels, names) == [1, 0, 3, 2]


@pytest.mark.parametrize(
    ("labels", "names", "doubtful"),
    [
        ([0, 2], ["1", "2", "3"], True),
        ([0.0, float("nan"), 2.0], ["1", "2", "3"], True),
        ([0, 2], ["0", "1", "2"], False),
        ([0, 1], ["cat", "dog"], False),
        ([0, 1], ["cat", "7"], False),
        ([0, 3], ["1", "2", "3"], False),  # and refused, as there is no position 3
        ([0, 2], None, False),
    ],
)
def test_numbers_that_may_be_names(labels, names, doubtful):
    doubt = number_doubt(labels, names)
    assert (doubt is not None) == doubtful
    assert doubt is None or doubt.startswith("2 is taken as a position, of class '3', and not as")
