"""Int8 products: the bound of their errors, and that no neighbour is missed."""

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import unit
from transclip_fast.data.feature_rows import Rows
from transclip_fast.graph import exact, int8_products
from transclip_fast.graph.build import build_graph
from transclip_fast.graph.candidates import Candidates
from transclip_fast.graph.int8_products import Int8Products


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(exact, "multiplies_bytes", lambda dim: True)
    monkeypatch.setattr(exact, "INT8_PRODUCTS", 1)


def rows_of(kind, n, d, seed):
    """Unit rows: without structure, in a narrow cone, copies of a few, or a single entry each."""
    draw = np.random.default_rng(seed)
    rows = draw.standard_normal((n, d))
    if kind == "cone":
        rows[:, 0] += 30
    elif kind == "copies":
        rows = rows[draw.integers(1 + n // 20, size=n)]
    elif kind == "single":
        rows = np.eye(d)[draw.integers(d, size=n)] * draw.choice([-1, 1], (n, 1))
    return unit(rows).astype(np.float32)


problems = st.builds(
    rows_of,
    st.sampled_from(["any", "cone", "copies", "single"]),
    st.integers(2, 300),
    st.integers(2, 40),
    st.integers(0, 2**32 - 1),
)


@given(problems)
@settings(max_examples=60, deadline=None)
def test_errors(features):
    products = Int8Products(Rows(features))
    n = len(features)
    first, second = slice(0, n // 2 + 1), slice(n // 2, n)
    expected = features[first].astype(np.float64) @ features[second].astype(np.float64).T
    codes, terms = products._codes.double().numpy(), products._terms.astype(np.float64)
    step, along = terms[int8_products.STEP], terms[int8_products.ALONG]
    found = codes[first] * step[first, None] @ (codes[second] * step[second, None]).T
    off = np.abs(found + along[first, None] + along[second] - expected)
    bound = products.errors(first, second)
    assert (off <= bound[:, None]).all()
    # A step is 1/127 of the largest entry: nothing is further off than half a step each.
    assert (bound < 0.02 * np.sqrt(features.shape[1])).all()


@given(problems, st.integers(1, 6), st.sampled_from([17, 64, 2048]), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_nothing_is_missed(features, size, tile, seed):
    """In panels and tiles of any size, the best remain; of equal products the lower ids."""
    n, truth = len(features), features.astype(np.float64) @ features.astype(np.float64).T
    np.fill_diagonal(truth, -np.inf)
    found, products = Candidates.empty(n, size), Int8Products(Rows(features))
    cuts = sorted({0, n, *np.random.default_rng(seed).integers(n, size=2).tolist()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_products, "TILE_ROWS", tile)
        patch.setattr(int8_products, "BLOCK_ROWS", 19)
        for start, stop in pairwise(cuts):
            products.search(slice(start, stop), found.part(slice(start, stop)))
    expected = -np.sort(-truth, axis=1)[:, :size]
    room = min(size, n - 1)
    np.testing.assert_allclose(found.values[:, :room], expected[:, :room], atol=1e-5)
    at = np.take_along_axis(truth, found.ids[:, :room].numpy(), 1)
    np.testing.assert_allclose(at, expected[:, :room], atol=1e-5)
    assert all(len(set(row)) == room for row in found.ids[:, :room].tolist())
    assert (found.ids[:, room:] == -1).all()
    assert (found.values[:, room:] == -torch.inf).all()


def test_of_copies_the_first_are_found():
    features = np.repeat(rows_of("any", 3, 20, 0), [400, 1, 1], axis=0)
    found = Candidates.empty(402, 3)
    Int8Products(Rows(features)).search(slice(0, 402), found)
    assert found.ids[0].tolist() == [1, 2, 3]
    assert found.ids[399].tolist() == [0, 1, 2]


def test_errors_of_long_rows():
    features = rows_of("cone", 200, 512, 0)
    assert Int8Products(Rows(features)).errors(slice(0, 200), slice(0, 200)).max() < 0.03


@pytest.mark.parametrize("kind", ["any", "cone", "copies"])
def test_both_kinds_of_products_find_the_same(kind, fast, monkeypatch):
    features = rows_of(kind, 2500, 64, 0)
    assert exact.int8_products(Rows(features)) is not None
    found = build_graph(features, 5, search="exact")
    monkeypatch.setattr(exact, "multiplies_bytes", lambda dim: False)
    assert exact.int8_products(Rows(features)) is None
    expected = build_graph(features, 5, search="exact")
    np.testing.assert_array_equal(found.similarities, expected.similarities)
    if kind != "copies":  # of many equal rows any may be found
        np.testing.assert_array_equal(found.neighbors, expected.neighbors)


def test_where_they_pay(fast, monkeypatch):
    features = rows_of("any", 400, 8, 0)
    assert exact.int8_products(Rows(features)) is not None
    assert exact.int8_products(Rows(features, held=False)) is None
    monkeypatch.setattr(exact, "INT8_PRODUCTS", 400**2 + 1)
    assert exact.int8_products(Rows(features)) is None


def test_a_broken_numba_is_named(fast, monkeypatch):
    monkeypatch.setitem(sys.modules, "transclip_fast.graph.int8_products", None)
    with pytest.warns(UserWarning, match="searched in torch, slower: .*int8_products"):
        assert exact.int8_products(Rows(rows_of("any", 400, 8, 0))) is None
