"""Which backend runs where, and the messages where one is missing."""

import sys

import pytest
import torch

from transclip_fast import InputError, TransCLIP
from transclip_fast.ops import choose_backend
from transclip_fast.types import Truncation

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SPARSE = Truncation(16, 16)


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_a_gpu_takes_triton_for_sparse_assignments():
    pytest.importorskip("triton")
    assert choose_backend("auto", GPU, SPARSE) == "triton"
    assert choose_backend("triton", GPU, SPARSE) == "triton"
    assert choose_backend("torch", GPU, SPARSE) == "torch"


def test_dense_assignments_are_for_torch(monkeypatch):
    assert choose_backend("auto", GPU, None) == "torch"
    assert choose_backend("auto", CPU, None) == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in ("triton", "numba"):
        with pytest.raises(InputError, match=f"backend='{name}' has no dense assignments"):
            choose_backend(name, CPU, None)


def test_a_gpu_without_triton_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(UserWarning, match="computed in torch, slower: .*pip install triton"):
        assert choose_backend("auto", GPU, SPARSE) == "torch"
    with pytest.raises(InputError, match="backend='triton': .*pip install triton"):
        choose_backend("triton", GPU, SPARSE)


def test_a_cpu_takes_triton_in_the_interpreter_only(monkeypatch):
    with pytest.raises(InputError, match="backend='triton' runs on a GPU, not on cpu"):
        choose_backend("triton", CPU, SPARSE)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    assert choose_backend("triton", CPU, SPARSE) == "triton"
    assert choose_backend("auto", CPU, SPARSE) == "numba"


def test_float16_is_for_triton(problem):
    with pytest.raises(InputError, match="precision='float16' is for backend='triton', here numba"):
        TransCLIP(device="cpu", precision="float16").fit(*problem()[:2])


@pytest.mark.parametrize("values", [{"backend": "triton"}, {"precision": "float16"}])
def test_what_needs_triton_makes_assignments_sparse(values):
    assert TransCLIP(**values).form == "sparse"
