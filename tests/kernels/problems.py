"""Small difficult problems, and their truth in float64."""

from __future__ import annotations

import numpy as np
import torch

from tests import reference
from transclip_fast.types import Affinity, Assignments, Scores

NAN = float("nan")


def log_softmax(x):
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def affinity_of(edges, n):
    """Affinity of a list of (row, column, weight), and the same dense."""
    edges = sorted(edges, key=lambda edge: edge[0])
    rows = np.array([edge[0] for edge in edges], np.int64)
    columns = np.array([edge[1] for edge in edges], np.int64)
    weights = np.array([edge[2] for edge in edges], np.float32)
    dense = np.zeros((n, n))
    np.add.at(dense, (rows, columns), weights.astype(np.float64))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n))])
    return Affinity(*map(torch.from_numpy, (offsets, columns, weights))), dense


def difficult_graph(rng, n, hub=0):
    """Negative weights, duplicate edges, self-loops, rows without edges, a hub of many edges."""
    edges = [(0, int(j), 0.02) for j in rng.integers(0, n, hub)]
    for i, j in rng.integers(n // 5, n, (2 * n, 2)).tolist():
        edges += [(i, j, rng.normal())] * rng.integers(1, 3)
    edges += [(i, i, 1.0) for i in range(n // 5, n // 4)]
    return affinity_of(edges, n)


def random_z(rng, n, k, rank, floor=1e-3):
    """Assignments (n, k), each row's `rank` largest of those above the floor."""
    values = torch.from_numpy(rng.dirichlet(np.full(k, 0.3), n).astype(np.float32))
    values, classes = values.topk(rank, dim=1)
    values[:, 1:][values[:, 1:] < floor] = 0
    return Assignments(values, classes.int(), k, torch.zeros(n), floor)


def random_scores(rng, n, k, candidates):
    """Base scores of candidates, some unused, and the whole rows (n, k) that they are part of."""
    whole = torch.from_numpy(log_softmax(2 * rng.normal(size=(n, k))).astype(np.float32))
    values, classes = whole.topk(candidates, dim=1)
    values[::3, (candidates + 1) // 2 :] = -torch.inf
    tail = (1 - values.double().exp().sum(1)).clamp_(min=0).float()
    return Scores(values, classes.int(), k, tail, torch.zeros(n)), whole


def nan_like(z):
    """Room for another z, filled with NaN, and with classes that are none."""
    out = z.empty_like()
    out.values.fill_(NAN)
    out.classes.fill_(-7)
    out.bound.fill_(NAN)
    return out


def dense(values, classes, n_classes):
    """(N, K) float64 of lists; unused entries are 0."""
    whole = np.zeros((len(values), n_classes))
    np.add.at(whole, (np.arange(len(values))[:, None], classes.numpy()), values.double().numpy())
    return whole


def sweep_truth(base, messages, rank, floor):
    """z (N, K) and the bound (N,), both float64, of base scores in lists and A z (N, K)."""
    log_p = np.full(messages.shape, -np.inf)
    rows, places = np.nonzero(base.values.numpy() > -np.inf)
    log_p[rows, base.classes.numpy()[rows, places]] = base.values.numpy()[rows, places]
    tail = base.tail.numpy().astype(np.float64)
    return reference.sparse_sweep(log_p, tail, np.eye(len(messages)), messages, rank, floor)


def assert_no_worse(found, same_type, truth, atol):
    """No further from the truth than torch in the same type is, but for a small constant."""
    error = np.abs(np.asarray(found, np.float64) - truth).max(initial=0)
    allowed = np.abs(np.asarray(same_type, np.float64) - truth).max(initial=0)
    assert error <= allowed + atol  # NaN is not


def assert_lists_end(values, unused):
    """Entries in use come first, and all others are unused."""
    used = values != unused
    assert (used[:, 1:] <= used[:, :-1]).all()
