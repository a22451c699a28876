"""Scores, their candidates and the start against float64, beside torch in the same type."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import unit
from tests.kernels.problems import (
    NAN,
    affinity_of,
    assert_lists_end,
    assert_no_worse,
    dense,
    log_softmax,
    nan_like,
)
from transclip_fast.data.feature_rows import Rows
from transclip_fast.kernels import products, top_rows
from transclip_fast.kernels import score as fused
from transclip_fast.kernels import select as chunked
from transclip_fast.ops import blocks
from transclip_fast.ops.torch_backend import TorchOps
from transclip_fast.ops.triton_backend import TritonOps
from transclip_fast.types import Assignments, LinearScore, Messages, Scores, Truncation


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks and blocks of rows, and rows of several blocks of classes."""
    monkeypatch.setattr(chunked, "BLOCK_CLASSES", 256)
    monkeypatch.setattr(chunked, "LONG_CLASSES", 256)
    monkeypatch.setattr(chunked, "chunk_rows", lambda n_classes, n_rows: min(n_rows, 30))
    monkeypatch.setitem(products.LAUNCHES, "cuda", (16, 64, 32, 4, 1))
    monkeypatch.setattr(fused, "CHUNK_ROWS", 48)


def normal(rng, *shape, dtype=torch.float32):
    return torch.from_numpy(rng.normal(size=shape)).to(dtype)


def nan_scores(max_message, k, candidates, floor=1e-4):
    """Room for scores, filled with NaN."""
    out = Scores.empty(max_message, k, Truncation(candidates, candidates, floor))
    out.values.fill_(NAN)
    out.tail.fill_(NAN)
    return out


def scores(operands, out, nodes=None, backend=TritonOps):
    """Scores by a backend; they need no edge."""
    features, *linear = operands
    score = linear[0] if isinstance(linear[0], LinearScore) else LinearScore(*linear)
    ops = backend(affinity_of([], len(features))[0], nodes)
    return ops.score(features, score, out=out)


def terms_of(rng, n, k, by_prior, with_messages):
    """Prior and messages of a score, and what they add to it (N, K) float64."""
    added, terms = np.zeros((n, k)), {}
    if by_prior:
        prior = torch.log_softmax(normal(rng, n, k), 1)
        prior[: n // 2, k // 2 :: 5] = -torch.inf
        terms = {"log_prior": prior, "prior_weight": 0.5}
        added += 0.5 * prior.double().numpy()
    if with_messages:
        rows, classes = torch.tensor([0, 0, n // 2]), torch.tensor([0, k - 1, k // 2])
        weights = 5 * normal(rng, 3)
        terms["messages"] = Messages.of(rows, classes, weights, n)
        np.add.at(added, (rows.numpy(), classes.numpy()), weights.double().numpy())
    return terms, added


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("n", "k", "candidates", "by_prior", "with_messages"),
    [(41, 33, 10, True, True), (9, 600, 16, False, True), (5, 600, 300, True, False),
     (1, 33, 4, False, False), (9, 1, 1, False, False), (41, 33, 10, False, False),
     (9, 600, 16, False, False), (20, 200, 32, False, False)],
)  # fmt: skip
def test_candidates(rng, dtype, n, k, candidates, by_prior, with_messages):
    features, weights = normal(rng, n, 96, dtype=dtype), 0.3 * normal(rng, k, 96)
    weights = weights.to(dtype).float()  # the operation makes it float16 again
    offset, max_message = normal(rng, k), torch.from_numpy(rng.random(n).astype(np.float32))
    nodes = torch.from_numpy(rng.permutation(n))
    terms, added = terms_of(rng, n, k, by_prior, with_messages)
    score = LinearScore(weights, offset, **terms)
    found, again, same = (nan_scores(max_message, k, candidates) for _ in range(3))
    scores((features, score), found, nodes)
    x = features.double().numpy() @ weights.double().numpy().T + offset.double().numpy() + added
    b = np.empty((n, k))
    b[nodes] = log_softmax(x)
    threshold = np.minimum(found.log_threshold.numpy(), b.max(1))
    for i in range(n):
        best = np.argsort(-b[i], kind="stable")[:candidates]
        best = best[b[i, best] >= threshold[i]]
        used = found.values[i].numpy() > -np.inf
        assert set(found.classes[i].numpy()[used]) == set(best)
    scores((features.float(), score), same, nodes, TorchOps)

    def mass(scores):
        return dense(scores.values.exp(), scores.classes, k)

    chosen = np.where(mass(found) > 0, np.exp(b), 0)
    assert_no_worse(mass(found), mass(same), chosen, 5e-7)
    assert_no_worse(found.tail, same.tail, np.exp(b).sum(1) - chosen.sum(1), 5e-7)
    assert_lists_end(found.values, -torch.inf)
    scores((features, score), again, nodes)
    assert torch.equal(found.values, again.values)
    assert torch.equal(found.classes, again.classes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("fused", [True, False])
def test_equal_scores_are_taken_by_class(rng, dtype, fused):
    """K classes that are all alike, and some that are a little better."""
    prior = None if fused else torch.zeros(2, 600)
    weights = torch.zeros(600, 8)
    offset = torch.zeros(600)
    offset[[70, 300, 599]] = 1.0
    out = nan_scores(torch.zeros(2), 600, 16)
    scores((normal(rng, 2, 8, dtype=dtype), LinearScore(weights, offset, prior)), out)
    expected = [*range(13), 70, 300, 599]
    assert all(row == expected for row in out.classes.tolist())


@pytest.fixture
def cuts(monkeypatch):
    """How often a list had to be cut while it grew."""
    seen, kind = [], type(fused.cut)
    call = kind.__call__

    def counted(self, *arguments, **named):
        if self is fused.cut:
            seen.append(1)
        return call(self, *arguments, **named)

    monkeypatch.setattr(kind, "__call__", counted)
    return seen


@pytest.mark.parametrize("step", [1.0, -1.0, 0.02])
def test_lists_that_outgrow_their_room_are_cut(cuts, step):
    """Scores that rise from class to class all pass as they come; only the last ones stay."""
    n, k, candidates = 2, 700, 16
    features = torch.ones(n, 8).half()
    out = nan_scores(torch.full((n,), 200.0), k, candidates)
    x = step * torch.arange(k) / 10
    scores((features, torch.zeros(k, 8), x), out)
    b = torch.log_softmax(x.double(), 0)
    best = b.topk(candidates).indices.sort().values
    assert (len(cuts) > 0) == (step > 0)
    assert all(row == best.tolist() for row in out.classes.tolist())
    np.testing.assert_allclose(out.values, b[best].expand(n, -1), atol=2e-5)
    np.testing.assert_allclose(out.tail, 1 - b[best].exp().sum().expand(n), atol=1e-6)


@triton.jit
def cut_kernel(entries, found, length, width, B: tl.constexpr):
    smallest, lost = fused.cut(entries, length, width, 0.0, found, B)
    tl.store(found, smallest)
    tl.store(found + 1, lost)


@pytest.mark.parametrize(("length", "width"), [(50, 7), (64, 16), (9, 8), (3, 1)])
def test_a_list_is_cut_to_its_largest(rng, length, width):
    """Whole numbers, many of them equal: the first ones stay, in their order."""
    x = rng.integers(-3, 3, length).astype(np.float32)
    k = np.sort(rng.choice(1000, length, replace=False))
    entries = torch.full((64,), -1)
    entries[:length] = torch.from_numpy((x.view(np.int32).astype(np.int64) << 32) | k)
    found = torch.empty(2)
    cut_kernel[(1,)](entries, found, length, width, B=64)
    kept = np.sort(np.argsort(-x, kind="stable")[:width])
    left = entries[:width].numpy()
    np.testing.assert_array_equal(left & (2**32 - 1), k[kept])
    np.testing.assert_array_equal((left >> 32).astype(np.int32).view(np.float32), x[kept])
    np.testing.assert_allclose(found, [x[kept].min(), np.delete(np.exp(x), kept).sum()], rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 300), st.integers(1, 8), st.sampled_from([1, 5, 16, 32]),
    st.sampled_from([0.0, 3.0, 30.0, np.inf]), st.booleans(), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_whole_numbers_are_selected_exactly(n, k, spread, candidates, max_message, fused, seed):
    """Products of small whole numbers are exact in 16 bits, and many are equal."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randint(-2, 3, (n, 4), generator=draw).half()
    weights = torch.randint(-spread, spread + 1, (k, 4), generator=draw).float()
    offset = torch.randint(-spread, spread + 1, (k,), generator=draw).float()
    candidates = min(candidates, k)
    out = nan_scores(torch.full((n,), max_message), k, candidates)
    prior = None if fused else torch.zeros(n, k)  # without effect, but not fused
    scores((features, LinearScore(weights, offset, prior)), out)
    x = features.double() @ weights.double().T + offset.double()
    b = x - x.logsumexp(1, keepdim=True)
    order = x.sort(dim=1, descending=True, stable=True).indices[:, :candidates]
    threshold = torch.minimum(out.log_threshold.double(), b.amax(1))
    for i in range(n):
        expected = order[i][b[i, order[i]] >= threshold[i] - 1e-6].sort().values
        used = out.values[i] > -torch.inf
        assert out.classes[i][used].tolist() == expected.tolist()
        np.testing.assert_allclose(out.values[i][used], b[i, expected], atol=2e-5)
        others = np.delete(b[i].exp().numpy(), expected)
        np.testing.assert_allclose(out.tail[i], others.sum(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("by_prior", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 5), (5, 33), (8, 1), (41, 33)])
def test_start(rng, by_prior, n, k):
    features, weights = normal(rng, n, 96), 0.2 * normal(rng, k, 96)
    features[n // 2 :] = features[n // 2]  # of equal rows the first count
    x = features.double().numpy() @ weights.double().numpy().T
    truth = log_softmax(x)
    prior = torch.from_numpy(truth.astype(np.float32)) if by_prior else None
    width = min(k, 4)
    out = Assignments(torch.empty(n, width), torch.zeros(n, width).int(), k, torch.zeros(n), 1e-3)
    found, linear = nan_like(out), None if by_prior else weights
    normaliser, values, rows = TritonOps.start(features, linear, prior, out=found)
    same = TorchOps.start(features, linear, prior, out=out.empty_like())
    z = dense(found.values, found.classes, k)
    np.testing.assert_allclose(z, np.where(z > 0, np.exp(truth), 0), atol=3e-6)
    np.testing.assert_allclose(normaliser, same[0], atol=3e-5)
    np.testing.assert_allclose(values, same[1], atol=3e-5)
    assert rows.shape == (min(8, n), k)
    # Rows of one product may differ in its last bits: what counts is that each is as good.
    np.testing.assert_allclose(np.take_along_axis(truth, rows.numpy(), 0), values, atol=3e-5)
    assert all(len(set(column)) == len(column) for column in rows.T.tolist())
    best = np.sort(truth, 1)[:, ::-1][:, :width]
    np.testing.assert_array_equal((z > 0).sum(1), (np.exp(best) >= 1e-3).sum(1))


def test_start_prefers_the_first_of_equal_rows():
    out = Assignments(torch.empty(77, 2), torch.zeros(77, 2).int(), 3, torch.zeros(77), 1e-3)
    _, _, rows = TritonOps.start(torch.ones(77, 3), torch.eye(3), None, out=out)
    np.testing.assert_array_equal(rows, np.arange(8)[:, None].repeat(3, 1))


def test_columns_first_are_refused(rng):
    features, weights, prior = normal(rng, 5, 8), normal(rng, 3, 8), normal(rng, 3, 5).T
    out = Assignments(torch.empty(5, 2), torch.zeros(5, 2).int(), 3, torch.zeros(5), 1e-3)
    for operands in ((features, None, prior), (features.T.contiguous().T, weights, None)):
        with pytest.raises(ValueError, match="contiguous"):
            TritonOps.start(*operands, out=out)
    with pytest.raises(ValueError, match="contiguous"):
        scores((features, weights, torch.zeros(3), prior), nan_scores(torch.ones(5), 3, 2))


def test_weights_beyond_float16(rng):
    """A small variance makes P large: one power of two is taken off all of it."""
    features, weights = normal(rng, 5, 96, dtype=torch.float16), 1e6 * normal(rng, 33, 96)
    found = nan_scores(torch.full((5,), 1e9), 33, 32)
    scores((features, weights, torch.zeros(33)), found)
    x = features.double().numpy() @ weights.double().numpy().T
    values = np.where(found.values > -torch.inf, found.values, np.nan)
    truth = np.take_along_axis(x - x.max(1, keepdims=True), found.classes.long().numpy(), 1)
    assert np.isfinite(values).all()
    np.testing.assert_allclose(values, truth, atol=2e-3 * np.abs(x).max())


def test_lists_do_not_end_where_the_start_underflows():
    prior = torch.log_softmax(torch.tensor([[0.0, -200.0, 1.0, -torch.inf, 0.5]]), 1)
    z = Assignments(torch.empty(1, 5), torch.zeros(1, 5).int(), 5, torch.zeros(1), 0.0)
    TritonOps.start(torch.ones(1, 3), None, prior, out=z)
    assert z.classes[0, :4].tolist() == [0, 1, 2, 4]
    assert (z.values[0] > 0).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("candidates", [16, 40])
def test_files_are_read_in_large_blocks(rng, candidates, monkeypatch):
    """However few rows of products fit the cache."""
    monkeypatch.setitem(blocks.READ_ROWS, "cpu", 64)
    for module, kernel in ((chunked, "select"), (fused, "score"), (top_rows, "top_rows")):
        monkeypatch.setattr(module, kernel, lambda *_, **__: None)
    rows, read = Rows(unit(rng.normal(size=(100, 8))).astype(np.float32), held=False), []
    rows.on_read = read.append
    out = Assignments.empty(100, 600, Truncation(candidates, candidates), rows.device)
    weights = normal(rng, 600, 8)
    TritonOps.start(rows, weights, None, out=out)
    assert read == [64, 36]
    scores((rows, weights, torch.zeros(600)), nan_scores(torch.ones(100), 600, candidates))
    assert read == 2 * [64, 36]
