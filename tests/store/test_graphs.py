"""The checkpoint of a search: of this search only, whole or not at all."""

import numpy as np
import pytest

from transclip_fast.store import graphs
from transclip_fast.store.graphs import GraphCheckpoint

STATE = {"values": np.arange(6.0).reshape(2, 3), "blocks": np.array(4)}


@pytest.fixture(autouse=True)
def _always_due(monkeypatch):
    monkeypatch.setattr(graphs, "CHECKPOINT_SECONDS", 0.0)


def test_round_trip(tmp_path):
    first = GraphCheckpoint(tmp_path / "graph", {"k": 3})
    assert first.load() is None
    first.keep(lambda: STATE)
    found = GraphCheckpoint(tmp_path / "graph", {"k": 3}).load()
    assert set(found) == set(STATE)
    for name, array in STATE.items():
        np.testing.assert_array_equal(found[name], array)
    assert len(list(tmp_path.iterdir())) == 1
    first.remove()
    assert list(tmp_path.iterdir()) == []
    first.remove()


def test_of_another_search(tmp_path):
    GraphCheckpoint(tmp_path / "graph", {"k": 3}).keep(lambda: STATE)
    assert GraphCheckpoint(tmp_path / "graph", {"k": 4}).load() is None


def test_not_before_it_is_due(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "CHECKPOINT_SECONDS", 1e9)
    GraphCheckpoint(tmp_path / "graph", {}).keep(lambda: pytest.fail("asked too early"))
    assert list(tmp_path.iterdir()) == []


def test_damaged(tmp_path):
    checkpoint = GraphCheckpoint(tmp_path / "graph", {})
    checkpoint.keep(lambda: STATE)
    checkpoint.file.write_bytes(checkpoint.file.read_bytes()[:200])
    with pytest.warns(UserWarning, match=r"progress\.npz: damaged.*the search begins anew"):
        assert checkpoint.load() is None
