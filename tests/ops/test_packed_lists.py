"""Lists of z: their labels, and how processes send them, which is the same in both backends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from transclip_fast import InputError
from transclip_fast.ops import numba_backend, packed_lists
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


def test_entries_in_use_follow_each_other(ops):
    z = lists(LENGTHS)
    entries, ends = ops.pack(z, torch.tensor(ROWS))
    expected = []
    for row in ROWS:
        n = max(LENGTHS[row], 1)
        classes = z.classes[row, :n].tolist()
        bits = z.values[row, :n].view(torch.int32).tolist()
        expected += [*zip(classes[:-1], bits[:-1], strict=True), (-1 - classes[-1], bits[-1])]
    assert [tuple(entry) for entry in entries.tolist()] == expected
    assert ends.tolist() == np.cumsum([max(LENGTHS[row], 1) for row in ROWS]).tolist()


def test_lists_are_set_over_others(ops):
    z, out = lists(LENGTHS), lists((4, 2, 4, 4, 1, 3), seed=1)
    ops.unpack(ops.pack(z, torch.tensor(ROWS))[0], out)
    torch.testing.assert_close(out.values, z.values[list(ROWS)], rtol=0, atol=0)
    for row, source in enumerate(ROWS):
        n = LENGTHS[source]
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
    entries, ends = ops.pack(lists(LENGTHS), torch.tensor([], dtype=torch.int64))
    assert entries.shape == (0, 2)
    assert len(ends) == 0
    ops.unpack(entries, lists(()))


@pytest.mark.parametrize("wrong", ["fewer", "more", "too long", "unended", "class"])
def test_other_lists_than_were_asked_for_are_refused(ops, wrong):
    z, rows, out = lists(LENGTHS), list(ROWS), lists((1,) * len(ROWS))
    if wrong == "fewer":
        rows = rows[:-1]
    if wrong == "more":
        rows.append(0)
    entries = packed_lists.pack(z, torch.tensor(rows))[0].clone()
    if wrong == "too long":
        entries[3, 0] = ~entries[3, 0]  # the first list, of 4, has no end
    if wrong == "unended":
        entries[-1, 0] = ~entries[-1, 0]
    if wrong == "class":
        out = replace(out, n_classes=2)
    with pytest.raises(InputError, match="lists of z that it cannot have"):
        ops.unpack(entries, out)
