"""The search by cuVS, with a stand-in for it: no GPU has run it."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from tests.conftest import unit
from tests.graph.test_exact import brute_force
from transclip_fast import InputError
from transclip_fast.data.feature_rows import Rows
from transclip_fast.graph import build, cuvs
from transclip_fast.graph.build import build_graph, choose_search
from transclip_fast.graph.candidates import Candidates

X = unit(np.random.default_rng(0).normal(size=(90, 12))).astype("f4")


@pytest.fixture
def called(monkeypatch):
    """cuVS with an exact search behind its documented interface; what it was asked for."""
    seen = {}

    def search(dataset, k, params, *, indices, distances, resources):
        seen.update(k=k, params=params, resources=resources)
        assert indices.dtype == torch.int64
        assert distances.dtype == torch.float32
        squares = torch.cdist(dataset.double(), dataset.double()) ** 2
        values, ids = squares.topk(min(k, len(dataset)), dim=1, largest=False)
        indices[:, : ids.shape[1]], distances[:, : ids.shape[1]] = ids, values.float()
        return indices, distances

    class Resources:
        synced = False

        def sync(self):
            self.synced = True

    modules = {
        "cuvs": {},
        "cuvs.common": {"Resources": Resources},
        "cuvs.neighbors": {
            "all_neighbors": SimpleNamespace(build=search, AllNeighborsParams=SimpleNamespace),
            "nn_descent": SimpleNamespace(IndexParams=SimpleNamespace),
        },
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return seen


@pytest.mark.parametrize("n", [3, 90])
def test_its_lists(n, called):
    found = Candidates.empty(n, 7)
    cuvs.search_cuvs(Rows(X[:n]), found)
    expected, values = brute_force(X[:n], X[:n], min(7, n - 1))
    np.testing.assert_array_equal(found.ids[:, : n - 1], expected)
    np.testing.assert_allclose(found.values[:, : n - 1], values, atol=1e-5)
    assert (found.ids[:, n - 1 :] == -1).all()
    assert called["k"] == 8  # with the row itself
    assert called["params"].metric == "sqeuclidean"
    assert called["resources"].synced


def test_it_needs_a_gpu_and_cuvs(monkeypatch):
    with pytest.raises(InputError, match="needs rows that a GPU holds"):
        build_graph(X, 3, search="cuvs")
    monkeypatch.setitem(sys.modules, "cuvs", None)
    with pytest.raises(InputError, match="cuVS cannot be imported"):
        cuvs.search_cuvs(Rows(X), Candidates.empty(90, 7))


def test_when_auto_takes_it(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for installed, many in ((True, "cuvs"), (False, "faiss")):
        monkeypatch.setattr(build, "cuvs_installed", lambda installed=installed: installed)
        assert choose_search(10**9, gpu, held=True) == many
        assert choose_search(10**9, gpu, held=False) == "faiss"
        assert choose_search(10**9, cpu, held=True) == "faiss"
        assert choose_search(10**6, gpu, held=True) == "exact"
        assert choose_search(10**6, gpu, held=False) == "faiss"
        assert choose_search(10**4, gpu, held=False) == "exact"


@pytest.mark.parametrize("installed", [True, False])
def test_when_a_gpu_holds_rows_in_files(installed, monkeypatch):
    """Where it searches them: a million rows of 512 dimensions take 3 GB, of twice as much."""
    monkeypatch.setattr(build, "free_bytes", lambda device: 6.2e9)
    monkeypatch.setattr(build, "cuvs_installed", lambda: installed)
    gpu, shape = torch.device("cuda"), (10**6, 512)
    assert all(build.holds_files(search, shape, gpu) for search in ("auto", "exact", "cuvs"))
    assert not build.holds_files("auto", (10**6, 520), gpu)
    assert not build.holds_files("faiss", shape, gpu)
    assert not build.holds_files("auto", shape, torch.device("cpu"))
    assert build.holds_files("auto", (2 * 10**6, 128), gpu) is installed  # else FAISS streams them
