"""Calibrated confidences: dense and sparse against the float64 reference, and on whole fits."""

import numpy as np
import pytest
import torch

from tests import reference
from tests.conftest import unit
from transclip_fast import TransCLIP, build_graph
from transclip_fast.ops import backend_class
from transclip_fast.solver.confidence import calibrated_confidences
from transclip_fast.types import Affinity, Assignments, Scores

N, K = 53, 17


def made(seed):
    """log p (N, K), z (N, K) in float64 and neighbours (N, 3), of which some are missing."""
    draw = np.random.default_rng(seed)
    log_p = reference.log_softmax(3 * draw.normal(size=(N, K)))
    z = np.exp(reference.log_softmax(log_p + draw.normal(size=(N, K))))
    neighbors = (np.arange(N)[:, None] + draw.integers(1, N, (N, 3))) % N
    neighbors[::7, 2] = -1
    neighbors[5] = -1
    return log_p, z, neighbors


def lists(values, width, empty):
    """The largest entries of each row, (N, width), and their classes."""
    classes = np.argsort(-values, axis=1, kind="stable")[:, :width]
    top = np.take_along_axis(values, classes, 1)
    padded = np.concatenate([top, np.full((N, 3), empty)], 1)
    more = np.concatenate([classes, np.zeros((N, 3), int)], 1)
    return torch.tensor(padded, dtype=torch.float32), torch.tensor(more, dtype=torch.int32)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(
    ("width", "backend"), [(None, "torch"), (K, "torch"), (4, "torch"), (K, "numba"), (4, "numba")]
)
def test_against_the_reference(width, backend, shuffled):
    log_p, z, neighbors = made(width or 0)
    tail = np.zeros(N)
    rest = np.full(N, -np.inf)  # a class for all others, which no neighbour has
    if width == 4:
        kept = reference.largest(log_p, width, -np.inf)
        tail = np.where(kept, 0, np.exp(log_p)).sum(1)
        least = np.where(kept, log_p, np.inf).min(1)
        rest = 4 * reference.tempered_tail(tail, least, K - width)
        z = np.where(kept, z, 0)
        z = np.where(reference.largest(z, 2, 0.0), z, 0)
        log_p = np.where(kept, log_p, -1e30)
    node = np.random.default_rng(0).permutation(N) if shuffled else np.arange(N)
    order = torch.from_numpy(np.argsort(node))  # row of each node
    bound = torch.zeros(N)
    if width is None:
        scores, classes = torch.tensor(log_p[order], dtype=torch.float32), None
        own = Assignments(torch.tensor(z[order], dtype=torch.float32), None, K, bound)
    else:
        scores, classes = lists(log_p[order], width, -np.inf)
        own = Assignments(*lists(z[order], 2 if width == 4 else K, 0), K, bound)
    base = Scores(scores, classes, K, torch.tensor(tail[order], dtype=torch.float32), bound)
    no_edges = Affinity(torch.zeros(N + 1, dtype=torch.int64), order[:0], torch.zeros(0))
    nodes = torch.tensor(node) if shuffled else None
    ops = backend_class(backend)(no_edges, nodes)
    found = calibrated_confidences(ops, base, own, neighbors, nodes)
    more, z = np.concatenate([log_p, rest[:, None]], 1), np.concatenate([z, np.zeros((N, 1))], 1)
    expected = reference.calibrated_confidences(more, z, neighbors)
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize("assignments", ["dense", "sparse"])
def test_of_a_fit(problem, assignments):
    features, prototypes, _ = problem(n=90, k=9)
    graph = build_graph(features, 3, device="cpu")
    run = reference.zero_shot(features, prototypes)
    model = TransCLIP(device="cpu", assignments=assignments).fit(features, prototypes, graph=graph)
    f = features.astype(np.float64)
    base = reference.log_gaussian(f, run.means, run.variances) / 50
    base += reference.log_prior(f, prototypes.astype(np.float64))
    expected = reference.calibrated_confidences(base, run.z, graph.neighbors)
    np.testing.assert_allclose(model.calibrated_confidences_, expected, atol=5e-3)
    assert model.calibrated_confidences_.mean() < model.label_distributions_.max(1).mean()


def test_long_lists_tell_what_whole_rows_do():
    """Though what is dropped of a row is below the rounding of its sum."""
    draw = np.random.default_rng(0)
    n_classes, dim, n_rows = 2000, 128, 200
    centre, prototypes = unit(draw.normal(size=(1, dim))), unit(draw.normal(size=(n_classes, dim)))
    text = unit(0.8 * centre + 0.6 * prototypes).astype(np.float32)
    labels = draw.integers(100, size=n_rows)
    noise = 0.05 * draw.normal(size=(n_rows, dim))
    features = unit(0.5 * centre + 0.7 * prototypes[labels] + noise).astype(np.float32)
    whole, *lists = (
        TransCLIP(device="cpu", class_cost=False, **form).fit(features, text)
        for form in (
            {"assignments": "dense"},
            {"assignments": "sparse", "backend": "torch", "candidates": 128},
            {"assignments": "sparse", "backend": "numba", "candidates": 128},
        )
    )
    for fit in lists:
        found, expected = fit.calibrated_confidences_, whole.calibrated_confidences_
        assert np.abs(found - expected).max() < 0.2
        assert np.abs(found - expected).mean() < 0.03
    np.testing.assert_allclose(*(fit.calibrated_confidences_ for fit in lists), atol=1e-2)


def test_known_labels_are_certain(problem):
    features, prototypes, labels = problem()
    known = np.where(np.arange(77) < 5, labels, -1)
    model = TransCLIP(device="cpu").fit(features, prototypes, known_labels=known)
    np.testing.assert_array_equal(model.calibrated_confidences_[:5], 1)
    assert (model.calibrated_confidences_[5:] < 1).all()


@pytest.mark.filterwarnings("ignore:n_neighbors")
def test_one_row_and_absent_classes(problem):
    row = np.ones((1, 4), np.float32) / 2
    assert TransCLIP(device="cpu").fit(row, row).calibrated_confidences_.tolist() == [1]
    features, prototypes, labels = problem(n=300, k=40, noise=0.01)
    some = features[labels < 4]
    models = [
        TransCLIP(device="cpu", class_cost=True, assignments=form).fit(some, prototypes)
        for form in ("dense", "sparse")
    ]
    dense, lists_of = (model.calibrated_confidences_ for model in models)
    np.testing.assert_allclose(dense, lists_of, atol=0.02)
