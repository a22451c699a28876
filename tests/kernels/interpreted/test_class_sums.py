"""Class sums against float64, beside torch."""

import numpy as np
import pytest
import torch

from tests.kernels.problems import assert_no_worse, random_z
from transclip_fast.kernels import class_sums as kernels
from transclip_fast.ops import torch_backend as twin
from transclip_fast.ops import triton_backend as ops


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def truth_of(z, features, nodes):
    """Sums (K, d) and masses (K,) float64, what was dropped shared as what was kept."""
    kept = z.dense().double().numpy()[nodes]
    f = features.double().numpy()
    dropped = (
        (1 - z.values.sum(1)).double().numpy()[nodes] if z.classes is not None else 0 * f[:, 0]
    )
    share = kept.sum(0) / kept.sum()
    return kept.T @ f + np.outer(share, dropped @ f), kept.sum(0) + share * dropped.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("n", "k", "d", "rank"),
    [(77, 33, 96, None), (77, 33, 96, 7), (300, 3, 33, 2), (300, 5, 33, None), (1, 1, 5, 1),
     (1, 1, 5, None)],
)  # fmt: skip
def test_class_sums(rng, monkeypatch, dtype, n, k, d, rank):
    monkeypatch.setattr(kernels, "SHORTEST", 20)  # a class in several pieces
    monkeypatch.setattr(kernels, "SHARE", 100)
    features = torch.from_numpy(rng.normal(size=(n, d))).to(dtype)
    z = random_z(rng, n, k, rank)
    if rank is None and k > 5:
        z.values[:, 5] = 0  # a class without mass
    nodes = torch.from_numpy(rng.permutation(n))
    found = ops.class_sums(z, features, nodes)
    same = twin.class_sums(z, features.float(), nodes)
    for ours, theirs, truth in zip(found, same, truth_of(z, features, nodes.numpy()), strict=True):
        assert ours.dtype == torch.float64
        assert ours.shape == truth.shape
        assert_no_worse(ours, theirs, truth, 1e-12)
    if rank is None and k > 5:
        assert found[1][5] == 0
        assert (found[0][5] == 0).all()
    again = ops.class_sums(z, features, nodes)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


@pytest.mark.parametrize("rank", [None, 2])
def test_many_similar_rows_keep_their_digits(rng, rank):
    """What is left of the squares is the variance: errors must not add up."""
    features = torch.from_numpy((0.7 + 1e-3 * rng.normal(size=(1500, 9))).astype(np.float32))
    z = random_z(rng, 1500, 3, rank)
    found = ops.class_sums(z, features)
    for ours, truth in zip(found, truth_of(z, features, np.arange(1500)), strict=True):
        np.testing.assert_allclose(ours, truth, rtol=1e-9)
