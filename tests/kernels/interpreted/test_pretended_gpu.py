"""Whole fits and searches on a GPU that is not here: no operand is on the wrong device."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.kernels.pretend_gpu import GPU, OnGpu, pretend_gpu
from transclip_fast import TransCLIP, build_graph
from transclip_fast.kernels import messages
from transclip_fast.solver import problem as problems

STEPS = {"max_iter": 1, "inner_iter": 1, "memory": "9GiB"}
# What is given beside the features, and parameters.
CASES = {
    "text, streamed": (["text"], {"precision": "float16"}),
    "prior": (["prior"], {}),
    "shots": (["text", "shots"], {"gamma": 0.02}),
    "known labels and class cost": (["text", "known"], {"class_cost": True}),
}


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch):
    """The interpreter's time is that of the programs, whatever their size."""
    monkeypatch.setattr(messages, "LAUNCHES", {16: (64, 1), 32: (64, 1)})


@pytest.mark.parametrize("step", [
    lambda x, y: x + y, lambda x, y: torch.cat([x, y]), lambda x, y: y[x.long()],
    lambda x, y: x.numpy(), lambda x, y: x.mul_(y), lambda x, y: torch.add(x, x, out=y),
    lambda x, y: x.__setitem__(y.long(), y), lambda x, y: x.sum() + y,
])  # fmt: skip
def test_mixed_devices_are_noticed(step):
    with pretend_gpu(), pytest.raises((RuntimeError, TypeError)):
        step(torch.zeros(3, device=GPU), torch.zeros(3))


def test_what_a_gpu_takes():
    with pretend_gpu():
        x, y = torch.zeros(3, device="cuda"), torch.ones(3)
        assert (x + 1).device.type == "cuda"
        assert (x + torch.tensor(1.0)).is_cuda
        assert isinstance(x[torch.tensor([1])], OnGpu)
        assert isinstance(y.to(x.device), OnGpu)
        assert not isinstance(x.cpu(), OnGpu)
        assert x.copy_(y).cpu().numpy().tolist() == [1, 1, 1]


@pytest.mark.parametrize("assignments", ["dense", "sparse"])
@pytest.mark.parametrize("case", CASES)
def test_fits(problem, monkeypatch, case, assignments):
    features, text, labels = problem(n=30)
    names, changed = CASES[case]
    arrays = {
        "text": {"text_features": text},
        "prior": {"prior_logits": 100 * features @ text.T},
        "shots": {"support_features": features[:12], "support_labels": labels[:12]},
        "known": {"known_labels": np.where(np.arange(30) < 6, labels, -1)},
    }
    given = {key: array for name in names for key, array in arrays[name].items()}
    parameters = {**STEPS, **changed, "assignments": assignments}
    exact = parameters | {"precision": "float32"}
    if assignments == "dense":  # which float16 is not for
        parameters = exact
    expected = TransCLIP(device="cpu", backend="torch", **exact).fit(features, **given)
    choose = problems.choose_layout
    layout = lambda *x, **y: replace(choose(*x, **y), held="streamed" not in case)  # noqa: E731
    monkeypatch.setattr(problems, "choose_layout", layout)
    with pretend_gpu():
        found = TransCLIP(device="cuda", **parameters).fit(features, **given, graph=expected.graph_)
    assert found.backend_ == {"dense": "torch", "sparse": "triton"}[assignments]
    np.testing.assert_array_equal(found.transduction_, expected.transduction_)
    np.testing.assert_allclose(found.objective_, expected.objective_, rtol=1e-2)


@pytest.mark.parametrize("where", ["array", "file", "file that fits"])
@pytest.mark.parametrize("search", ["exact", "faiss"])
def test_searches(problem, tmp_path, search, where, monkeypatch):
    if search == "faiss":
        pytest.importorskip("faiss")
    features, _, _ = problem(n=60)
    np.save(tmp_path / "features.npy", features)
    given = features if where == "array" else np.load(tmp_path / "features.npy", mmap_mode="r")
    room = {"cpu": 10**9, "cuda": 10**9 if where == "file that fits" else 0}
    free = "transclip_fast.graph.build.free_bytes"
    monkeypatch.setattr(free, lambda device: room[device.type])
    with pretend_gpu():
        found = build_graph(given, 3, search=search, device="cuda")
    np.testing.assert_array_equal(found.neighbors, build_graph(features, 3).neighbors)
