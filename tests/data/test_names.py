"""How names are compared."""

from __future__ import annotations

import unicodedata

import pytest

from transclip_fast.data.names import plain_name, positions_by_name

NAME = "Crème_brûlée"


@pytest.mark.parametrize(
    "other",
    [
        unicodedata.normalize("NFD", NAME),
        unicodedata.normalize("NFC", NAME),
        "CRÈME  BRÛLÉE",
        " crème\u00a0brûlée\n",
        unicodedata.normalize("NFD", NAME.upper()),
    ],
)
def test_one_name(other):
    assert plain_name(other) == plain_name(NAME)


@pytest.mark.parametrize("other", ["Creme brulee", "Crème-brûlée", "Crème", ""])
def test_other_names(other):
    assert plain_name(other) != plain_name(NAME)


def test_forms_that_folding_undoes():
    # U+1F80 folds to two letters, U+0345 to a letter: only their decompositions agree.
    assert plain_name("\u1f80") == plain_name("\u1f00\u0345") == plain_name("\u1f88")


def test_a_name_of_two_classes_has_no_position():
    assert positions_by_name(["crane", "dog", "Crane"]) == {"crane": None, "dog": 1}
