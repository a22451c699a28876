"""Candidates from int8 scores, against float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from transclip_fast import device
from transclip_fast.data.feature_rows import Rows
from transclip_fast.ops import int8_scores, numba_topk
from transclip_fast.ops.int8_scores import Int8Scores
from transclip_fast.ops.numba_backend import NumbaOps
from transclip_fast.types import Affinity, Assignments, LinearScore, Scores, Truncation

N, K, D = 300, 200, 65
FLOOR = 1e-4


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(int8_scores, "multiplies_bytes", lambda dim: True)


def problem(n=N, k=K, d=D, scale=100.0):
    """Unit rows in a narrow cone, weights and offsets whose scores leave a row few classes."""
    draw = torch.Generator().manual_seed(0)
    normal = torch.nn.functional.normalize
    own = torch.randn(k, d, generator=draw)
    own[:, 3] += 20
    weights = scale * (normal(own) - normal(own).mean(0))
    rows = own[torch.arange(n) % k] + 0.7 * torch.randn(n, d, generator=draw)
    offset = torch.randn(k, generator=draw)
    exact = (normal(rows).double() @ weights.double().T + offset).numpy()
    return exact, (normal(rows), weights, offset)


def room(n=N, width=K, max_message=0.7):
    return Scores.empty(torch.full((n,), max_message), K, Truncation(width, width, FLOOR))


def listed(scores):
    """log p (N, K) of the classes in lists, NaN for all others."""
    found = np.full((len(scores.values), K), np.nan)
    rows, places = np.nonzero(np.isfinite(scores.values.numpy()))
    found[rows, scores.classes.numpy()[rows, places]] = scores.values.numpy()[rows, places]
    return found


def score(operands, out, nodes=None):
    """Scores of numba's: no edge is needed for them."""
    features, *linear = operands
    none = torch.zeros(0, dtype=torch.int64)
    affinity = Affinity(torch.zeros(len(features) + 1, dtype=torch.int64), none, none.float())
    return NumbaOps(affinity, nodes).score(features, LinearScore(*linear), out=out)


finite = st.floats(-1e3, 1e3, width=32)


@given(st.lists(st.lists(finite, min_size=7, max_size=7), min_size=1, max_size=9))
@settings(deadline=None)
def test_to_int8(rows):
    """Each entry is within half a step of what it was, and the largest of a row is 127 steps."""
    rows = np.array(rows, np.float32)
    centre, codes = rows[0] / 2, np.empty(rows.shape, np.int8)
    steps, norms = np.empty((2, len(rows)), np.float32)
    numba_topk.to_int8(rows, centre, codes, steps, norms)
    left = rows.astype(np.float64) - centre
    largest = np.abs(left).max(1)
    off = np.abs(codes * steps[:, None].astype(np.float64) - left)
    assert (off <= 0.5 * steps[:, None] + 1e-6 * largest[:, None] + 1e-30).all()
    assert (np.abs(codes).max(1) == 127)[largest > 1e-29].all()
    assert (codes[largest == 0] == 0).all()
    np.testing.assert_allclose(norms, np.linalg.norm(left, axis=1), rtol=1e-5, atol=1e-18)


@pytest.mark.parametrize("nodes", [False, True])
def test_score(nodes):
    exact, operands = problem()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    out, places = room(), order if nodes else torch.arange(N)
    assert Int8Scores(*operands[1:]).is_faster(operands[0], out.log_threshold.numpy())
    score(operands, out, order if nodes else None)
    log_p = reference.log_softmax(exact)
    found, threshold = listed(out)[places], out.log_threshold.numpy()[places, None]
    error = 0.2
    assert np.isfinite(found[log_p > threshold + error]).all()
    assert np.isnan(found[log_p < threshold - error]).all()
    off = np.abs(found - log_p)
    # Where the messages lift it most, what errs in int8 is off by the floor at four standard
    # errors, and none of all these by more than six.
    assert 1e-3 < np.nanmax(off) < error
    assert np.nanmax(off * np.exp(log_p + 0.7)) < 1.5 * FLOOR
    assert np.nanmax(off[log_p > threshold - np.log(0.05)]) < 1e-4
    tail = np.where(np.isnan(found), np.exp(log_p), 0).sum(1)
    np.testing.assert_allclose(out.tail.numpy()[places], tail, rtol=0.05, atol=2e-6)


def test_full_lists_keep_the_largest():
    exact, operands = problem()
    out = room(width=3)
    assert Int8Scores(*operands[1:]).is_faster(operands[0], out.log_threshold.numpy())
    score(operands, out)
    log_p, tail = reference.sparse_score(exact, 3, np.log(FLOOR) - 0.7)
    np.testing.assert_allclose(out.tail, tail, rtol=0.05, atol=2e-6)
    # Only of what errs in int8 another one may be taken.
    taken, meant = ~np.isnan(listed(out)), np.isfinite(log_p)
    assert (reference.log_softmax(exact)[taken != meant] < np.log(FLOOR) - np.log(0.2)).all()
    assert (taken.sum(1) == meant.sum(1)).all()


def test_start():
    """The top rows of a class are exact, however small they are."""
    exact, (features, weights, offset) = problem()
    exact -= offset.double().numpy()
    log_y = reference.log_softmax(exact)
    z = Assignments.empty(N, K, Truncation(K, K), torch.device("cpu"))
    threshold = np.full(N, np.log(FLOOR), np.float32)
    assert Int8Scores(weights, torch.zeros(K)).is_faster(features, threshold)
    normaliser, values, rows = NumbaOps.start(features, weights, None, out=z)
    order = np.argsort(-log_y, axis=0, kind="stable")[:8]
    np.testing.assert_array_equal(rows, order)
    # Of the log-sum-exp only a little mass comes from 8 bits.
    np.testing.assert_allclose(values, np.take_along_axis(log_y, order, 0), atol=1e-4)
    np.testing.assert_allclose(normaliser, (exact - log_y)[:, 0], atol=1e-4)
    expected = np.where(reference.largest(np.exp(log_y), K, FLOOR), np.exp(log_y), 0)
    np.testing.assert_allclose(z.dense(), expected, atol=1.1 * FLOOR)


@pytest.mark.parametrize(
    ("change", "faster"),
    [
        ({}, True),
        ({"scale": 30.0}, False),  # too many classes matter
        ({"scale": 3000.0}, False),  # int8 errors are nats
        ({"n": 1}, True),
    ],
)
def test_where_it_is_faster(change, faster):
    _, (features, weights, offset) = problem(**change)
    threshold = np.full(len(features), -10.0, np.float32)
    assert Int8Scores(weights, offset).is_faster(features, threshold) is faster


@pytest.mark.parametrize(("k", "dim", "possible"), [(64, 9, False), (65, 9, True)])
def test_few_classes_gain_nothing(k, dim, possible):
    assert (int8_scores.int8_scores(torch.zeros(k, dim), torch.zeros(k)) is not None) is possible


def test_a_row_unlike_the_others_is_scored_in_float32():
    """No sample shows it: one entry holds nearly all of it, and int8 errors are nats."""
    _, (features, weights, offset) = problem(scale=400.0)
    features[1] = torch.nn.functional.one_hot(torch.tensor(5), D)
    # For the other rows int8 is good enough only because it is so far from them.
    weights, spike = weights.clone(), 3000 * torch.eye(D)[5]
    weights[7::2] += spike
    exact = (features.double() @ weights.double().T + offset).numpy()
    lists = room()
    scanned = Int8Scores(weights, offset)
    scanned.select(
        features,
        0,
        np.arange(N),
        lists.log_threshold.numpy(),
        lists.values.numpy(),
        lists.classes.numpy(),
        lists.tail.numpy(),
        np.empty(N, np.float32),
        np.empty((0, K), np.float32),
        np.empty((0, K), np.int64),
    )
    log_p, _ = reference.sparse_score(exact, K, np.log(FLOOR) - 0.7)
    found = np.nan_to_num(listed(lists)[1], nan=-np.inf)
    np.testing.assert_allclose(found, log_p[1], atol=5e-3)


@pytest.mark.parametrize(("k", "n"), [(65, 513), (81, 1), (200, 1025)])
def test_odd_shapes(k, n):
    """A class alone in its chunk, a row alone in its block."""
    exact, operands = problem(n=n, k=k)
    out = Scores.empty(torch.full((n,), 0.7), k, Truncation(k, k, FLOOR))
    select = Int8Scores(*operands[1:]).select
    none = np.empty((0, k), np.float32), np.empty((0, k), np.int64)
    lists = out.values.numpy(), out.classes.numpy(), out.tail.numpy(), np.empty(n, np.float32)
    for first in range(0, n, 512):
        rows = operands[0][first : first + 512]
        select(rows, first, np.arange(n), out.log_threshold.numpy(), *lists, *none)
    log_p = reference.log_softmax(exact)
    rows, places = np.nonzero(np.isfinite(out.values.numpy()))
    found = out.values.numpy()[rows, places]
    np.testing.assert_allclose(found, log_p[rows, out.classes.numpy()[rows, places]], atol=0.2)
    assert len(found) >= (log_p > out.log_threshold.numpy()[:, None] + 0.2).sum()


def test_where_bytes_are_fast(monkeypatch):
    for known, dim, fast in ((True, 2, True), (False, 2, False), (True, 1, False)):
        found = {"avx512_vnni": known}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert device.multiplies_bytes(dim) is fast
    assert not device.multiplies_bytes(1 << 18)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not device.multiplies_bytes(512)


def test_threads_and_streaming_change_nothing(tmp_path):
    _, (features, weights, offset) = problem(n=3000)
    np.save(tmp_path / "f.npy", features.numpy())
    streamed = Rows(np.load(tmp_path / "f.npy", mmap_mode="r"), held=False)
    results, before = [], torch.get_num_threads()
    try:
        for threads, rows in ((1, streamed), (2, Rows(features)), (3, streamed)):
            torch.set_num_threads(threads)
            z = Assignments.empty(3000, K, Truncation(20, 20), torch.device("cpu"))
            found = NumbaOps.start(rows, weights, None, out=z)
            out = score((rows, weights, offset), room(3000))
            results.append([*found, z.values, z.classes, out.values, out.classes, out.tail])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
