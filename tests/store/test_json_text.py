"""Strict JSON: what is there twice, or of another type, is refused."""

from __future__ import annotations

import pytest

from transclip_fast.errors import InputError
from transclip_fast.store.json_text import parse_json, value_of


def test_texts_are_read_as_they_are():
    assert parse_json('{"a": [1, 2.5, "é", null], "b": {"a": true}}') == {
        "a": [1, 2.5, "é", None],
        "b": {"a": True},
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1, "a": 1}', "'a' is there twice"),
        ('[{"b": {"a": 1, "c": 2, "a": 3}}]', "'a' is there twice"),
        ('["\\ud800"]', "surrogates"),
        ('{"\\udc80": 1}', "surrogates"),
        ("{", "Expecting"),
    ],
)
def test_damage(text, expected):
    with pytest.raises(ValueError, match=expected):
        parse_json(text)


@pytest.mark.parametrize(
    ("value", "kind", "limits"),
    [
        (3, int, {"minimum": 3, "maximum": 3}),
        (0, int, {}),
        (3, float, {}),
        (0.5, float, {"minimum": 0}),
        ("3", str, {}),
        (None, (str, type(None)), {}),
        ([], list, {}),
    ],
)
def test_values_that_are_right(value, kind, limits):
    assert value_of({"x": value}, "x", kind, "run.json", **limits) == value


@pytest.mark.parametrize(
    ("value", "kind", "limits"),
    [
        (True, int, {}),
        (True, float, {}),
        (3.0, int, {}),
        ("3", int, {}),
        (None, int, {}),
        (2**63, int, {}),
        (10**400, float, {}),
        (float("nan"), float, {}),
        (float("inf"), float, {}),
        (2, int, {"minimum": 3}),
        (4, int, {"maximum": 3}),
        ({}, list, {}),
        (b"3", str, {}),
    ],
)
def test_values_that_are_wrong(value, kind, limits):
    with pytest.raises(InputError, match=r"^run\.json: x is .*; it is damaged, write it again$"):
        value_of({"x": value}, "x", kind, "run.json", **limits)


def test_a_value_that_is_missing():
    with pytest.raises(InputError, match=r"^run\.json: x is missing"):
        value_of({}, "x", int, "run.json")
