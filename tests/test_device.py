"""True float32 whatever the user has set, and the GPU that a fit computes on."""

from __future__ import annotations

from contextlib import contextmanager
from threading import Thread

import pytest
import torch

from transclip_fast import TransCLIP
from transclip_fast.device import exact_float32
from transclip_fast.solver.problem import Problem

SETTINGS = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def _settings_of_the_user():
    """Every test may set them as it likes."""
    yield
    for setting in SETTINGS:
        setting.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def legacy():
    torch.set_float32_matmul_precision("medium")


def newer():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def of_one_operation():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


@pytest.mark.parametrize("user", [legacy, newer, of_one_operation])
def test_products_are_float32(user):
    user()
    before = [setting.fp32_precision for setting in SETTINGS]
    assert before != ["ieee", "ieee"]
    with exact_float32():
        assert [setting.fp32_precision for setting in SETTINGS] == ["ieee", "ieee"]
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32  # raises where the two disagree
    assert [setting.fp32_precision for setting in SETTINGS] == before


def test_settings_come_back_after_an_error():
    newer()
    with pytest.raises(ZeroDivisionError), exact_float32():
        raise ZeroDivisionError
    assert [setting.fp32_precision for setting in SETTINGS] == ["tf32", "bf16"]


def test_threads_that_overlap():
    """Products stay float32 until the last thread has left, and then are the user's again."""
    newer()
    first, second = exact_float32(), exact_float32()
    seen = []

    def in_another_thread(step):
        worker = Thread(target=step)
        worker.start()
        worker.join()
        seen.append([setting.fp32_precision for setting in SETTINGS])

    for step in (first.__enter__, second.__enter__):
        in_another_thread(step)
    for step in (first, second):
        in_another_thread(lambda step=step: step.__exit__(None, None, None))
    assert seen == [["ieee", "ieee"]] * 3 + [["tf32", "bf16"]]


def test_a_fit_under_autocast(problem):
    features, prototypes, _ = problem()
    plain = TransCLIP(device="cpu").fit(features, prototypes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = TransCLIP(device="cpu").fit(features, prototypes)
        assert torch.is_autocast_enabled("cpu")
    assert (plain.label_distributions_ == cast.label_distributions_).all()
    assert (plain.objective_ == cast.objective_).all()


@pytest.mark.parametrize(("name", "expected"), [("cuda:1", [1]), ("cpu", [])])
def test_a_fit_makes_its_gpu_the_current_one(problem, monkeypatch, name, expected):
    """Kernels are launched on the current GPU, wherever their operands are."""
    current, seen = [], []

    @contextmanager
    def entered(device):
        current.append(device.index)
        try:
            yield
        finally:
            current.pop()

    def load(problem, settings):
        seen.extend(current)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(Problem, "load", load)
    monkeypatch.setattr("transclip_fast.solver.problem.resolve_device", torch.device)
    features, prototypes, _ = problem()
    model = TransCLIP(device=name, assignments="dense", backend="torch", memory="9GiB")
    with pytest.raises(KeyboardInterrupt):
        model.fit(features, prototypes)
    assert (seen, current) == (expected, [])
