"""Transport against its formula in float64, and against linear programming."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from transclip_fast.heads.prompts.plot import transport


def cosines(problems, rows, columns, seed=0):
    """S (P, L, N) float64 as those of patches and prompts."""
    draw = np.random.default_rng(seed)
    return draw.uniform(-0.2, 0.6, (problems, rows, columns))


def plainly(similarities, epsilon=0.1, iterations=100, threshold=1e-2):
    """The plan of one problem, written from the formula."""
    rows, columns = similarities.shape
    kernel = np.exp(-(1 - similarities) / epsilon)
    r, c = np.ones(rows), np.ones(columns)
    for _ in range(iterations):
        before = r
        r = (1 / rows) / (kernel @ c)
        c = (1 / columns) / (kernel.T @ r)
        if np.abs(r - before).mean() < threshold:
            break
    return np.diag(r) @ kernel @ np.diag(c)


@pytest.mark.parametrize(("rows", "columns"), [(49, 4), (9, 4), (1, 4), (5, 1), (3, 7)])
@pytest.mark.parametrize("threshold", [1e-2, 1e-6])
def test_the_formula(rows, columns, threshold):
    s = cosines(11, rows, columns)
    found = transport(torch.from_numpy(s), threshold=threshold).numpy()
    for plan, similarities in zip(found, s, strict=True):
        np.testing.assert_allclose(plan, plainly(similarities, threshold=threshold), rtol=1e-10)


def test_single_precision_is_the_same_plan():
    s = cosines(11, 49, 4)
    exact = transport(torch.from_numpy(s), threshold=1e-9)
    found = transport(torch.from_numpy(s).float(), threshold=1e-9)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)


def test_marginals():
    plans = transport(torch.from_numpy(cosines(20, 49, 4)), threshold=1e-12, iterations=1000)
    torch.testing.assert_close(plans.sum(1), torch.full((20, 4), 1 / 4).double())
    torch.testing.assert_close(plans.sum(2), torch.full((20, 49), 1 / 49).double())
    published = transport(torch.from_numpy(cosines(20, 49, 4)))
    torch.testing.assert_close(published.sum(1), torch.full((20, 4), 1 / 4).double())
    even = torch.full((20, 49), 1 / 49).double()
    torch.testing.assert_close(published.sum(2), even, rtol=0.05, atol=0)


def test_small_epsilon_is_the_cheapest_transport():
    similarities, epsilon = cosines(6, 5, 4), 5e-3
    plans = transport(
        torch.from_numpy(similarities), epsilon=epsilon, iterations=5000, threshold=0.0
    ).numpy()
    sums = np.concatenate([np.kron(np.eye(5), np.ones(4)), np.kron(np.ones(5), np.eye(4))])
    weights = np.repeat([1 / 5, 1 / 4], [5, 4])
    for s, plan in zip(similarities, plans, strict=True):
        exact = linprog((1 - s).ravel(), A_eq=sums, b_eq=weights)
        cost = ((1 - s) * plan).sum()
        assert exact.fun <= cost + 1e-9
        # The entropy of a plan is at most log(L N), and weighs epsilon.
        assert cost <= exact.fun + epsilon * np.log(20)
        assert cost < (1 - s).mean() - 0.05  # uniform transport is dearer


def test_a_plan_does_not_depend_on_its_neighbours():
    s = torch.from_numpy(cosines(12, 49, 4))
    together = transport(s)
    alone = torch.cat([transport(one[None]) for one in s])
    torch.testing.assert_close(together, alone, rtol=1e-13, atol=0)


def test_one_feature_is_transported_evenly():
    plans = transport(torch.from_numpy(cosines(5, 1, 4)))
    torch.testing.assert_close(plans, torch.full((5, 1, 4), 0.25).double())


def test_no_gradient_passes():
    s = torch.from_numpy(cosines(2, 9, 4)).requires_grad_()
    assert not transport(s).requires_grad
