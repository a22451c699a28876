"""A solve's state that several processes write and any number of them read."""

import numpy as np
import pytest

from transclip_fast.ranks import Ranks
from transclip_fast.store.checkpoint import RankedCheckpoint, ranked_files


class Told(Ranks):
    """A rank that hears what a test says the others send."""

    index = None  # of the first rank, as another one hears it

    def broadcast(self, value):
        return True if isinstance(value, bool) else value or self.index

    def all_gather(self, value):
        return [[0, 5], [5, 7]] if isinstance(value, list) else [value]


def checkpoint(tmp_path, rows, rank=0, identity="a"):
    ranks = Told(rank, 2)
    return RankedCheckpoint(
        tmp_path / "out", "solve-0", {"x": identity}, 0.0, ranks=ranks, rows=rows
    )


def sparse_state(first, last):
    """Row i has i + 1 entries of class i."""
    rows = np.arange(first, last)
    values = np.repeat(rows, rows + 1)
    return {
        "objective": np.array([3.0]),
        "z": values.astype(np.float32),
        "classes": values.astype(np.int32),
        "lengths": (rows + 1).astype(np.int32),
    }


def dense_state(first, last):
    return {"objective": np.array([3.0]), "z": np.arange(14.0).reshape(7, 2)[first:last]}


@pytest.mark.parametrize("state", [sparse_state, dense_state])
@pytest.mark.parametrize("rows", [(0, 7), (0, 3), (3, 6), (5, 7), (6, 6), (0, 0)])
def test_other_numbers_of_ranks_read_their_rows(tmp_path, state, rows):
    checkpoint(tmp_path, slice(5, 7), rank=1).keep(lambda: state(5, 7))
    checkpoint(tmp_path, slice(0, 5)).keep(lambda: state(0, 5))
    found = checkpoint(tmp_path, slice(*rows)).load()
    expected = state(*rows)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_step_counts_when_all_have_written_it(tmp_path):
    checkpoint(tmp_path, slice(5, 7), rank=1).keep(lambda: dense_state(5, 7))
    assert checkpoint(tmp_path, slice(0, 7)).load() is None
    assert len(ranked_files(tmp_path / "out", "solve-0")) == 1


@pytest.mark.parametrize("damage", ["identity", "index", "part"])
def test_another_or_damaged_state_begins_anew(tmp_path, damage):
    checkpoint(tmp_path, slice(5, 7), rank=1).keep(lambda: dense_state(5, 7))
    checkpoint(tmp_path, slice(0, 5)).keep(lambda: dense_state(0, 5))
    if damage == "index":
        (tmp_path / ".out.solve-0.ranks.index").write_text('{"identity": "a", "step": 1}')
    if damage == "part":
        (tmp_path / ".out.solve-0.ranks.1.0-5.npz").write_bytes(b"PK")
    identity = "b" if damage == "identity" else "a"
    with pytest.warns(UserWarning, match="begins anew"):
        assert checkpoint(tmp_path, slice(0, 7), identity=identity).load() is None


def test_later_steps_replace_earlier_ones(tmp_path):
    ranks = [checkpoint(tmp_path, slice(5, 7), rank=1), checkpoint(tmp_path, slice(0, 5))]
    for _ in range(2):
        for rank in ranks:
            rank.keep(lambda rank=rank: dense_state(rank.rows.start, rank.rows.stop))
    names = sorted(file.name for file in ranked_files(tmp_path / "out", "solve-0"))
    ends = ["2.0-5.npz", "2.5-7.npz", "2.npz", "index"]
    assert names == [f".out.solve-0.ranks.{end}" for end in ends]


def test_other_work_leaves_the_files_of_a_step_until_all_have_written_its_own(tmp_path):
    checkpoint(tmp_path, slice(5, 7), rank=1).keep(lambda: dense_state(5, 7))
    checkpoint(tmp_path, slice(0, 5)).keep(lambda: dense_state(0, 5))
    index = {"identity": '{"x": "a"}', "step": 1, "parts": [[0, 5], [5, 7]]}
    other = checkpoint(tmp_path, slice(5, 7), rank=1, identity="b")
    other.ranks.index = index
    with pytest.warns(UserWarning, match="begins anew"):
        assert other.load() is None
    other.keep(lambda: {"objective": np.array([4.0]), "z": np.zeros((2, 2))})
    found = checkpoint(tmp_path, slice(0, 7)).load()
    np.testing.assert_array_equal(found["z"], dense_state(0, 7)["z"])
