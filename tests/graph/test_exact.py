"""Exact search against a float64 sort of all pairs."""

import numpy as np
import pytest
import torch

from tests.conftest import unit
from transclip_fast import InputError
from transclip_fast.data.feature_rows import Rows
from transclip_fast.graph import exact, int8_products
from transclip_fast.graph.build import build_graph
from transclip_fast.graph.exact import nearest
from transclip_fast.graph.products import largest

pytestmark = pytest.mark.usefixtures("products")


@pytest.fixture(autouse=True, params=[(64, 512), (200, 512), (64, 16)], ids=str)
def _tiles(request, monkeypatch):
    """
    Blocks that do not divide the number of rows, nor the groups of columns in them.

    With the small panels half of all products is computed.
    """
    tile_rows, half_panel_rows = request.param
    monkeypatch.setitem(exact.TILE_ROWS, "cpu", tile_rows)
    monkeypatch.setattr(int8_products, "TILE_ROWS", tile_rows)
    monkeypatch.setattr(exact, "HALF_PANEL_ROWS", half_panel_rows)
    monkeypatch.setattr(int8_products, "BLOCK_ROWS", 24)
    monkeypatch.setitem(exact.PANEL_ROWS, "cpu", 40)
    monkeypatch.setattr(exact, "STEP_ROWS", 80)
    monkeypatch.setattr("transclip_fast.graph.products.GROUP_COLUMNS", 16)
    monkeypatch.setattr("transclip_fast.graph.products.GROUPS_PER_ENTRY", 1)


def brute_force(rows, queries, k, same=True):
    """Ids and similarities (rows, k) in float64; a row is not its own neighbour."""
    similarities = rows.astype(np.float64) @ queries.astype(np.float64).T
    if same:
        np.fill_diagonal(similarities, -np.inf)
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(similarities, order, 1)


def assert_lists(ids, values, rows, queries, same=True):
    """Best first, the right similarities, and the right ids where no other is as similar."""
    k = ids.shape[1]
    expected_ids, expected = brute_force(rows, queries, k + 1, same)
    np.testing.assert_allclose(values, expected[:, :k], atol=1e-6)
    assert (np.diff(values, axis=1) <= 0).all()
    gaps = -np.diff(expected, axis=1)  # (rows, k)
    clear = (gaps > 1e-5) & (np.pad(gaps, ((0, 0), (1, 0)), constant_values=1)[:, :k] > 1e-5)
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(ids[clear], expected_ids[:, :k][clear])


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_lists(problem, k, dtype):
    features, _, _ = problem(n=203)
    features = features.astype(dtype)
    graph = build_graph(features, k)
    assert graph.neighbors.dtype == np.int64
    assert graph.similarities.dtype == np.float32
    assert graph.neighbors.shape == graph.similarities.shape == (203, k)
    assert (graph.neighbors != np.arange(203)[:, None]).all()
    assert_lists(graph.neighbors, graph.similarities, features, features)
    assert graph.info["recall"] == 1.0
    assert graph.info["search"] == "exact"


def test_progress_counts_rows(problem):
    seen = []
    build_graph(problem(n=203)[0], 3, progress=lambda done, total: seen.append((done, total)))
    assert [total for _, total in seen] == [203] * len(seen)
    assert sorted(seen) == seen
    assert len(set(seen)) > 2
    assert seen[-1] == (203, 203)


def test_queries_are_read_once(problem):
    """However many rows look for them: they may be in a file of a million rows."""
    features, _, _ = problem(n=203)
    queries, read = Rows(features, held=False), []
    queries.on_read = read.append
    ids, values = nearest(torch.from_numpy(features[:130]), queries, 4)
    assert sum(read) == 203
    assert_lists(ids.numpy(), values.numpy(), features[:130], features, same=False)


def test_any_number_of_threads_finds_the_same(problem):
    features, before, graphs = problem(n=203)[0], torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            graphs.append(build_graph(features, 3))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(graphs[0].neighbors, graphs[1].neighbors)
    np.testing.assert_array_equal(graphs[0].similarities, graphs[1].similarities)


def test_exact_duplicates(problem):
    """Each copy has other copies as neighbours, never itself."""
    features, _, _ = problem(n=40)
    features = np.concatenate([features, np.repeat(features[:1], 100, axis=0)])
    graph = build_graph(features, 3)
    assert (graph.neighbors != np.arange(140)[:, None]).all()
    copies = np.r_[0, 40:140]
    assert np.isin(graph.neighbors[copies], copies).all()
    np.testing.assert_allclose(graph.similarities[copies], 1, atol=1e-6)
    _, expected = brute_force(features, features, 3)
    np.testing.assert_allclose(graph.similarities, expected, atol=1e-6)
    assert all(len(set(row)) == 3 for row in graph.neighbors.tolist())


@pytest.mark.parametrize("n", [32, 47, 300])
def test_half_of_the_products_finds_the_graph_of_all(problem, monkeypatch, n):
    """Of many copies the same ones, too; some rows have no others as near."""
    features, _, _ = problem(n=n)
    features[n // 2 :] = features[np.arange(n - n // 2) % 3]
    monkeypatch.setattr(exact, "HALF_PANEL_ROWS", 16)
    half = build_graph(features, 3)
    monkeypatch.setattr(exact, "HALF_ROWS", 0)
    whole = build_graph(features, 3)
    np.testing.assert_array_equal(half.neighbors, whole.neighbors)
    np.testing.assert_array_equal(half.similarities, whole.similarities)


@pytest.mark.filterwarnings("ignore:n_neighbors")
@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_fewer_rows_than_neighbours(problem, n):
    features, _, _ = problem(n=n)
    graph = build_graph(features, 4)
    found = n - 1
    assert graph.neighbors.shape == (n, 4)
    for i, row in enumerate(graph.neighbors.tolist()):
        assert sorted(row[:found]) == [j for j in range(n) if j != i]
    assert (graph.neighbors[:, found:] == -1).all()
    assert (graph.similarities[:, found:] == 0).all()
    _, expected = brute_force(features, features, found)
    np.testing.assert_allclose(graph.similarities[:, :found], expected, atol=1e-6)
    graph.check(n, 4)


@pytest.mark.parametrize("number", [0, 2.5, "3", True])
def test_numbers_of_neighbours_that_are_none(problem, number):
    with pytest.raises(InputError, match="n_neighbors must be a whole number >= 1"):
        build_graph(problem()[0], number)


def test_more_neighbours_than_rows_are_warned_of(problem):
    features, _, _ = problem(n=5)
    with pytest.warns(UserWarning, match="n_neighbors: 5 is not below the number of rows, 5"):
        build_graph(features, 5)
    build_graph(features, 4)


def test_features_are_checked_and_normalised(problem):
    features, _, _ = problem()
    broken = features.copy()
    broken[5, 1] = np.nan
    with pytest.raises(InputError, match=r"^features: row 5 contains NaN"):
        build_graph(broken)
    with pytest.warns(UserWarning, match="features: 77 of 77 rows were not unit"):
        graph = build_graph(7 * features)
    assert_lists(graph.neighbors, graph.similarities, features, features)


@pytest.mark.parametrize("k", [1, 5])
def test_nearest_of_other_rows(k):
    rng = np.random.default_rng(0)
    rows, queries = (unit(rng.normal(size=(n, 9))).astype(np.float32) for n in (150, 60))
    found = nearest(torch.from_numpy(rows), torch.from_numpy(queries), k)
    ids, values = map(np.asarray, found)
    assert ids.shape == values.shape == (150, k)
    assert_lists(ids, values, rows, queries, same=False)


@pytest.mark.parametrize("n_columns", [1, 7, 16, 95, 96, 97, 400])
@pytest.mark.parametrize("size", [1, 6])
def test_largest(n_columns, size):
    """Of rows with equal entries too."""
    products = torch.from_numpy(np.random.default_rng(0).integers(40, size=(30, n_columns)))
    values, columns = largest(products.float(), size)
    expected = np.sort(products.numpy(), axis=1)[:, ::-1][:, :size]
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(products.float().gather(1, columns), values)
    assert all(len(set(row)) == len(row) for row in columns.tolist())


def test_nearest_cuts_k_and_keeps_the_row_itself():
    rows = torch.eye(3)
    ids, values = nearest(rows, rows, 5)
    assert ids.shape == (3, 3)
    assert ids[:, 0].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(values, [[1, 0, 0]] * 3)


def test_lists_that_memory_cannot_hold():
    message = r"^n_neighbors: 100,000,000,000 of 5 rows take 5.46 TiB, there are .*; ask for fewer$"
    with pytest.raises(InputError, match=message):
        build_graph(np.eye(5), 100_000_000_000)
