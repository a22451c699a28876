"""The graph over processes: the bits of one process, for any number of them."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.conftest import unit
from tests.ranks import on_ranks
from transclip_fast.data import feature_rows
from transclip_fast.errors import InputError
from transclip_fast.graph import build, centres, list_search, recall
from transclip_fast.graph.build import build_graph, whole_rows
from transclip_fast.ops.exchange import Exchange, Partition
from transclip_fast.ranks import current_ranks


def rows(n, d=16, copies=0, seed=0):
    """Rows around 40 directions; the first `copies` are one row."""
    rng = np.random.default_rng(seed)
    centres = unit(rng.normal(size=(40, d)))
    found = unit(centres[rng.integers(40, size=n)] + 0.5 * unit(rng.normal(size=(n, d))))
    found[rng.permutation(n)[:copies]] = found[0]
    return found.astype(np.float32)


def shared(features, k, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_graph(features, k, **options)


def same(graph, other):
    np.testing.assert_array_equal(graph.neighbors, other.neighbors)
    np.testing.assert_array_equal(graph.similarities, other.similarities)
    assert graph.info == other.info


@pytest.mark.filterwarnings("ignore:n_neighbors")
@pytest.mark.parametrize("search", ["exact", "faiss"])
@pytest.mark.parametrize(
    ("n", "k", "copies", "size"),
    [(2100, 3, 0, 2), (2100, 3, 300, 4), (1500, 3, 60, 3), (700, 5, 0, 3), (3, 4, 0, 4)],
)
def test_any_number_of_processes_finds_the_graph_of_one(search, n, k, copies, size, monkeypatch):
    """Uneven parts, processes without rows, fewer rows than these, copies, k >= N."""
    monkeypatch.setattr(list_search, "BLOCK_PRODUCTS", 1 << 12)
    monkeypatch.setattr(list_search, "BATCH_BLOCKS", 5)
    features, options = rows(n, copies=copies), {"search": search}
    expected = build_graph(features, k, **options)
    for graph in on_ranks(size, shared, features, k, options):
        same(graph, expected)


def test_rows_in_a_file(tmp_path):
    np.save(tmp_path / "x.npy", rows(1500, copies=30).astype(np.float16))
    features = np.load(tmp_path / "x.npy", mmap_mode="r")
    expected = build_graph(features, 3, search="faiss")
    for graph in on_ranks(3, shared, features, 3, {"search": "faiss"}):
        same(graph, expected)


def read_and_said(features):
    """How many rows a rank has checked, its error or warnings, and its graph."""
    checked, check = [], build.unit_divisors

    def counted(matrix, *arguments):
        checked.append(len(matrix))
        return check(matrix, *arguments)

    build.unit_divisors = feature_rows.unit_divisors = counted
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            graph = build_graph(features, 3, search="faiss")
        except InputError as error:
            return sum(checked), str(error), None
    return sum(checked), [str(warning.message) for warning in said], graph


def test_each_process_checks_its_own_rows_of_a_file(tmp_path):
    np.save(tmp_path / "x.npy", rows(1500))
    found = on_ranks(3, read_and_said, np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert [checked for checked, *_ in found] == [512, 512, 476]


@pytest.mark.parametrize(("scale", "message"), [(np.nan, "row 1400 contains NaN"), (2, "row 1400")])
def test_processes_say_alike_what_the_check_of_one_finds(scale, message, tmp_path):
    features = rows(1500)
    features[1400] *= scale
    np.save(tmp_path / "x.npy", features)
    features = np.load(tmp_path / "x.npy", mmap_mode="r")
    _, expected, graph = read_and_said(features)
    assert message in str(expected)
    for _, said, of_rank in on_ranks(3, read_and_said, features):
        assert said == expected
        if graph is not None:
            same(of_rank, graph)


def bytes_sent(features, k, search, own_rows):
    """The bytes that a rank has counted, and those of the documented steps."""
    sent, rounds, searches = [], [], []
    count, merge, fill = Exchange._count, list_search._merge, list_search.ListSearch.fill

    def counted(exchange, *arguments):
        before = exchange.sent
        count(exchange, *arguments)
        sent.append(exchange.sent - before)

    def merged(*arguments):
        rounds.append(1)
        merge(*arguments)

    def filled(search, *arguments):
        searches.append(search)
        fill(search, *arguments)

    Exchange._count, list_search._merge, list_search.ListSearch.fill = counted, merged, filled
    build_graph(features, k, search=search, own_rows=own_rows)
    total = sum(sent)
    expected = sum(bytes_of_lists(found, features.shape, k, len(rounds)) for found in searches)
    if not own_rows:
        expected += 12 * k * n_own(len(features)) * (current_ranks().size - 1)
    return total, expected


def n_own(n_rows):
    rows = Partition(n_rows, current_ranks()).rows
    return rows.stop - rows.start


def bytes_of_lists(search, shape, k, n_rounds):
    """What a rank sends for a search of lists around centres, by going through all pairs."""
    (n_rows, dim), ranks, n_lists = shape, current_ranks(), len(search.centres)
    own, others = Partition(n_rows, ranks).rows, ranks.size - 1
    generator = torch.Generator().manual_seed(recall.SAMPLE_SEED)
    measured = torch.randperm(n_rows, generator=generator)[:1000].numpy()
    n_measured = int(((measured >= own.start) & (measured < own.stop)).sum())
    n_sample = n_own(min(n_rows, centres.SAMPLE_ROWS_PER_LIST * n_lists))
    expected = others * (12 * 1000 * (k + 5) + 8 * n_measured * (k + 4) + 16 * n_sample)
    expected += others * (4 * dim * n_lists * ranks.leads + 16 * n_lists + 8 * (n_rounds + 2))

    blocks = search.blocks
    parts = ranks.all_gather([[blocks.own.start, blocks.own.stop], search.nearest.tolist()])
    nearest = np.array([row for _, part in parts for row in part])  # (N, lists that a row probes)
    has = np.zeros((ranks.size, n_lists), bool)  # a rank blocks of a list
    for rank, (part, _) in enumerate(parts):
        for number in range(*part):
            has[rank, blocks.block(number)[0]] = True
    has[ranks.rank] = False
    places = has.sum(0)[nearest[own]]
    expected += 8 * int(places.sum()) + 8 * int(places[:, 0].sum())

    for number in range(blocks.own.start, blocks.own.stop):
        which, _, some = blocks.block(number)
        rows = np.flatnonzero((nearest == which).any(1))[some]
        remote = (rows < own.start) | (rows >= own.stop)
        expected += (8 + 12 * (k + 4)) * int(remote.sum())
    return expected


@pytest.mark.parametrize(
    ("search", "own_rows"), [("exact", False), ("exact", True), ("faiss", True)]
)
def test_bytes_are_those_of_the_documentation(search, own_rows, monkeypatch):
    monkeypatch.setattr(list_search, "BLOCK_PRODUCTS", 1 << 12)
    monkeypatch.setattr(list_search, "BATCH_BLOCKS", 5)
    found = on_ranks(4, bytes_sent, rows(2100, copies=30), 3, search, own_rows)
    assert [sent for sent, _ in found] == [expected for _, expected in found]
    assert (sum(sent for sent, _ in found) == 0) == (search == "exact" and own_rows)


def device_of(features, search):
    return whole_rows(features, "features", "meta", search=search).device.type


def test_shared_rows_are_where_they_are_searched(monkeypatch):
    """FAISS searches them on the CPU, so that no GPU gets all of them."""
    features = torch.zeros(300, 4)
    monkeypatch.setattr(
        build, "Rows", lambda rows, name, device, **_: SimpleNamespace(device=torch.device(device))
    )
    for search, expected in (("auto", "cpu"), ("faiss", "cpu"), ("exact", "meta")):
        assert on_ranks(2, device_of, features, search) == [expected] * 2
    assert device_of(features, "auto") == "meta"
