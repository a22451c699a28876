"""Exact neighbours against float64 products of all pairs."""

import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import unit
from transclip_fast.callbacks import NoCheckpoint
from transclip_fast.data.feature_rows import Rows
from transclip_fast.graph import exact
from transclip_fast.graph.build import build_graph
from transclip_fast.graph.candidates import Candidates
from transclip_fast.graph.job import Job
from transclip_fast.kernels import neighbors as kernels


def rows_of(seed, n, d, spread):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(unit(1 + spread * rng.normal(size=(n, d))).astype(np.float32))


def products_of(features):
    products = features.double() @ features.double().T
    return products.fill_diagonal_(-torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("n", "d"), [(77, 96), (300, 33), (129, 5), (9, 7)])
def test_candidates_are_the_largest_products(dtype, n, d):
    features = rows_of(0, n, d, 1.0).to(dtype)
    ids, similarities = kernels.candidates(features)
    products = products_of(features)
    expected = products.topk(kernels.FEWEST, dim=1).values
    found = similarities.sort(dim=1, descending=True).values
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(products.gather(1, ids), similarities, atol=1e-6)
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    part, _ = kernels.candidates(features, first=3, stop=n - 2)
    assert torch.equal(part.sort(1).values, ids[3 : n - 2].sort(1).values)


@pytest.mark.parametrize("n", [1, 3])
def test_fewer_rows_than_are_kept(n):
    ids, similarities = kernels.candidates(rows_of(0, n, 8, 1.0))
    assert (ids[:, : n - 1].sort(1).values.diff() > 0).all()
    assert (ids >= 0).sum().item() == n * (n - 1)
    assert (similarities == -torch.inf).sum().item() == n * (kernels.FEWEST - n + 1)
    assert kernels.certified(
        torch.zeros(n), similarities, torch.zeros(n), torch.tensor(0.0), 8
    ).all()


@pytest.mark.parametrize(("spread", "expected"), [(1.0, "all"), (0.1, "some"), (1e-4, "none")])
def test_the_certificate_proves(spread, expected):
    features = rows_of(1, 200, 33, spread)
    half = features.half()
    ids, similarities = kernels.candidates(half)
    products = products_of(features)
    nearest = products.gather(1, ids).topk(3, dim=1).values
    errors = (features.double() - half.double()).norm(dim=1)
    proven = kernels.certified(nearest[:, -1], similarities, errors, errors.max(), 33)
    truth = products.topk(3, dim=1).values
    np.testing.assert_array_equal(nearest[proven], truth[proven])
    share = proven.float().mean().item()
    assert {"all": share > 0.9, "some": 0 < share < 1, "none": share == 0}[expected]


def searched(features, k):
    """The graph of `build_graph`, by candidates and certificates, and rows searched again."""
    with pytest.MonkeyPatch.context() as patch:
        again, search = [], exact.search_certified
        patch.setattr(exact, "certifiable", lambda rows, size: size <= exact.GPU_CANDIDATES)
        patch.setattr(exact, "GPU_STEP_ROWS", 128)
        patch.setattr(exact, "search_certified", lambda *args: again.append(search(*args)))
        graph = build_graph(features, k, search="exact")
    return graph, *again


def assert_same(found, expected):
    np.testing.assert_array_equal(found.neighbors, expected.neighbors)
    np.testing.assert_array_equal(found.similarities, expected.similarities)
    assert found.info == expected.info


def test_graphs_of_golden_rows(golden):
    features = golden["image_features"][:200]
    found, _ = searched(features, 3)
    assert_same(found, build_graph(features, 3, search="exact"))


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 140), st.sampled_from([1, 3, 4, 5, 12]), st.sampled_from([5, 33]),
    st.sampled_from([1.0, 0.05]), st.integers(0, 4), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_graphs_are_those_of_the_exact_search(n, k, d, spread, copies, seed):
    """Near and far rows, and copies, of which those with the lower ids count."""
    features = rows_of(seed, n, d, spread).numpy()
    features[n // 3 : n // 3 + copies] = features[0]
    with pytest.warns(UserWarning, match="n_neighbors") if k >= n else nullcontext():
        found, _ = searched(features, k)
        assert_same(found, build_graph(features, k, search="exact"))


@pytest.mark.parametrize("spread", [1.0, 0.05])
def test_what_is_not_proven_is_searched_again(spread):
    features = rows_of(1, 150, 33, spread)
    _, again = searched(features, 3)
    assert (again > 75) == (spread == 0.05)


def test_a_killed_search_goes_on():
    features = rows_of(2, 300, 9, 0.1)
    states = []

    class Killed(NoCheckpoint):
        def keep(self, state):
            states.append({name: array.copy() for name, array in state().items()})

    class Found(NoCheckpoint):
        def load(self):
            return states[0]

    def search(checkpoint):
        rows = Rows(features)
        best, seen = Candidates.empty(300, 7), []
        count = lambda *rows: seen.append(rows)  # noqa: E731
        job = Job.of(300, progress=count, checkpoint=checkpoint)
        return best, exact.search_certified(rows, best, 3, job), seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "GPU_STEP_ROWS", 128)
        (whole, all_again, seen), (rest, again, later) = search(Killed()), search(Found())
    assert seen == [(128, 300), (256, 300), (300, 300)]
    assert later == seen[1:]
    assert 0 < again < all_again  # without the rows that the checkpoint had
    assert torch.equal(whole.ids, rest.ids)
    assert torch.equal(whole.values, rest.values)


def test_where_rows_are_searched_this_way():
    held = Rows(rows_of(0, 9, 5, 1.0))
    assert not exact.certifiable(held, 7)
    held.device = torch.device("cuda")
    assert exact.certifiable(held, 7)
    assert not exact.certifiable(held, exact.GPU_CANDIDATES + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "transclip_fast.kernels.neighbors", None)
        with pytest.warns(UserWarning, match="searched in torch, slower"):
            assert not exact.certifiable(held, 7)


@pytest.mark.parametrize(("size", "kept"), [(1, 8), (8, 8), (9, 16), (16, 16)])
def test_longer_lists(size, kept):
    features = rows_of(0, 140, 33, 1.0)
    ids, similarities = kernels.candidates(features, size)
    expected = products_of(features).topk(kept, dim=1).values
    np.testing.assert_allclose(
        similarities.sort(dim=1, descending=True).values, expected, atol=1e-6
    )
    np.testing.assert_allclose(products_of(features).gather(1, ids), similarities, atol=1e-6)
