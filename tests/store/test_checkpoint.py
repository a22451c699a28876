"""The checkpoint of long work: of this work only, whole or not at all."""

import numpy as np
import pytest

from transclip_fast.store import checkpoint
from transclip_fast.store.checkpoint import FileCheckpoint, files

STATE = {"values": np.arange(6.0).reshape(2, 3), "blocks": np.array(4)}


def checkpoint_of(folder, identity, seconds=0.0):
    return FileCheckpoint(folder, "search", identity, seconds)


def test_round_trip(tmp_path):
    first = checkpoint_of(tmp_path / "graph", {"k": 3})
    assert first.load() is None
    first.keep(lambda: STATE)
    found = checkpoint_of(tmp_path / "graph", {"k": 3}).load()
    assert set(found) == set(STATE)
    for name, array in STATE.items():
        np.testing.assert_array_equal(found[name], array)
    assert len(list(tmp_path.iterdir())) == 1
    assert first.file == next(files(tmp_path / "graph", "search")) == tmp_path / ".graph.search.npz"


def test_of_another_search(tmp_path):
    checkpoint_of(tmp_path / "graph", {"k": 3}).keep(lambda: STATE)
    with pytest.warns(UserWarning, match="of other input or parameters; search begins anew"):
        assert checkpoint_of(tmp_path / "graph", {"k": 4}).load() is None


def test_not_before_it_is_due(tmp_path):
    checkpoint_of(tmp_path / "graph", {}, 1e9).keep(lambda: pytest.fail("asked too early"))
    assert list(tmp_path.iterdir()) == []


def test_slow_states_are_written_less_often(tmp_path, monkeypatch):
    """Ten times what the last took to write, and 60 intervals at most."""
    clock = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])

    def written(seconds, took, waited):
        times, kept = [], checkpoint_of(tmp_path / f"{seconds} {took} {waited}", {}, seconds)

        def state():
            times.append(clock[0])
            clock[0] += took
            return STATE

        clock[0] += seconds
        kept.keep(state)
        clock[0] += waited
        kept.keep(state)
        return len(times)

    assert written(0.0, 9.0, 0.0) == 2  # every state
    assert written(1.0, 0.01, 0.9) == 1
    assert written(1.0, 0.01, 1.0) == 2
    assert written(1.0, 4.0, 39.0) == 1
    assert written(1.0, 4.0, 40.0) == 2
    assert written(1.0, 99.0, 60.0) == 2


def test_damaged(tmp_path):
    found = checkpoint_of(tmp_path / "graph", {})
    found.keep(lambda: STATE)
    found.file.write_bytes(found.file.read_bytes()[:200])
    with pytest.warns(UserWarning, match=r"search\.npz: damaged.*search begins anew"):
        assert found.load() is None


def test_a_state_that_was_changed_is_not_resumed_from(tmp_path):
    """With the checksums of the archive right, as only a writer of archives makes them."""
    found = checkpoint_of(tmp_path / "graph", {})
    found.keep(lambda: {"values": STATE["values"]})
    assert found.load() is not None
    arrays = dict(np.load(found.file))
    np.savez(found.file, **arrays | {"values": arrays["values"] + 1})
    with pytest.warns(UserWarning, match="damaged, or of an earlier version; search begins anew"):
        assert found.load() is None
