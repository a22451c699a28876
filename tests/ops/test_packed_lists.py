"""Lists of z: their labels, and how processes send them, which is the same in both backends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from transclip_fast import InputError
from transclip_fast.ops import numba_backend
from transclip_fast.ops.numba_backend import NumbaOps
from transclip_fast.ops.torch_backend import TorchOps
from transclip_fast.types import Affinity, Assignments, Truncation

N_CLASSES, WIDTH = 11, 4
LENGTHS = (3, 4, 1, 0, 2, 4)  # in use; one list has none
ROWS = (5, 0, 3, 0, 1, 2)


@pytest.fixture(params=[TorchOps, NumbaOps])
def ops(request, monkeypatch):
    monkeypatch.setattr(numba_backend, "LIST_ROWS", 4)  # some blocks of labels,
    monkeypatch.setattr(numba_backend, "n_threads", lambda: 3)  # and of packed lists
    none = torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    return request.param(Affinity(*none))


def lists(lengths, seed=0):
    """Lists of z with so many entries in use."""
    rng = np.random.default_rng(seed)
    z = Assignments.empty(len(lengths), N_CLASSES, Truncation(WIDTH, WIDTH), torch.device("cpu"))
    for row, n in enumerate(lengths):
        z.values[row, :n] = torch.from_numpy(rng.random(n, np.float32))
        z.classes[row] = torch.from_numpy(rng.permutation(N_CLASSES)[:WIDTH])
    return z


def bits(values):
    return values.view(torch.int32).tolist()


def packed(ops, z, rows, before=None):
    return torch.cat(ops.pack(z, torch.tensor(rows, dtype=torch.int64), before))


def changed(z):
    """Lists of z, of which some have other classes, values, or numbers of entries."""
    other = z.take(slice(None))
    other = replace(other, values=z.values.clone(), classes=z.classes.clone())
    other.values[0, 1] = 0.375  # another value
    other.classes[1, 3] = (z.classes[1, 3] + 1) % N_CLASSES  # another class
    other.values[2, 1] = 0.5  # one entry more
    other.values[5, 3] = 0  # one less
    other.classes[3:5, 3] = 7  # not in use
    return other


def test_all_of_lists_is_sent_once(ops):
    z = lists(LENGTHS)
    used = [max(LENGTHS[row], 1) for row in ROWS]
    expected = [-n for n in used]
    for row, n in zip(ROWS, used, strict=True):
        expected += [*z.classes[row, :n].tolist(), *bits(z.values[row, :n])]
    assert packed(ops, z, ROWS).tolist() == expected


def test_what_has_changed_is_sent_again(ops):
    z = lists(LENGTHS)
    other = changed(z)
    expected = [1, -4, -2, 0, 0, -3, *bits(other.values[0, :3])]
    for row, n in ((1, 4), (2, 2), (5, 3)):
        expected += [*other.classes[row, :n].tolist(), *bits(other.values[row, :n])]
    assert packed(ops, other, range(6), z).tolist() == expected


@pytest.mark.parametrize("again", [False, True])
def test_lists_are_set_over_others(ops, again):
    z, out = lists(LENGTHS), lists((4, 2, 4, 4, 1, 3), seed=1)
    ops.unpack(packed(ops, z, ROWS), out, None)
    if again:
        sent, out, before = z, lists((1, 3, 4, 4, 2, 3), seed=2), out
        z = changed(z)
        ops.unpack(packed(ops, z, ROWS, sent), out, before)
    torch.testing.assert_close(out.values, z.values[list(ROWS)], rtol=0, atol=0)
    for row, source in enumerate(ROWS):
        n = int((z.values[source] > 0).sum())
        assert out.classes[row, :n].tolist() == z.classes[source, :n].tolist()


def test_best_is_the_lowest_of_equal_classes(ops):
    z = lists((1, 3, 4, 2, 4, 3))
    z.values[1, :3] = torch.tensor([0.25, 0.5, 0.5])
    z.values[2] = 0.25
    z.classes[1] = torch.tensor([2, 9, 4, 1])  # of which the last is not in use
    z.classes[2] = torch.tensor([5, 3, 10, 7])
    labels, values = ops.best(z)
    dense = z.dense()
    assert labels.tolist() == dense.argmax(1).tolist()
    assert labels[1:3].tolist() == [4, 3]
    torch.testing.assert_close(values, dense.amax(1), rtol=0, atol=0)


def test_no_lists(ops):
    found = packed(ops, lists(LENGTHS), [])
    assert found.tolist() == []
    assert found.dtype == torch.int32
    ops.unpack(found, lists(()), None)


WRONG = {
    "fewer lists": lambda words: words[:4],
    "no lists": lambda words: words[:0],
    "more": lambda words: torch.cat([words, words[-1:]]),
    "less": lambda words: words[:-1],
    "too long": lambda words: words.index_fill(0, torch.tensor(1), -WIDTH - 1),
    "longest": lambda words: words.index_fill(0, torch.tensor(1), -(2**31)),
    "an unknown head": lambda words: words.index_fill(0, torch.tensor(0), 2),
    "another number": lambda words: words.index_fill(0, torch.tensor(0), -3),
    "a class too many": lambda words: words.index_fill(0, torch.tensor(6), N_CLASSES),
    "a class below 0": lambda words: words.index_fill(0, torch.tensor(6), -1),
    "the same": lambda words: words.index_fill(0, torch.tensor(0), 0),
    "the same classes": lambda words: words.index_fill(0, torch.tensor(0), 1),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_other_lists_than_were_asked_for_are_refused(ops, wrong):
    words = WRONG[wrong](packed(ops, lists(LENGTHS), ROWS))
    before = lists((3,) * len(ROWS)) if wrong.startswith("an") else None
    out = lists((1,) * len(ROWS))
    with pytest.raises(InputError, match="lists of z that it cannot have"):
        ops.unpack(words, out, before)
