"""Int8 products: the bound of their errors, and that no neighbour is missed."""

import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import unit
from transclip_fast.data.feature_rows import Rows
from transclip_fast.graph import int8_products, list_search, products
from transclip_fast.graph.build import build_graph
from transclip_fast.graph.candidates import Candidates
from transclip_fast.graph.exact import nearest
from transclip_fast.graph.int8_products import Int8Rows, Int8Search
from transclip_fast.graph.job import Job


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(products, "multiplies_bytes", lambda dim: True)
    monkeypatch.setattr(products, "INT8_PRODUCTS", 1)


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


def coded(rows, centre):
    return Int8Rows.of(torch.from_numpy(rows), torch.from_numpy(centre))


@given(problems, st.booleans())
@settings(max_examples=60, deadline=None)
def test_errors(features, far):
    """The bound holds for any centre; one among the rows keeps it small."""
    n = len(features)
    first, second = features[: n // 2 + 1], features[n // 2 :]
    expected = first.astype(np.float64) @ second.astype(np.float64).T
    centre = -features[0] if far else features.mean(0)
    rows, others = coded(first, centre), coded(second, centre)
    (step, along), (others_step, others_along) = (
        x.terms[[int8_products.STEP, int8_products.ALONG]].astype(np.float64)
        for x in (rows, others)
    )
    codes, others_codes = (x.codes.double().numpy() for x in (rows, others))
    found = codes * step[:, None] @ (others_codes * others_step[:, None]).T
    off = np.abs(found + along[:, None] + others_along - expected)
    bound = rows.errors(others)
    assert (off <= bound[:, None]).all()
    # A step is 1/127 of the largest entry: nothing is further off than half a step each.
    assert (bound < (0.04 if far else 0.02) * np.sqrt(features.shape[1])).all()


@given(problems, st.integers(1, 20), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_all_that_count_are_entered(features, size, seed):
    """
    Names in any order, lists that hold something, bounds below which products do not count, and
    fewer rows than a list takes.
    """
    draw = np.random.default_rng(seed)
    n = len(features)
    rows, others = np.arange(n // 2 + 1), draw.permutation(n)[: draw.integers(1, n + 1)]
    truth = features[rows].astype(np.float64) @ features[others].astype(np.float64).T
    truth[rows[:, None] == others] = -np.inf
    lowest = draw.choice([-np.inf, 0.1, 0.8], len(rows)).astype(np.float32)
    found, centre = Candidates.empty(len(rows), size), features.mean(0)
    held = draw.random(len(rows)) < 0.5  # a list with one entry that is better than all
    found.values[held, 0], found.ids[held, 0] = 2.0, n
    arrays = rows, others, lowest, found
    again = coded(features[rows], centre).enter(coded(features[others], centre), *arrays)
    assert again <= truth.size
    for i, row in enumerate(truth):
        expected = np.sort(row[row > -np.inf])[::-1][: size - held[i]]
        expected = expected[expected >= lowest[i] + 1e-5]
        values = found.values[i, int(held[i]) :].numpy()
        np.testing.assert_allclose(values[: len(expected)], expected, atol=1e-6)
        names = found.ids[i][found.ids[i] >= 0].tolist()
        assert len(set(names)) == len(names)
        assert i not in names
        for name, value in zip(names[int(held[i]) :], values, strict=False):
            assert value == pytest.approx(row[others == name][0], abs=1e-6)


@given(problems, st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_largest(features, size):
    centre, some = features.mean(0), features[: len(features) // 3 + 1]
    truth = some.astype(np.float64) @ features.astype(np.float64).T
    values, columns = coded(some, centre).largest(coded(features, centre), size)
    expected = -np.sort(-truth, axis=1)[:, :size]
    np.testing.assert_allclose(values, expected, atol=1e-6)
    at = np.take_along_axis(truth, columns.numpy(), 1)
    np.testing.assert_allclose(at, expected, atol=1e-6)
    assert all(len(set(row)) == len(row) for row in columns.tolist())


@given(problems, st.integers(1, 6), st.sampled_from([17, 64, 2048]), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_nothing_is_missed(features, size, tile, seed):
    """In panels and tiles of any size, the best remain; of equal products the lower ids."""
    n, truth = len(features), features.astype(np.float64) @ features.astype(np.float64).T
    np.fill_diagonal(truth, -np.inf)
    found, search = Candidates.empty(n, size), Int8Search(Rows(features))
    cuts = sorted({0, n, *np.random.default_rng(seed).integers(n, size=2).tolist()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_products, "TILE_ROWS", tile)
        patch.setattr(int8_products, "BLOCK_ROWS", 19)
        for start, stop in pairwise(cuts):
            search.panel(slice(start, stop), found.part(slice(start, stop)))
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
    Int8Search(Rows(features)).panel(slice(0, 402), found)
    assert found.ids[0].tolist() == [1, 2, 3]
    assert found.ids[399].tolist() == [0, 1, 2]


def test_errors_of_long_rows():
    features = rows_of("cone", 200, 512, 0)
    rows = coded(features, features.mean(0))
    assert rows.errors(rows).max() < 0.03


@pytest.mark.parametrize("kind", ["any", "cone", "copies"])
@pytest.mark.parametrize("search", ["exact", "faiss"])
def test_both_kinds_of_products_find_the_same(kind, search, fast, monkeypatch):
    features = rows_of(kind, 2500, 64, 0)
    products_made = []
    enter = Int8Rows.enter

    def entered(*arguments):
        products_made.append(enter(*arguments))
        return products_made[-1]

    monkeypatch.setattr(Int8Rows, "enter", entered)
    found = build_graph(features, 5, search=search)
    assert products_made
    products_made.clear()
    monkeypatch.setattr(products, "multiplies_bytes", lambda dim: False)
    expected = build_graph(features, 5, search=search)
    assert not products_made
    np.testing.assert_array_equal(found.similarities, expected.similarities)
    assert found.info == expected.info
    if kind != "copies":  # of many equal rows any may be found
        np.testing.assert_array_equal(found.neighbors, expected.neighbors)


def test_a_list_of_copies_is_not_multiplied_twice(fast, monkeypatch):
    features = rows_of("any", 3, 64, 0)[np.arange(3000) % 3]
    again = []

    class Counting(Int8Rows):
        def enter(self, *arguments):
            again.append(super().enter(*arguments))
            return again[-1]

    monkeypatch.setattr(list_search, "int8_products", lambda *_: SimpleNamespace(Int8Rows=Counting))
    graph = build_graph(features, 3, search="faiss")
    np.testing.assert_allclose(graph.similarities, 1, atol=1e-6)
    assert 0 < sum(again) < 3000 * 1000 / 4  # each row has 999 copies


def test_rows_in_another_memory_order(fast):
    features = torch.from_numpy(rows_of("any", 90, 16, 0))
    by_columns = features.T.contiguous().T
    found, expected = (nearest(rows[:40], rows, 3) for rows in (by_columns, features))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_where_they_pay(fast, monkeypatch):
    cpu = torch.device("cpu")
    assert products.int8_products(400, 8, cpu) is int8_products
    monkeypatch.setattr(products, "INT8_PRODUCTS", 401)
    assert products.int8_products(400, 8, cpu) is None
    assert products.int8_products(401, 8, cpu) is int8_products
    assert products.int8_products(401, 8, torch.device("cuda")) is None
    monkeypatch.setattr(products, "multiplies_bytes", lambda dim: False)
    assert products.int8_products(401, 8, cpu) is None


def test_a_broken_numba_is_named(fast, monkeypatch):
    monkeypatch.setitem(sys.modules, "transclip_fast.graph.int8_products", None)
    with pytest.warns(UserWarning, match="searched in torch, slower: .*int8_products"):
        assert products.int8_products(400, 8, torch.device("cpu")) is None


def test_a_panel_that_was_searched_in_part_is_searched_anew(monkeypatch):
    """Panels of another number of processes end at other rows."""
    features = rows_of("any", 300, 20, 0)
    search, state = Int8Search(Rows(features)), {}
    job = Job.of(300, checkpoint=SimpleNamespace(keep=lambda found: state.update(found())))
    whole = Candidates.empty(300, 5)
    job.search_panels(search.panel, whole, 100, 300, None)
    searched = np.arange(300) < 250
    expected = whole.ids.clone(), whole.values.clone()
    for saved in (state | {"searched": searched}, {"done": searched}):  # the latter of FAISS
        found = Candidates.empty(300, 5)
        job.search_panels(search.panel, found, 100, 300, saved)
        assert torch.equal(found.ids, expected[0])
        assert torch.equal(found.values, expected[1])
