"""Sparse operations, torch's and the compiled ones, against float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from tests.conftest import unit
from tests.ops.test_torch_backend import affinity_of, difficult_edges, normal
from transclip_fast import TransCLIP
from transclip_fast.ops import backend_class, block_sums, numba_backend, torch_backend
from transclip_fast.ops import blocks as blocks_
from transclip_fast.types import Assignments, LinearScore, Messages, Scores, Truncation

N, K, D = 77, 33, 96
NO_EDGES = affinity_of([], N)[0]
BACKENDS = ("torch", "numba")


@pytest.fixture(params=BACKENDS)
def ops(request):
    return backend_class(request.param)


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setattr(torch_backend, "SUM_ROWS", 10)
        monkeypatch.setitem(blocks_.GEMM_ROWS, "cpu", (10, 10))
        monkeypatch.setattr(block_sums, "SUM_CLASSES", 5)
        monkeypatch.setitem(blocks_.OPERAND_BYTES, "cpu", 4 * K * 6)
        monkeypatch.setattr(numba_backend, "SWEEP_ROWS", 6)
        monkeypatch.setitem(blocks_.READ_ROWS, "cpu", 30)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def scores_of(log_p, tail, width):
    """Scores of candidates (N, K), -inf for all others."""
    out = Scores.empty(torch.zeros(len(log_p)), log_p.shape[1], Truncation(width, width))
    for i, row in enumerate(log_p):
        places = np.flatnonzero(np.isfinite(row))
        out.classes[i, : len(places)] = torch.from_numpy(places.astype(np.int32))
        out.values[i, : len(places)] = torch.from_numpy(row[places].astype(np.float32))
    out.tail.copy_(torch.from_numpy(tail.astype(np.float32)))
    return out


def assignments_of(z, width, floor=0.0):
    """Assignments z (N, K), 0 where nothing is kept."""
    out = empty(z.shape, width, floor)
    for i, row in enumerate(z):
        places = np.flatnonzero(row)
        out.classes[i, : len(places)] = torch.from_numpy(places.astype(np.int32))
        out.values[i, : len(places)] = torch.from_numpy(row[places].astype(np.float32))
    return out


def empty(shape, width, floor):
    return Assignments.empty(*shape, Truncation(width, width, floor), torch.device("cpu"))


def dense(scores):
    """Candidates (N, K) of sparse scores, -inf for all others."""
    found = np.full((len(scores.values), scores.n_classes), -np.inf)
    rows, places = np.nonzero(np.isfinite(scores.values.numpy()))
    found[rows, scores.classes.numpy()[rows, places]] = scores.values.numpy()[rows, places]
    return found


def sparse_z(rng, n=N, k=K, width=5):
    """z with at most `width` entries a row, which do not sum to 1."""
    z = rng.dirichlet(np.full(k, 0.2), n).astype(np.float32).astype(np.float64)
    return np.where(reference.largest(z, width, 1e-3), z, 0)


def assert_lists(entries, unused):
    """Entries in use come first, and no class is listed twice in a row."""
    used = entries.values.numpy() != unused
    assert (used[:, 1:] <= used[:, :-1]).all()
    for classes, mask in zip(entries.classes.numpy(), used, strict=True):
        assert len(set(classes[mask])) == mask.sum() > 0


def case(rng, n=N, k=K, spread=4.0):
    f, features = normal(rng, n, D)
    w, weights = normal(rng, k, D)
    c, offset = normal(rng, k)
    f, w = (x * np.float64(np.sqrt(spread / D)) for x in (f, w))
    features, weights = (x * float(np.sqrt(spread / D)) for x in (features, weights))
    return (f @ w.T + c), (features, LinearScore(weights, offset))


@pytest.mark.parametrize("width", [1, 4, 33])
@pytest.mark.parametrize("nodes", [False, True])
def test_score(ops, blocks, rng, width, nodes):
    score, operands = case(rng)
    max_message = rng.uniform(0, 3, N).astype(np.float32)
    out = Scores.empty(torch.from_numpy(max_message), K, Truncation(width, width, 0.05))
    out.values.fill_(1), out.tail.fill_(np.nan)
    order = torch.from_numpy(rng.permutation(N)) if nodes else torch.arange(N)
    assert ops(NO_EDGES, order if nodes else None).score(*operands, out=out) is out
    log_p, tail = reference.sparse_score(score, width, np.log(0.05) - max_message[order])
    np.testing.assert_allclose(dense(out)[order], log_p, atol=2e-5)
    np.testing.assert_allclose(out.tail[order], tail, atol=2e-6)
    assert_lists(out, -np.inf)


def test_score_with_a_given_prior_and_messages(ops, blocks, rng):
    score, operands = case(rng)
    p, prior = normal(rng, N, K)
    p[3, 4:9], prior[3, 4:9] = -np.inf, -np.inf
    rows, classes = np.array([0, 0, 5, 9, 76]), np.array([1, 32, 4, 0, 7])
    w, weight = normal(rng, 5)
    score += 0.5 * p
    score[rows, classes] += w
    messages = Messages.of(*map(torch.from_numpy, (rows, classes)), weight, N)
    out = Scores.empty(torch.zeros(N), K, Truncation(6, 6, 1e-3))
    features, linear = operands
    score_ = LinearScore(linear.weights, linear.offset, prior, 0.5, messages)
    ops(NO_EDGES).score(features, score_, out=out)
    log_p, tail = reference.sparse_score(score, 6, np.log(1e-3))
    np.testing.assert_allclose(dense(out), log_p, atol=2e-5)
    np.testing.assert_allclose(out.tail, tail, atol=2e-6)


@pytest.mark.parametrize("floor", [0.0, 1e-4])
def test_score_of_equal_classes(ops, floor):
    """More equal scores than there is room for: some of them, and the rest is tail."""
    out = Scores.empty(torch.zeros(3), K, Truncation(5, 5, floor))
    score = LinearScore(torch.ones(K, 2), torch.zeros(K))
    ops(affinity_of([], 3)[0]).score(torch.ones(3, 2), score, out=out)
    assert_lists(out, -np.inf)
    np.testing.assert_allclose(out.values, np.full((3, 5), -np.log(K)), rtol=1e-6)
    np.testing.assert_allclose(out.tail, 1 - 5 / K, rtol=1e-6)


def test_score_keeps_nothing_of_an_earlier_one(ops, rng):
    """The same room is used in every step, for rows of more and of fewer candidates."""
    out = Scores.empty(torch.zeros(N), K, Truncation(9, 9, 1e-3))
    for spread in (0.1, 40.0, 1.0):
        score, operands = case(rng, spread=spread)
        ops(NO_EDGES).score(*operands, out=out)
        log_p, _ = reference.sparse_score(score, 9, np.log(1e-3))
        found = dense(out)
        certain = np.abs(log_p - np.log(1e-3)) > 1e-3
        np.testing.assert_allclose(found[certain], log_p[certain], atol=1e-4)
        assert_lists(out, -np.inf)


@pytest.mark.parametrize("width", [1, 3, 7])
@pytest.mark.parametrize("floor", [0.0, 0.02])
def test_sweep_on_a_difficult_graph(ops, blocks, rng, width, floor):
    score, _ = case(rng)
    log_p, tail = reference.sparse_score(score, 7, -4.0)
    z = sparse_z(rng)
    affinity, a = affinity_of(difficult_edges(rng))
    before, out = assignments_of(z, 5), empty((N, K), width, floor)
    out.values.fill_(1), out.bound.fill_(np.nan)
    base = scores_of(log_p, tail, 7)
    assert ops(affinity).sweep(base, before, out=out) is out
    expected, bound = reference.sparse_sweep(log_p, tail, a, z, width, floor)
    np.testing.assert_allclose(out.dense(), expected, atol=1e-6)
    np.testing.assert_allclose(out.bound, bound, rtol=2e-4, atol=1e-6)
    assert (bound > 1e-3).any()
    assert_lists(out, 0)
    np.testing.assert_array_equal(before.dense(), z.astype(np.float32))


@pytest.mark.parametrize("weight", [600.0, -600.0])
def test_sweep_does_not_overflow(ops, rng, weight):
    score, _ = case(rng)
    log_p, tail = reference.sparse_score(score, 7, -9.0)
    z = sparse_z(rng)
    affinity, a = affinity_of([(i, (i + 1) % N, weight) for i in range(N)])
    out = empty((N, K), 7, 1e-4)
    ops(affinity).sweep(scores_of(log_p, tail, 7), assignments_of(z, 5), out=out)
    expected, bound = reference.sparse_sweep(log_p, tail, a, z, 7, 1e-4)
    # Messages of 600 nats carry float32's rounding of 6e-5.
    np.testing.assert_allclose(out.dense(), expected, rtol=1e-3, atol=2e-4)
    np.testing.assert_allclose(out.bound, bound, rtol=1e-2, atol=1e-6)
    assert out.values.isfinite().all()
    assert (out.values[:, 0] > 0).all()


def test_sweep_and_energies_without_edges(ops, rng):
    score, _ = case(rng)
    log_p, tail = reference.sparse_score(score, 7, -4.0)
    affinity, _ = affinity_of([])
    before, out = assignments_of(sparse_z(rng), 5), empty((N, K), 7, 0.0)
    ops(affinity).sweep(scores_of(log_p, tail, 7), before, out=out)
    np.testing.assert_allclose(out.dense(), np.exp(log_p), atol=1e-6)
    assert (out.bound == 0).all()
    assert ops(affinity).energies(before)[0] == 0


@pytest.mark.parametrize("nodes", [False, True])
def test_class_sums(ops, blocks, rng, nodes):
    z = sparse_z(rng)
    z[:, 5] = 0
    f, features = normal(rng, N, D)
    order = torch.from_numpy(rng.permutation(N)) if nodes else torch.arange(N)
    run = ops(NO_EDGES, order if nodes else None)
    sums, counts = run.class_sums(assignments_of(z, 5), features)
    assert sums.dtype == counts.dtype == torch.float64
    np.testing.assert_allclose(sums, z[order].T @ f, atol=2e-5)
    np.testing.assert_allclose(counts, z.sum(0), atol=2e-5)
    assert counts[5] == 0
    assert (sums[5] == 0).all()


def test_class_sums_of_many_similar_rows(ops, rng):
    """Their errors must not add up: what is left of the squares is the variance."""
    z = np.eye(5)[rng.integers(5, size=5000)]
    f = np.float32(0.7) + 1e-3 * rng.normal(size=(5000, 9)).astype(np.float32)
    sums, counts = ops(affinity_of([], 5000)[0]).class_sums(
        assignments_of(z, 2), torch.from_numpy(f)
    )
    np.testing.assert_allclose(counts, z.sum(0), rtol=1e-12)
    np.testing.assert_allclose(sums, z.T @ f.astype(np.float64), rtol=1e-9)


def test_energies_and_expectation(ops, blocks, rng):
    z = sparse_z(rng)
    affinity, a = affinity_of(difficult_edges(rng))
    before = assignments_of(z, 5)
    pairwise, entropy = ops(affinity).energies(before)
    p, prior = normal(rng, N, K)
    p[z == 0], prior[torch.from_numpy(z == 0)] = 0, -np.inf
    order = torch.from_numpy(rng.permutation(N))
    for found, expected in (
        (pairwise, (z * (a @ z)).sum()),
        (entropy, (z * np.log(np.where(z > 0, z, 1))).sum()),
        (ops(affinity).expectation(before, prior), (z * p).sum()),
        (ops(affinity, order).expectation(before, prior[order]), (z * p).sum()),
    ):
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("n", [1, 5, 8, 9, N])
def test_start(ops, blocks, rng, n):
    _, (features, linear) = case(rng, n)
    weights = linear.weights
    score = (features.double() @ weights.double().T).numpy()
    log_y = reference.log_softmax(score)
    out = empty((n, K), 6, 1e-2)
    normaliser, values, rows = ops.start(features, weights, None, out=out)
    expected = np.exp(log_y)
    np.testing.assert_allclose(
        out.dense(), np.where(reference.largest(expected, 6, 1e-2), expected, 0), atol=1e-6
    )
    assert_lists(out, 0)
    np.testing.assert_allclose(normaliser, (score - log_y)[:, 0], atol=2e-5)
    order = np.argsort(-log_y, axis=0, kind="stable")[:8]
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(values, np.take_along_axis(log_y, order, 0), atol=2e-5)
    np.testing.assert_array_equal(out.best()[0], log_y.argmax(1))
    np.testing.assert_allclose(out.best()[1], np.exp(log_y.max(1)), atol=1e-6)


def test_start_from_a_given_prior(ops, blocks, rng):
    z = rng.dirichlet(np.full(K, 0.3), N)
    z[: N // 2, 4] = 0
    z /= z.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        log_prior = torch.from_numpy(np.log(z).astype(np.float32))
    out = empty((N, K), 6, 1e-2)
    _, values, rows = ops.start(torch.ones(N, 3), None, log_prior, out=out)
    np.testing.assert_allclose(
        out.dense(), np.where(reference.largest(z, 6, 1e-2), z, 0), atol=1e-6
    )
    order = np.argsort(-log_prior.numpy(), axis=0, kind="stable")[:8]
    np.testing.assert_allclose(values, np.take_along_axis(log_prior.numpy(), order, 0), atol=1e-5)
    assert (rows[:, 4] >= N // 2).all()


def test_lists_do_not_end_where_the_start_underflows(ops):
    """A list ends at its first 0, and e^-200 is none."""
    prior = torch.log_softmax(torch.tensor([[0.0, -200.0, 1.0, -torch.inf, 0.5]]), 1)
    out = empty((1, 5), 5, 0.0)
    ops.start(torch.ones(1, 3), None, prior, out=out)
    used = out.values[0] > 0
    assert (used.int().diff() <= 0).all()
    np.testing.assert_allclose(out.dense(), prior.double().exp(), atol=1e-6)


@pytest.mark.parametrize("class_cost", [False, True])
def test_whole_lists_are_dense_assignments(class_cost):
    """Where most of z underflows, too: few of the classes occur, far from each other."""
    draw = np.random.default_rng(1)
    prototypes = unit(draw.normal(size=(30, 24))).astype(np.float32)
    labels = draw.integers(5, size=200)
    features = unit(prototypes[labels] + 0.1 * draw.normal(size=(200, 24))).astype(np.float32)
    fits = [
        TransCLIP(device="cpu", class_cost=class_cost, **form).fit(features, prototypes)
        for form in (
            {"assignments": "dense"},
            {"assignments": "sparse", "backend": "torch"},
            {"assignments": "sparse", "backend": "numba"},
        )
    ]
    for fit in fits:
        np.testing.assert_array_equal(fit.transduction_, labels)
        np.testing.assert_allclose(fit.objective_, fits[0].objective_, rtol=1e-4)


def test_start_prefers_the_first_of_equal_rows(ops, blocks):
    out = empty((N, 3), 2, 1e-4)
    _, _, rows = ops.start(torch.ones(N, 3), torch.eye(3), None, out=out)
    np.testing.assert_array_equal(rows, np.arange(8)[:, None].repeat(3, 1))


@st.composite
def random_problem(draw):
    n, k = draw(st.integers(1, 30)), draw(st.integers(1, 40))
    width, rank = draw(st.integers(1, k)), draw(st.integers(1, k))
    node, weight = st.integers(0, n - 1), st.floats(-40, 40, width=32)
    edges = draw(st.lists(st.tuples(node, node, weight), max_size=80))
    hub = draw(st.integers(0, 3 * n))  # edges from everywhere to one node
    edges += [(0, j % n, 0.3) for j in range(hub)]
    return n, k, width, min(rank, width), edges, draw(st.integers(0, 2**32 - 1))


@pytest.mark.parametrize("backend", BACKENDS)
@given(random_problem())
@settings(max_examples=80, deadline=None)
def test_random_graphs(backend, problem):
    """Hubs, duplicate edges, self-loops, isolated rows and negative weights."""
    n, k, width, rank, edges, seed = problem
    ops, rng = backend_class(backend), np.random.default_rng(seed)
    score, _ = case(rng, n, k)
    log_p, tail = reference.sparse_score(score, width, -3.0)
    z = sparse_z(rng, n, k)
    affinity, a = affinity_of(edges, n)
    out = empty((n, k), rank, 0.01)
    ops(affinity).sweep(scores_of(log_p, tail, width), assignments_of(z, 5), out=out)
    expected, bound = reference.sparse_sweep(log_p, tail, a, z, k, 0.0)
    scale = 1 + np.abs(a).sum(1).max()  # of the messages, and of their rounding
    found = out.dense().numpy()
    kept = found > 0
    np.testing.assert_allclose(found[kept], expected[kept], atol=2e-6 * scale)
    # What is not kept is small, or there was no room for it.
    lost = np.where(kept, 0, expected).max(1)
    room = kept.sum(1) < rank
    threshold = np.minimum(0.01, expected.max(1))
    assert (lost[room] <= threshold[room] + 2e-6 * scale).all()
    smallest = np.where(kept, found, np.inf).min(1)
    assert (lost[~room] <= smallest[~room] + 2e-6 * scale).all()
    np.testing.assert_allclose(out.bound, bound, rtol=1e-4 * scale, atol=1e-6 * scale)
    pairwise, entropy = ops(affinity).energies(assignments_of(z, 5))
    np.testing.assert_allclose(pairwise, (z * (a @ z)).sum(), atol=1e-6 * n * scale)
    np.testing.assert_allclose(entropy, (z * np.log(np.where(z > 0, z, 1))).sum(), atol=1e-5)


def test_the_bound_holds_where_the_tail_is_below_rounding(ops):
    """A class outside the candidates, to which all neighbours belong."""
    edges = [(0, j, 0.05) for j in range(1, 400)]
    affinity, _ = affinity_of(edges, 400)
    log_p = np.full((400, 3), -np.inf)
    log_p[:, 0] = 0
    z = np.zeros((400, 3))
    z[0, 0] = z[1:, 2] = 1
    out = empty((400, 3), 1, 1e-4)
    ops(affinity).sweep(scores_of(log_p, np.zeros(400), 1), assignments_of(z, 1), out=out)
    assert out.bound[0] > 0.5
    assert (out.bound[1:] == 0).all()


def test_candidates_where_messages_may_be_anything(ops, rng):
    """However loud messages may be, the largest scores are kept."""
    score, operands = case(rng)
    out = Scores.empty(torch.full((N,), 1e9), K, Truncation(5, 5))
    ops(NO_EDGES).score(*operands, out=out)
    log_p, _ = reference.sparse_score(score, 5, -np.inf)
    np.testing.assert_allclose(dense(out), log_p, atol=2e-5)


def test_power_sums(ops, rng, monkeypatch):
    monkeypatch.setattr(numba_backend, "SUM_ROWS", 30)
    exact, features = normal(rng, 77, 33)
    sums, squares = ops.power_sums(features)
    np.testing.assert_allclose(sums, exact.sum(0), atol=1e-13)
    np.testing.assert_allclose(squares, (exact**2).sum(0), rtol=1e-13)
