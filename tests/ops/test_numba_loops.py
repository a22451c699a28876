"""What the compiled loops compute."""

import numpy as np
import pytest

from transclip_fast.ops import numba_loops as loops


@pytest.mark.parametrize("n", [1, 15, 16, 17, 100])
def test_exponentials(n):
    row = -np.random.default_rng(n).exponential(20, n).astype(np.float32)
    row[0] = 0.5
    found, bits = np.full(n, np.nan, np.float32), np.empty(n, np.int32)
    total = loops.exponentials(row, np.float32(0.5), bits, found)
    expected = np.exp(row.astype(np.float64) - 0.5)
    # The exponent x goes through two roundings and a rounded constant; below e^-80 all is 0.
    x = 0.5 - row
    far = x > 80
    assert (np.abs(found / expected - 1)[~far] < 2e-7 * (2 + x[~far])).all()
    assert (found[far] < 1e-34).all()
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-6)


@pytest.mark.parametrize("values", [[1.0] * 9, [3.0, 1.0, 1.0, 1.0, -5.0, 2.0], range(9)])
@pytest.mark.parametrize("limit", [1, 2, 4])
def test_cut(values, limit):
    """At most `limit` are above the upper bound, and with those between the bounds too many."""
    values = np.array(list(values), np.float32)
    low, high = loops.cut(values, values.min(), values.max() + np.float32(1), limit)
    assert (values >= high).sum() <= limit < (values >= low).sum()
    between = values[(values >= low) & (values < high)]
    assert np.ptp(between) < 1e-3


@pytest.mark.parametrize("width", [1, 4, 7, 30])
def test_messages_are_gathered_and_cleared(width):
    rng, n_classes = np.random.default_rng(width), 40
    lengths = rng.integers(1, width + 1, 6)
    used = np.arange(width) < lengths[:, None]
    values = np.where(used, rng.random((6, width)), 0).astype(np.float32)
    drawn = [rng.choice(n_classes, width, replace=False) for _ in values]
    classes = np.array(drawn, np.int32)
    graph = np.array([0, 2, 6]), rng.permutation(6)
    weights = rng.standard_normal(6).astype(np.float32)
    messages = np.zeros(n_classes, np.float32)
    for i in range(2):
        loops.gather_messages(i, *graph, weights, values, classes, messages)
        entries = slice(graph[0][i], graph[0][i + 1])
        expected = np.zeros(n_classes)
        for j, weight in zip(graph[1][entries], weights[entries], strict=True):
            np.add.at(expected, classes[j][used[j]], float(weight) * values[j][used[j]])
        np.testing.assert_allclose(messages, expected, atol=1e-6)
        largest = loops.clear_messages(i, *graph, values, classes, messages)
        np.testing.assert_allclose(largest, np.abs(expected).max(), rtol=1e-5)
        assert (messages == 0).all()


@pytest.mark.parametrize(
    ("values", "low", "kept"),
    [
        ([5.0, 1.0, 3.0, 4.0], 2.0, [0, 2, 3]),
        ([5.0, 1.0, 3.0, 4.0, 2.0], 1.0, [0, 2, 3]),
        ([1.0, 2.0, 1.0, 1.0, 1.0], 1.0, [0, 1, 2]),  # equal ones from the front
        ([1.0, 2.0, 3.0, 4.0, 5.0], -1e9, [2, 3, 4]),
        ([1.0, 1.0], 2.0, []),
    ],
)
def test_enter(values, low, kept):
    """Entries >= low in their order, the largest three where there are more; the rest cleared."""
    values = np.array(values, np.float32)
    classes = np.arange(10, 10 + len(values), dtype=np.int32)
    out, out_classes = np.full(3, 9, np.float32), np.zeros(3, np.int32)
    count = loops.enter(values, classes, low, values.max() + 1, out, out_classes, -np.inf)
    assert count == len(kept)
    np.testing.assert_array_equal(out[:count], values[kept])
    np.testing.assert_array_equal(out_classes[:count], classes[kept])
    assert (out[count:] == -np.inf).all()
