"""Who answers: which backend is taken where, and what is said where one is missing."""

import sys

import pytest
import torch

from transclip_fast import InputError, TransCLIP
from transclip_fast.ops import choose_backend
from transclip_fast.types import Truncation

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("truncation", [None, Truncation(16, 16)])
def test_a_gpu_takes_triton(truncation):
    pytest.importorskip("triton")
    assert choose_backend("auto", GPU, truncation) == "triton"
    assert choose_backend("triton", GPU, truncation) == "triton"
    assert choose_backend("torch", GPU, truncation) == "torch"


def test_a_gpu_without_triton_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(UserWarning, match="computed in torch, slower: .*pip install triton"):
        assert choose_backend("auto", GPU, None) == "torch"
    with pytest.raises(InputError, match="backend='triton': .*pip install triton"):
        choose_backend("triton", GPU, None)


def test_a_cpu_takes_triton_in_the_interpreter_only(monkeypatch):
    with pytest.raises(InputError, match="backend='triton' runs on a GPU, not on cpu"):
        choose_backend("triton", CPU, None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    assert choose_backend("triton", CPU, None) == "triton"
    assert choose_backend("auto", CPU, None) == "torch"


def test_float16_is_for_triton(problem):
    with pytest.raises(InputError, match="precision='float16' is for backend='triton', here torch"):
        TransCLIP(device="cpu", precision="float16").fit(*problem()[:2])
