"""What a recorded step must not do: read to the host, or move what it works on."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import unit
from transclip_fast.data.feature_rows import Rows
from transclip_fast.graph.build import build_graph
from transclip_fast.kernels import messages
from transclip_fast.ops import triton_backend as ops
from transclip_fast.ops.capture import Captured
from transclip_fast.solver import loop as solver
from transclip_fast.solver.parameters import Parameters
from transclip_fast.solver.prior import LinearPrior
from transclip_fast.solver.support import Support
from transclip_fast.types import Truncation

READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")


class NoReads(TorchDispatchMode):
    """Refuses operations that wait for a GPU, and constants that would be copied to it."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name, named = str(function), named or {}
        given = [x for x in tree_leaves((arguments, named)) if isinstance(x, torch.Tensor)]
        if any(read in name for read in READS) or "lift_fresh" in name:
            raise AssertionError(f"{name} waits for the GPU")
        if "repeat_interleave" in name and named.get("output_size") is None:
            raise AssertionError(f"{name} has to find out how much there is")
        if "index" in name and any(x.dtype == torch.bool for x in given):
            raise AssertionError(f"{name} by a mask waits for the GPU")
        return function(*arguments, **named)


@pytest.mark.parametrize("step", [
    lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0],
    lambda x: torch.repeat_interleave(x.long()), lambda x: x.tolist()[0] and torch.tensor(1.0),
])  # fmt: skip
def test_reads_are_noticed(step):
    with pytest.raises(AssertionError), NoReads():
        step(torch.ones(3))


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch):
    """The interpreter's time is that of the programs, whatever their size."""
    monkeypatch.setattr(messages, "LAUNCHES", {16: (64, 1), 32: (64, 1)})


@pytest.mark.parametrize(
    ("dtype", "short", "shots"),
    [(torch.float32, True, 0), (torch.float16, True, 0), (torch.float16, True, 6),
     (torch.float16, False, 0), (torch.float32, False, 6)],
)  # fmt: skip
def test_a_step_stays_on_the_gpu(problem, dtype, short, shots):
    features, prototypes, labels = (torch.from_numpy(x) for x in problem(n=24))
    features, shown, classes = features[shots:], features[:shots], labels[:shots]
    k = len(prototypes)
    support = None
    if shots:
        support = Support.build(shown, classes, features, n_classes=k, n_neighbors=3)
    run = solver._Run(
        ops, features.to(dtype), LinearPrior.from_prototypes(prototypes, 100.0),
        build_graph(features), Parameters(inner_iter=2), kl_weight=1.0, support=support, gamma=0.02,
        truncation=Truncation(min(4, k), min(4, k)) if short else None,
    )  # fmt: skip

    def memory():
        arrays = [x for kept in (run.z, run.spare, run.base) for x in vars(kept).values()]
        return {x.data_ptr() for x in arrays if isinstance(x, torch.Tensor)}

    run.step()  # a graph's hubs are counted once
    before = memory()
    with NoReads():
        run.step()
    assert memory() == before


def test_which_steps_are_captured(monkeypatch):
    def step():
        raise AssertionError("this is not the time")

    features = Rows(torch.from_numpy(unit(torch.ones(5, 3).numpy())))
    chosen = lambda: ops.captured(step, list, features)  # noqa: E731
    assert chosen() is step
    features.device = torch.device("cuda")
    assert isinstance(chosen(), Captured)
    monkeypatch.setattr(ops, "CAPTURED_ROWS", 4)
    assert chosen() is step
    monkeypatch.undo()
    features._held = None
    assert chosen() is step
