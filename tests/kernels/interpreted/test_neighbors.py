"""Exact neighbours against float64 products of all pairs."""

import numpy as np
import pytest
import torch
from transclip_fast.kernels import neighbors as kernels

from tests.conftest import unit


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
    expected = products.topk(kernels.KEPT, dim=1).values
    found = similarities.sort(dim=1, descending=True).values
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(products.gather(1, ids), similarities, atol=1e-6)
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    part, _ = kernels.candidates(features, 3, n - 2)
    assert torch.equal(part.sort(1).values, ids[3 : n - 2].sort(1).values)


@pytest.mark.parametrize("n", [1, 3])
def test_fewer_rows_than_are_kept(n):
    ids, similarities = kernels.candidates(rows_of(0, n, 8, 1.0))
    assert (ids[:, : n - 1].sort(1).values.diff() > 0).all()
    assert (ids >= 0).sum().item() == n * (n - 1)
    assert (similarities == -torch.inf).sum().item() == n * (kernels.KEPT - n + 1)
    assert kernels.certified(torch.zeros(n), similarities, torch.zeros(n), 8).all()


@pytest.mark.parametrize(("spread", "expected"), [(1.0, "all"), (0.1, "some"), (1e-4, "none")])
def test_the_certificate_proves(spread, expected):
    features = rows_of(1, 200, 33, spread)
    half = features.half()
    ids, similarities = kernels.candidates(half)
    products = products_of(features)
    nearest = products.gather(1, ids).topk(3, dim=1).values
    errors = (features.double() - half.double()).norm(dim=1)
    proven = kernels.certified(nearest[:, -1], similarities, errors, 33)
    truth = products.topk(3, dim=1).values
    np.testing.assert_array_equal(nearest[proven], truth[proven])
    share = proven.float().mean().item()
    assert {"all": share > 0.9, "some": 0 < share < 1, "none": share == 0}[expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("spread", "n"), [(1.0, 150), (0.05, 150), (1.0, 4)])
def test_neighbors_are_exact(spread, n, dtype):
    """What is not proven is searched again; of equal rows the lower id counts."""
    features = rows_of(1, n, 33, spread).to(dtype)
    if n > 20:
        features[12:17] = features[7]  # no more than are kept
    ids, similarities, again = kernels.neighbors(features, 3)
    products = products_of(features)
    expected = products.sort(dim=1, descending=True, stable=True)
    np.testing.assert_allclose(similarities, expected.values[:, :3], rtol=1e-14)
    clear = (expected.values[:, :3] - expected.values[:, 1:4]).abs() > 1e-14
    clear[:, 1:] &= clear[:, :-1].clone()
    assert torch.equal(ids[clear], expected.indices[:, :3][clear])
    if n > 20:
        assert ids[16].tolist() == [7, 12, 13]
        assert ids[7].tolist() == [12, 13, 14]
    assert (again > n // 2) == (spread == 0.05 and dtype == torch.float32)
