"""Approximate search, and every search on awkward features, against a float64 sort of all pairs."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import unit
from tests.graph.test_exact import brute_force
from transclip_fast import InputError
from transclip_fast.data.feature_rows import Rows
from transclip_fast.graph import (
    approximate,
    build,
    centres,
    exact,
    faiss_index,
    list_search,
    recall,
)
from transclip_fast.graph.build import build_graph

SEARCHES = ("exact", "faiss")
pytestmark = pytest.mark.usefixtures("products")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setitem(exact.TILE_ROWS, "cpu", 64)
    monkeypatch.setitem(exact.PANEL_ROWS, "cpu", 50)
    monkeypatch.setattr(exact, "STEP_ROWS", 100)
    monkeypatch.setattr(list_search, "BLOCK_PRODUCTS", 512)
    monkeypatch.setattr(list_search, "BATCH_BLOCKS", 9)
    monkeypatch.setattr(approximate, "PANEL_ROWS", 60)
    monkeypatch.setattr(approximate, "STEP_ROWS", 300)
    monkeypatch.setattr(centres, "BLOCK_ROWS", 33)


def clustered(n, k, d=16, noise=0.5, seed=0):
    """Features (N, d) around k directions (k, d)."""
    rng = np.random.default_rng(seed)
    centres = unit(rng.normal(size=(k, d)))
    rows = centres[rng.integers(k, size=n)] + noise * unit(rng.normal(size=(n, d)))
    return unit(rows).astype(np.float32), centres.astype(np.float32)


def true_recall(graph, features):
    """Share of the exact neighbours' similarities that the lists reach, and the mean shortfall."""
    k = min(graph.n_neighbors, len(features) - 1)
    _, expected = brute_force(features, features, k)
    found = np.einsum(
        "nd,nkd->nk", features.astype(np.float64), features.astype(np.float64)[graph.neighbors]
    )[:, :k]
    found = np.where(graph.neighbors[:, :k] >= 0, found, 0)
    hits = (graph.neighbors[:, :k] >= 0) & (found >= expected[:, -1:] - 1e-9)
    return hits.mean(), (expected - found).mean()


@pytest.mark.parametrize("index", [None, "IVF16,Flat", "IVF16,SQfp16", "IVF16,SQ8", "HNSW8"])
@pytest.mark.parametrize("target", [0.5, 0.9, 0.99, 1.0])
def test_recall_is_reached_and_true_where_all_rows_are_sampled(index, target):
    features, _ = clustered(700, 40)
    graph = build_graph(features, 3, search="faiss", index=index, recall=target)
    graph.check(700, 3)
    expected, shortfall = true_recall(graph, features)
    info = graph.info
    assert info["search"] == "faiss"
    assert info["recall_target"] == target
    assert info["recall_rows"] == 700
    assert info["recall"] == pytest.approx(expected, abs=1e-12)
    assert info["recall"] >= target
    assert info["weight_error"] == pytest.approx(shortfall, abs=1e-9)
    if index is None:
        assert info["index"] == f"IVF{info['lists']},Flat"
        assert 1 <= info["probes"] <= info["lists"] < 700
    else:
        assert info["index"] == index


def test_more_recall_takes_more_probes():
    features, _ = clustered(700, 40, noise=2)
    probes = [
        build_graph(features, 3, search="faiss", recall=target).info["probes"]
        for target in (0, 0.95, 1)
    ]
    assert probes[0] == 1
    assert probes == sorted(probes)
    assert probes[1] < probes[2]


@pytest.mark.parametrize("target", [0.3, 0.9, 0.97, 1.0])
def test_as_few_probes_as_reach_the_recall(target):
    """The lower bound of their recall is above the target, and one list less would miss it."""
    features, _ = clustered(600, 30, noise=1.5)
    rows = Rows(features)
    middles = centres.kmeans_centres(rows)
    sample = recall.RecallSample.draw(rows, 3)
    order = np.argsort(-features.astype(float) @ middles.numpy().T.astype(float), axis=1)
    own = order[:, 0]
    truth, _ = brute_force(features, features, 3)

    def lower_bound(probes):
        found = (order[:, :probes, None] == own[truth][:, None]).any(1).mean(1)
        return found.mean() - 1.645 * found.std() / np.sqrt(len(found))

    probes = sample.probes(middles, torch.from_numpy(own[sample.neighbors.numpy()]), target)
    assert lower_bound(probes) >= target
    assert probes == 1 or lower_bound(probes - 1) < target


def test_a_sample_of_the_rows(monkeypatch):
    monkeypatch.setattr(recall, "RECALL_SAMPLE_ROWS", 200)
    features, _ = clustered(900, 40)
    graph = build_graph(features, 3, search="faiss", recall=0.95)
    assert graph.info["recall_rows"] == 200
    assert abs(graph.info["recall"] - true_recall(graph, features)[0]) < 0.05


def test_auto_goes_by_size_and_by_what_is_installed(monkeypatch):
    features, _ = clustered(300, 10)
    assert build_graph(features).info == {"search": "exact", "recall": 1.0}
    monkeypatch.setitem(build.EXACT_ROWS, "cpu", 299)
    assert build_graph(features).info["search"] == "faiss"
    monkeypatch.setattr(faiss_index, "faiss_installed", lambda: False)
    with pytest.warns(UserWarning, match="FAISS is not installed: all pairs"):
        assert build_graph(features).info["search"] == "exact"


def test_the_nearest_centres_are_those_of_float64():
    """Where float32 cannot tell two centres apart, too."""
    rng = np.random.default_rng(0)
    middles = unit(rng.normal(size=(30, 64)))
    middles = unit(np.concatenate([middles, middles + 1e-7 * rng.normal(size=(30, 64))]))
    features = unit(middles[rng.integers(60, size=500)] + 0.3 * rng.normal(size=(500, 64)))
    features, middles = features.astype(np.float32), middles.astype(np.float32)
    truth = np.argsort(-features.astype(float) @ middles.T.astype(float), axis=1, kind="stable")
    for size in (1, 2, 7, 60, 99):
        found = centres.nearest_centres(
            torch.from_numpy(features), torch.from_numpy(middles), size
        ).numpy()
        np.testing.assert_array_equal(found[:, 0], truth[:, 0])
        np.testing.assert_array_equal(np.sort(found, 1), np.sort(truth[:, :size], 1))


@pytest.mark.parametrize("search", SEARCHES)
def test_thousands_of_copies(search):
    """Each has other copies as its neighbours, and the rest keeps its own."""
    features, _ = clustered(300, 10)
    features = np.concatenate([features, np.repeat(features[:1], 3000, axis=0)])
    graph = build_graph(features, 3, search=search)
    graph.check(3300, 3)
    copies = np.r_[0, 300:3300]
    assert np.isin(graph.neighbors[copies], copies).all()
    np.testing.assert_allclose(graph.similarities[copies], 1, atol=1e-6)
    assert all(len(set(row)) == 3 for row in graph.neighbors[copies].tolist())
    assert true_recall(graph, features)[0] >= 0.99


@pytest.mark.filterwarnings("ignore:n_neighbors")
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_no_more_rows_than_neighbours(search, n):
    features, _ = clustered(n, 2)
    graph = build_graph(features, 4, search=search, recall=1.0)
    found = min(n - 1, 4)
    for i, row in enumerate(graph.neighbors.tolist()):
        assert sorted(row[:found]) == [j for j in range(n) if j != i]
    assert (graph.neighbors[:, found:] == -1).all()
    assert (graph.similarities[:, found:] == 0).all()
    assert graph.info["recall"] == 1.0


def test_rows_without_candidates():
    """A row alone in the lists that it probes has no neighbours, which counts as error."""
    features, _ = clustered(200, 4, noise=0.05)
    features[7] = -features[:4].mean(0) / np.linalg.norm(features[:4].mean(0))
    graph = build_graph(features, 3, search="faiss", recall=0.0)
    graph.check(200, 3)
    assert graph.info["probes"] == 1
    assert (graph.similarities[graph.neighbors < 0] == 0).all()
    expected, shortfall = true_recall(graph, features)
    assert graph.info["recall"] == pytest.approx(expected)
    assert graph.info["weight_error"] == pytest.approx(shortfall, abs=1e-9)


@pytest.mark.parametrize("search", SEARCHES)
def test_negative_similarities(search):
    """Orthants: all but a few rows of each point away from all others."""
    features = unit(np.concatenate([np.eye(6), -np.eye(6)]) - 0.05).astype(np.float32)
    graph = build_graph(features, 11, search=search, recall=1.0)
    assert (graph.similarities[:, -1] < -0.9).all()
    assert true_recall(graph, features)[0] == 1.0


@pytest.mark.parametrize("search", SEARCHES)
def test_a_hub(search):
    """The middle of a cone is the nearest row of every other."""
    rng = np.random.default_rng(0)
    rest = np.concatenate([np.ones((300, 1)), unit(rng.normal(size=(300, 200)))], axis=1)
    features = unit(np.concatenate([np.eye(1, 201), rest])).astype(np.float32)
    graph = build_graph(features, 2, search=search, recall=1.0)
    assert (graph.neighbors[1:, 0] == 0).all()
    assert true_recall(graph, features)[0] == 1.0


@pytest.mark.filterwarnings("ignore:n_neighbors")
@pytest.mark.parametrize("search", SEARCHES)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    groups=st.lists(st.tuples(st.integers(2, 60), st.sampled_from([0.0, 0.1, 1.0])), min_size=1,
                    max_size=5),
    k=st.integers(1, 9),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_structure(search, groups, k, seed):
    """Groups of any size, of copies or scattered: with all lists probed, nothing is missed."""
    rng = np.random.default_rng(seed)
    features = np.concatenate(
        [unit(rng.normal(size=(1, 5)) + s * rng.normal(size=(n, 5))) for n, s in groups]
    ).astype(np.float32)
    graph = build_graph(features, k, search=search, recall=1.0)
    graph.check(len(features), k)
    assert graph.info["recall"] == 1.0
    assert true_recall(graph, features)[0] == 1.0
    assert (np.diff(graph.similarities[graph.neighbors[:, -1] >= 0], axis=1) <= 0).all()


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("scale", [1, 3])
def test_a_file_is_read_as_an_array_is(search, scale, tmp_path):
    features, _ = clustered(500, 10)
    np.save(tmp_path / "features.npy", (scale * features).astype(np.float16))
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")

    def graph(rows):
        return build_graph(rows, 3, search=search)

    with pytest.warns(UserWarning, match="500 of 500 rows") if scale > 1 else np.errstate():
        found, expected = graph(mapped), graph(np.array(mapped))
    np.testing.assert_array_equal(found.neighbors, expected.neighbors)
    np.testing.assert_array_equal(found.similarities, expected.similarities)


@pytest.mark.parametrize("search", SEARCHES)
def test_any_number_of_threads_finds_the_same(search):
    features, _ = clustered(900, 30)
    before = torch.get_num_threads()
    graphs = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            graphs.append(build_graph(features, 3, search=search))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(graphs[0].neighbors, graphs[1].neighbors)


class Killed(Exception):
    pass


class Memory:
    """A checkpoint that keeps every state, and stops the search after some of them."""

    def __init__(self, lives):
        self.lives, self.state = lives, None

    def load(self):
        return self.state

    def keep(self, state):
        self.state = {name: np.array(array) for name, array in state().items()}
        self.lives -= 1
        if self.lives == 0:
            raise Killed


@pytest.mark.parametrize("search", SEARCHES)
def test_a_killed_search_goes_on(search):
    features, _ = clustered(900, 30)
    how = {"search": search, "recall": 0.97}
    expected = build_graph(features, 3, **how)
    for lives in (1, 3, 5):
        memory = Memory(lives)
        with pytest.raises(Killed):
            build_graph(features, 3, **how, checkpoint=memory)
        memory.lives = -1
        graph = build_graph(features, 3, **how, checkpoint=memory)
        np.testing.assert_array_equal(graph.neighbors, expected.neighbors)
        assert graph.info == expected.info


def test_rows_that_were_streamed_before_stay_rounded(tmp_path):
    """A search of rows in a file compares rows of half precision; with more memory it resumes."""
    features, _ = clustered(900, 30, noise=0.1)
    np.save(tmp_path / "rows.npy", features)
    streamed = np.load(tmp_path / "rows.npy", mmap_mode="r")
    how = {"search": "faiss", "recall": 1.0}
    expected = build_graph(features, 3, search="exact")
    memory = Memory(10)
    with pytest.raises(Killed):
        build_graph(streamed, 3, **how, checkpoint=memory)
    memory.lives = -1
    graph = build_graph(features, 3, **how, checkpoint=memory)
    whole = build_graph(streamed, 3, **how)
    np.testing.assert_array_equal(whole.neighbors, expected.neighbors)
    np.testing.assert_array_equal(graph.neighbors, expected.neighbors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": "hnsw"}, "search must be one of auto, faiss, exact, cuvs"),
        ({"search": "exact", "index": "Flat"}, "search 'exact' uses no FAISS index"),
        ({"recall": 1.1}, "recall must be between 0 and 1"),
        ({"recall": float("nan")}, "recall must be between 0 and 1"),
        ({"n_neighbors": 0}, "n_neighbors must be a whole number"),
    ],
)
def test_errors(options, message):
    with pytest.raises(InputError, match=message):
        build_graph(clustered(30, 2)[0], **options)
