"""Operations of an outer step never wait for the GPU: they read nothing back to the host."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kernels.problems import difficult_graph
from transclip_fast.kernels import messages
from transclip_fast.ops.triton_backend import TritonOps
from transclip_fast.types import Assignments, LinearScore, Messages, Scores, Truncation

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("few_shot", [False, True])
def test_a_step_stays_on_the_gpu(dtype, few_shot):
    n, k, truncation = 24, 6, Truncation(4, 4)
    rng = np.random.default_rng(0)
    normal = lambda *shape: torch.from_numpy(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    affinity, _ = difficult_graph(rng, n, hub=70)
    features = normal(n, 33).to(dtype)
    rows = torch.arange(n)
    shots = Messages.of(rows[:3], rows[:3], normal(3), n) if few_shot else None
    score = LinearScore(normal(k, 33), normal(k), messages=shots)
    z = Assignments.empty(n, k, truncation, features.device)
    base, spare = Scores.empty(affinity.max_message(), k, truncation), z.empty_like()
    ops = TritonOps(affinity, rows.flip(0))  # counts the hubs' segments
    with NoReads():
        TritonOps.start(features, score.weights, None, out=z)
        ops.score(features, score, out=base)
        ops.sweep(base, z, out=spare)
        ops.class_sums(spare, features)
        ops.energies(spare)
