"""Steps that are recorded and replayed, by a recorder that needs no GPU."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transclip_fast import TransCLIP
from transclip_fast.ops import torch_backend as ops
from transclip_fast.ops.capture import Captured
from transclip_fast.solver import loop as solver


def storages(values):
    found = [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
    return {storage.data_ptr(): storage for storage in found}


class Recorder(TorchDispatchMode):
    """Records a step's operations, and replays them on the memory that they were recorded with."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays, self.given, self.made = [], 0, {}, {}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        for place, storage in storages((arguments, named)).items():
            if place not in self.given and place not in self.made:
                self.given[place] = storage, storage.clone()
        result = function(*arguments, **named)
        self.calls.append((function, arguments, named, result))
        self.made |= {p: s for p, s in storages(result).items() if p not in self.given}
        return result

    def record(self, step):
        """As with a CUDA graph nothing has been computed afterwards."""
        with self:
            step()
        for storage, before in self.given.values():
            storage.copy_(before)
        for storage in self.made.values():
            storage.fill_(255)  # NaN
        return self.replay

    def replay(self):
        self.replays += 1
        for function, arguments, named, result in self.calls:
            new = function(*arguments, **named)
            for kept, found in zip(tree_leaves(result), tree_leaves(new), strict=True):
                if (
                    isinstance(kept, torch.Tensor)
                    and storages(kept).keys() != storages(found).keys()
                ):
                    kept.copy_(found)


class Recorded:
    """The torch operations, with steps recorded."""

    def __init__(self, recorder):
        self.recorder = recorder

    def __getattr__(self, name):
        return getattr(ops, name)

    def captured(self, step, renewed, features):
        return Captured(step, renewed, self.recorder.record)


@pytest.mark.parametrize("inner_iter", [1, 2, 5])
@pytest.mark.parametrize("shots", [0, 15])
@pytest.mark.parametrize("fixed", [{}, {"update_variance": False}, {"update_means": False}])
@pytest.mark.usefixtures("one_thread")
def test_a_captured_fit_is_the_same(problem, monkeypatch, inner_iter, shots, fixed):
    features, prototypes, labels = problem(n=60)
    model = TransCLIP(
        device="cpu", backend="torch", gamma=0.02, max_iter=5, inner_iter=inner_iter, **fixed
    )
    fit = partial(model.fit, features[shots:], prototypes)
    if shots:
        fit = partial(fit, support_features=features[:shots], support_labels=labels[:shots])
    names = ("label_distributions_", "means_", "variances_", "objective_")
    plain = {name: getattr(fit(), name) for name in names}
    recorder, seen = Recorder(), []
    monkeypatch.setattr(solver, "operations", lambda _: Recorded(recorder))
    found = fit(progress=seen.append)
    for name in names:
        np.testing.assert_array_equal(getattr(found, name), plain[name])
    assert recorder.replays == 4
    assert max(state.steps for state in seen) == 5


def test_a_step_is_warmed_up_recorded_and_replayed():
    state = {"x": torch.tensor([1.0])}
    taken, recorded = [], []

    def step():
        taken.append(1)
        state["x"] = 2 * state["x"]

    def record(step):
        recorded.append(step)
        return step

    captured = Captured(step, lambda: [state["x"]], record)
    captured()
    assert (len(taken), len(recorded), state["x"].item()) == (1, 0, 2)
    first = state["x"]
    captured()
    assert len(recorded) == 1
    assert first.item() == state["x"].item() == 4  # where the next replay begins
