"""Int8 products: the bound of their errors, and that no neighbour is missed."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import unit
from transclip_fast.data.feature_rows import Rows
from transclip_fast.graph import exact, int8_products
from transclip_fast.graph.build import build_graph
from transclip_fast.graph.int8_products import Int8Products
from transclip_fast.graph.rerank import BestLists


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(exact, "multiplies_bytes", lambda dim: True)
    monkeypatch.setattr(exact, "INT8_PRODUCTS", 1)
    monkeypatch.setattr(exact, "FEW_ROWS", 0)


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
    first, second = np.array_split(np.arange(len(features)), 2)
    expected = features[first].astype(np.float64) @ features[second].astype(np.float64).T
    codes, terms = products._codes.double().numpy(), products._terms.astype(np.float64)
    step, along = terms[int8_products.STEP], terms[int8_products.ALONG]
    found = codes[first] * step[first, None] @ (codes[second] * step[second, None]).T
    off = np.abs(found + along[first, None] + along[second] - expected)
    for side, some, others in ((off, first, second), (off.T, second, first)):
        bound = products._errors(products._terms[:, some], torch.from_numpy(others))
        assert (side <= bound[:, None]).all()
        # A step is 1/127 of the largest entry: nothing is further off than half a step each.
        assert (bound < 0.02 * np.sqrt(features.shape[1])).all()


@given(problems, st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_nothing_is_missed(features, size):
    """Of two blocks with themselves and each other, offered in turn, the best remain."""
    n, truth = len(features), features.astype(np.float64) @ features.astype(np.float64).T
    np.fill_diagonal(truth, -np.inf)
    best, products = BestLists(n, size), Int8Products(Rows(features))
    first, second = torch.arange(n).tensor_split(2)
    for ids, others in ((first, first), (second, second), (first, second)):
        finds = products.find(ids, others, best)
        for rows, columns, values in finds:
            np.testing.assert_allclose(values, truth[rows, columns], atol=1e-5)
        best.add(finds)
        best.merge()
    expected = -np.sort(-truth, axis=1)[:, :size]
    room = min(size, n - 1)
    np.testing.assert_allclose(best.values[:, :room], expected[:, :room], atol=1e-5)
    assert (best.ids[:, room:] == -1).all()


def test_errors_of_long_rows():
    features = rows_of("cone", 200, 512, 0)
    products = Int8Products(Rows(features))
    bound = products._errors(products._terms, torch.arange(200))
    assert bound.max() < 0.03


def all_of(features, **options):
    """The products for a block of all rows with themselves."""
    ids = torch.arange(len(features))
    return exact.int8_products(Rows(features, **options), [(ids, ids)])


@pytest.mark.parametrize("kind", ["any", "cone", "copies"])
def test_both_kinds_of_products_find_the_same(kind, fast, monkeypatch):
    features = rows_of(kind, 2500, 64, 0)
    assert all_of(features) is not None
    found = build_graph(features, 5, method="exact")
    monkeypatch.setattr(exact, "multiplies_bytes", lambda dim: False)
    assert all_of(features) is None
    expected = build_graph(features, 5, method="exact")
    np.testing.assert_array_equal(found.similarities, expected.similarities)
    if kind != "copies":  # of many equal rows any may be found
        np.testing.assert_array_equal(found.neighbors, expected.neighbors)


def test_where_they_pay(fast, monkeypatch):
    features = rows_of("any", 400, 8, 0)
    assert all_of(features) is not None
    assert all_of(features, held=False) is None
    assert all_of(features[:300]) is None  # a small pair
    monkeypatch.setattr(exact, "INT8_PRODUCTS", 400**2 // 2 + 1)
    assert all_of(features) is None


def test_a_broken_numba_is_named(fast, monkeypatch):
    monkeypatch.setitem(sys.modules, "transclip_fast.graph.int8_products", None)
    with pytest.warns(UserWarning, match="searched in torch, slower: .*int8_products"):
        assert all_of(rows_of("any", 400, 8, 0)) is None
