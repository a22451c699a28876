"""Dense operations against their formulas in float64, on odd shapes and many blocks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import log_softmax
from transclip_fast.ops import block_sums, torch_backend
from transclip_fast.ops import blocks as blocks_
from transclip_fast.ops.block_scores import linear_log_prior
from transclip_fast.ops.torch_backend import TorchOps
from transclip_fast.types import Affinity, Assignments, LinearScore, Messages, Scores

N, K, D = 77, 33, 96


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """Everything in one block, or in blocks of a few rows with a short last one."""
    if request.param == "many blocks":
        monkeypatch.setattr(torch_backend, "SUM_ROWS", 10)
        monkeypatch.setitem(blocks_.GEMM_ROWS, "cpu", (10, 10))
        monkeypatch.setattr(block_sums, "SUM_CLASSES", 5)
        monkeypatch.setitem(blocks_.OPERAND_BYTES, "cpu", 4 * K * 6)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def normal(rng, *shape):
    """Float32 values and the same as a tensor."""
    values = rng.normal(size=shape).astype(np.float32)
    return values.astype(np.float64), torch.from_numpy(values)


def simplex(rng, n=N, k=K):
    values = rng.dirichlet(np.full(k, 0.1), n).astype(np.float32)
    return values.astype(np.float64), dense(torch.from_numpy(values))


def dense(values):
    """z of every class."""
    return Assignments(values, None, values.shape[1], torch.zeros(len(values)))


def dense_scores(values):
    """Base scores of every class."""
    n = len(values)
    return Scores(values, None, values.shape[1], torch.zeros(n), torch.full((n,), -torch.inf))


def nan_like(tensor):
    return torch.full_like(tensor, float("nan"))


def affinity_of(edges, n=N):
    """Affinity of a list of (row, column, weight), and the same as a matrix."""
    edges = sorted(edges, key=lambda edge: edge[0])
    rows = np.array([edge[0] for edge in edges], int)
    columns = np.array([edge[1] for edge in edges], int)
    weights = np.array([edge[2] for edge in edges], np.float32)
    matrix = np.zeros((n, n))
    np.add.at(matrix, (rows, columns), weights.astype(np.float64))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n))])
    return Affinity(*map(torch.from_numpy, (offsets, columns, weights))), matrix


def difficult_edges(rng):
    """A hub, isolated rows, negative weights, duplicate edges and self-loops."""
    edges = [(0, j, 0.3) for j in range(1, 60)]  # a hub with 59 neighbours
    edges += [(i, 0, -0.2) for i in range(5, 70)]
    for _ in range(200):
        i, j = rng.integers(10, 70, 2)
        edges += [(i, j, rng.normal())] * rng.integers(1, 4)
    edges += [(i, i, 1.0) for i in range(20, 30)]
    return edges  # rows 1 to 4 and 70 to 76 have none


def test_blocks_cover_all_rows_once():
    for n, size in ((1, 1), (10, 3), (9, 3), (2, 5)):
        covered = [row for part in blocks_.blocks(n, size) for row in range(n)[part]]
        assert covered == list(range(n))
        assert all(part.stop - part.start <= size for part in blocks_.blocks(n, size))


def test_linear_log_prior(blocks, rng):
    f, features = normal(rng, N, D)
    w, weights = normal(rng, K, D)
    np.testing.assert_allclose(linear_log_prior(features, weights), log_softmax(f @ w.T), atol=3e-5)


@pytest.mark.parametrize("prior_weight", [None, 1.0, 0.5])
@pytest.mark.parametrize("with_messages", [False, True])
@pytest.mark.parametrize("reordered", [False, True])
def test_score(blocks, rng, prior_weight, with_messages, reordered):
    f, features = normal(rng, N, D)
    w, weights = normal(rng, K, D)
    c, offset = normal(rng, K)
    expected, terms = f @ w.T + c, {}
    if prior_weight is not None:
        p, prior = normal(rng, N, K)
        prior[3, 4] = p[3, 4] = -np.inf
        expected += prior_weight * p
        terms = {"log_prior": prior, "prior_weight": prior_weight}
    if with_messages:
        rows, classes = np.array([0, 0, 5, 9, 76]), np.array([1, 32, 4, 0, 7])
        w, weight = normal(rng, 5)
        expected[rows, classes] += w
        terms["messages"] = Messages.of(*map(torch.from_numpy, (rows, classes)), weight, N)
    out = dense_scores(torch.full((N, K), float("nan")))
    nodes = torch.from_numpy(rng.permutation(N)) if reordered else None
    ops = TorchOps(affinity_of([])[0], nodes)
    assert ops.score(features, LinearScore(weights, offset, **terms), out=out) is out
    found = out.values if nodes is None else out.values[nodes]
    np.testing.assert_allclose(found, expected, atol=3e-5)


def test_sweep_on_a_difficult_graph(blocks, rng):
    base, base_tensor = normal(rng, N, K)
    base[8, 3:9] = base_tensor[8, 3:9] = -np.inf
    z, assignments = simplex(rng)
    affinity, matrix = affinity_of(difficult_edges(rng))
    before = assignments.values.clone()
    out = dense(nan_like(assignments.values))
    assert TorchOps(affinity).sweep(dense_scores(base_tensor), assignments, out=out) is out
    expected = np.exp(log_softmax(base + matrix @ z))
    np.testing.assert_allclose(out.values, expected, atol=1e-6)
    assert (out.values[8, 3:9] == 0).all()
    assert torch.equal(assignments.values, before)
    assert torch.equal(base_tensor, torch.from_numpy(base.astype(np.float32)))


@pytest.mark.parametrize("weight", [600.0, -600.0])
def test_sweep_does_not_overflow(blocks, rng, weight):
    base, base_tensor = normal(rng, N, K)
    z, assignments = simplex(rng)
    affinity, matrix = affinity_of([(i, (i + 1) % N, weight) for i in range(N)])
    out = dense(nan_like(assignments.values))
    TorchOps(affinity).sweep(dense_scores(base_tensor), assignments, out=out)
    # Messages of 600 nats carry float32's rounding of 6e-5.
    np.testing.assert_allclose(
        out.values, np.exp(log_softmax(base + matrix @ z)), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(out.values.sum(1), 1, atol=1e-6)


def test_sweep_and_energies_without_edges(blocks, rng):
    base, base_tensor = normal(rng, N, K)
    _, assignments = simplex(rng)
    affinity, _ = affinity_of([])
    out = dense(nan_like(assignments.values))
    TorchOps(affinity).sweep(dense_scores(base_tensor), assignments, out=out)
    np.testing.assert_allclose(out.values, np.exp(log_softmax(base)), atol=1e-6)
    assert TorchOps(affinity).energies(assignments)[0] == 0


def test_messages(blocks, rng):
    z, assignments = simplex(rng)
    affinity, matrix = affinity_of(difficult_edges(rng))
    out = nan_like(assignments.values)
    assert TorchOps(affinity).messages(assignments, out=out) is out
    np.testing.assert_allclose(out, matrix @ z, atol=1e-6)


@st.composite
def random_problem(draw):
    n, k, size = draw(st.integers(1, 30)), draw(st.integers(1, 9)), draw(st.integers(1, 400))
    node, weight = st.integers(0, n - 1), st.floats(-40, 40, width=32)
    edges = draw(st.lists(st.tuples(node, node, weight), max_size=60))
    return n, k, size, edges, draw(st.integers(0, 2**32 - 1))


@given(random_problem())
@settings(max_examples=80, deadline=None)
def test_random_graphs(problem):
    n, k, size, edges, seed = problem
    rng = np.random.default_rng(seed)
    base, base_tensor = normal(rng, n, k)
    z, assignments = simplex(rng, n, k)
    affinity, matrix = affinity_of(edges, n)
    out = dense(nan_like(assignments.values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(blocks_.OPERAND_BYTES, "cpu", size)
        TorchOps(affinity).sweep(dense_scores(base_tensor), assignments, out=out)
        pairwise, entropy = TorchOps(affinity).energies(assignments)
    scale = 1 + np.abs(matrix).sum(1).max()  # of the messages, and of their rounding
    np.testing.assert_allclose(
        out.values, np.exp(log_softmax(base + matrix @ z)), atol=1e-6 * scale
    )
    np.testing.assert_allclose(pairwise, (z * (matrix @ z)).sum(), atol=1e-6 * n * scale)
    np.testing.assert_allclose(entropy, (z * np.log(np.where(z > 0, z, 1))).sum(), atol=1e-5)


def test_energies(blocks, rng):
    z, assignments = simplex(rng)
    z[:, 5] = assignments.values[:, 5] = 0  # 0 log 0 = 0
    affinity, matrix = affinity_of(difficult_edges(rng))
    pairwise, entropy = TorchOps(affinity).energies(assignments)
    for found, expected in (
        (pairwise, (z * (matrix @ z)).sum()),
        (entropy, (z * np.log(np.where(z > 0, z, 1))).sum()),
    ):
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


def test_expectation(blocks, rng):
    z, assignments = simplex(rng)
    z[:, 5] = assignments.values[:, 5] = 0  # 0 times -inf is 0 here
    p, prior = normal(rng, N, K)
    prior[:, 5], p[:, 5] = -np.inf, 0
    found = TorchOps(affinity_of([])[0]).expectation(assignments, prior)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, (z * p).sum(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kept", [False, True])
def test_class_sums(blocks, rng, monkeypatch, kept):
    monkeypatch.setattr(torch_backend, "KEPT_ENTRIES", N * D if kept else N * D - 1)
    z, assignments = simplex(rng)
    z[:, 5] = assignments.values[:, 5] = 0
    f, features = normal(rng, N, D)
    ops = TorchOps(affinity_of([])[0])
    first_z, first = simplex(rng)
    np.testing.assert_allclose(ops.class_sums(first, features)[0], first_z.T @ f, atol=1e-5)
    sums, counts = ops.class_sums(assignments, features)
    assert sums.dtype == counts.dtype == torch.float64
    np.testing.assert_allclose(sums, z.T @ f, atol=1e-5)
    np.testing.assert_allclose(counts, z.sum(0), atol=1e-5)
    assert counts[5] == 0
    assert (sums[5] == 0).all()


def test_class_sums_of_many_similar_rows(rng):
    """Their errors must not add up: what is left of the squares is the variance."""
    z, assignments = simplex(rng, 5000, 5)
    f = np.float32(0.7) + 1e-3 * rng.normal(size=(5000, 9)).astype(np.float32)
    sums, counts = TorchOps(affinity_of([], 5000)[0]).class_sums(assignments, torch.from_numpy(f))
    np.testing.assert_allclose(counts, z.sum(0), rtol=1e-12)
    np.testing.assert_allclose(sums, z.T @ f.astype(np.float64), rtol=1e-9)


@pytest.mark.parametrize("width", [None, 4])
def test_class_sums_have_the_same_bits_for_any_number_of_threads(rng, width):
    """Of so many rows that their blocks go to threads."""
    _, whole = simplex(rng, 5000, 7)
    _, features = normal(rng, 5000, 9)
    if width is not None:
        values, classes = whole.values.topk(width, 1)
        whole = Assignments(values, classes.int(), 7, torch.zeros(5000))
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(TorchOps(affinity_of([], 5000)[0]).class_sums(whole, features))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(found[0][1], whole.dense().sum(0), rtol=1e-5)
    for sums, counts in found[1:]:
        assert torch.equal(sums, found[0][0])
        assert torch.equal(counts, found[0][1])


def test_power_sums(blocks, rng):
    f, features = normal(rng, N, D)
    sums, squares = TorchOps.power_sums(features)
    np.testing.assert_allclose(sums, f.sum(0), atol=1e-13)
    np.testing.assert_allclose(squares, (f**2).sum(0), rtol=1e-13)


@pytest.mark.parametrize("n", [1, 5, 8, 9, N])
def test_start(blocks, rng, n):
    f, features = normal(rng, n, D)
    w, weights = normal(rng, K, D)
    out = dense(torch.full((n, K), float("nan")))
    normaliser, values, rows = TorchOps.start(features, weights, None, out=out)
    expected = log_softmax(f @ w.T)
    np.testing.assert_allclose(out.values, np.exp(expected), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(normaliser, (f @ w.T - expected)[:, 0], atol=3e-5)
    order = np.argsort(-expected, axis=0, kind="stable")[:8]
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(values, np.take_along_axis(expected, order, 0), atol=3e-5)


def test_start_from_a_given_prior(blocks, rng):
    z, assignments = simplex(rng)
    z[: N // 2, 4] = assignments.values[: N // 2, 4] = 0
    z /= z.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        log_prior = torch.from_numpy(np.log(z).astype(np.float32))
    out = dense(nan_like(log_prior))
    _, values, rows = TorchOps.start(torch.ones(N, 3), None, log_prior, out=out)
    np.testing.assert_allclose(out.values, z, atol=1e-6)
    order = np.argsort(-log_prior.numpy(), axis=0, kind="stable")[:8]
    np.testing.assert_allclose(values, np.take_along_axis(log_prior.numpy(), order, 0), atol=1e-6)
    assert all(len(set(column)) == len(column) for column in rows.T.tolist())
    assert (rows[:, 4] >= N // 2).all()


def test_start_prefers_the_first_of_equal_rows(blocks):
    features = torch.ones(N, 3)
    _, _, rows = TorchOps.start(features, torch.eye(3), None, out=dense(torch.empty(N, 3)))
    np.testing.assert_array_equal(rows, np.arange(8)[:, None].repeat(3, 1))
