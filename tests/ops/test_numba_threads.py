"""The compiled operations on several threads."""

import numpy as np
import pytest
import torch

from tests.ops.test_sparse import K, N, assignments_of, case, empty, sparse_z
from tests.ops.test_torch_backend import affinity_of
from transclip_fast.ops.numba_backend import NumbaOps, equal_classes
from transclip_fast.types import Scores, Truncation


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_threads_change_nothing(rng):
    """Every result is the same bit for bit for any number of threads."""
    n, k = 3000, 50
    _, (features, linear) = case(rng, n, k)
    edges = zip(rng.integers(n, size=3 * n), rng.integers(n, size=3 * n), strict=True)
    affinity, _ = affinity_of([(i, j, 0.2) for i, j in edges], n)
    rows, found = torch.from_numpy(rng.permutation(n)), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            z, out = empty((n, k), 9, 1e-4), empty((n, k), 9, 1e-4)
            base = Scores.empty(affinity.max_message(), k, Truncation(9, 9))
            started = NumbaOps.start(features, linear.weights, None, out=z)
            ops = NumbaOps(affinity)
            ops.score(features, linear, out=base)
            ops.sweep(base, z, out=out)
            sums = ops.class_sums(out, features)
            energies, lists = ops.energies(out), [*ops.best(out), torch.cat(ops.pack(out, rows, z))]
            found.append(
                [*started, base.values, base.tail, out.values, out.bound, *sums, *energies, *lists]
            )
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("number", [1, 2, 3, 50])
@pytest.mark.parametrize("crowded", [False, True])
def test_every_class_is_summed_by_one_thread(rng, number, crowded):
    """Also where there are more threads than classes, and where one class has everything."""
    z = np.eye(K)[np.full(N, 3)] if crowded else sparse_z(rng)
    parts = equal_classes(assignments_of(z, 5), number)
    assert [k for part in parts for k in range(part.start, part.stop)] == list(range(K))
    assert len(parts) <= number
