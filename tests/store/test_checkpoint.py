"""The checkpoint of long work: of this work only, whole or not at all."""

import numpy as np
import pytest

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


def test_damaged(tmp_path):
    checkpoint = checkpoint_of(tmp_path / "graph", {})
    checkpoint.keep(lambda: STATE)
    checkpoint.file.write_bytes(checkpoint.file.read_bytes()[:200])
    with pytest.warns(UserWarning, match=r"search\.npz: damaged.*search begins anew"):
        assert checkpoint.load() is None


def test_a_state_that_was_changed_is_not_resumed_from(tmp_path):
    """With the checksums of the archive right, as only a writer of archives makes them."""
    checkpoint = checkpoint_of(tmp_path / "graph", {})
    checkpoint.keep(lambda: {"values": STATE["values"]})
    assert checkpoint.load() is not None
    arrays = dict(np.load(checkpoint.file))
    np.savez(checkpoint.file, **arrays | {"values": arrays["values"] + 1})
    with pytest.warns(UserWarning, match="damaged, or of an earlier version; search begins anew"):
        assert checkpoint.load() is None
