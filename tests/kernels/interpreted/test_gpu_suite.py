"""Every arm of `bench.gpu.suite` at a very small size, with the CPU as its GPU."""

import pytest
import torch

from bench.gpu import arms, solves
from bench.gpu.lines import Ceilings, Suite, measure_ceilings
from bench.gpu.timing import Gpu
from transclip_fast.data.feature_rows import Rows
from transclip_fast.graph import exact
from transclip_fast.kernels import messages
from transclip_fast.solver.parameters import Parameters


class Event:
    def record(self):
        pass

    synchronize = record

    def elapsed_time(self, stop):
        return 1.0


class Cpu(Gpu):
    """Runs each arm once, in no time."""

    device = "cpu"

    def event(self):
        return Event()

    def synchronize(self):
        pass

    def peak(self):
        return 0

    def milliseconds(self, run, repeats=12):
        run(0)
        run(2)
        return 1.0

    def seconds(self, run, *, warm=True):
        return run(), 1.0, 0


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(messages, "LAUNCHES", {16: (64, 1), 32: (64, 1)})
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    monkeypatch.setattr(exact, "certifiable", lambda rows, size: True)
    monkeypatch.setattr(solves, "STEPS", Parameters(max_iter=2, inner_iter=1))


@pytest.fixture
def suite(tmp_path):
    return Suite(tmp_path, Cpu(), Ceilings(4000.0, 800.0))


def arms_of(suite):
    """What was added beside the ceilings; nothing of it was wrong."""
    assert suite.code == 0
    return [line.arm for line in suite.lines[2:]]


def test_ceilings():
    found = measure_ceilings(Cpu(), 1000, 16)
    assert found.bandwidth == pytest.approx(8000 / 1e6)
    assert found.gemm == pytest.approx(2 * 16**3 / 1e9)


def test_sweeps(suite):
    arms.sweeps(suite, 60, 50)
    assert arms_of(suite) == 2 * ["kernel", "torch eager"]


def test_scores(suite):
    arms.scores(suite, ((24, 40, 64, 16), (5, 300, 32, 20)))
    once = ["fused", "cuBLAS in chunks", "torch eager", "torch.compile", "cuBLAS, no selection"]
    assert arms_of(suite) == 2 * once


def test_class_sums(suite):
    arms.sums(suite, 60, 30, 16)
    assert arms_of(suite) == ["kernel", "cuBLAS on dense chunks"]


def test_neighbours(suite, monkeypatch):
    monkeypatch.setattr(arms, "Rows", lambda rows, *, device: Rows(rows, device=device))
    arms.neighbours(suite, (50, 60, 150), 32)
    assert arms_of(suite) == ["check", "check", "kernel", "torch eager", "kernel"]


def test_two_solves_have_the_same_bits(suite):
    solves.repeated(suite, 12, 5, 16)
    assert arms_of(suite) == ["check"]


def test_solves(suite, monkeypatch):
    solves.solve(suite, 12, 5, 16)
    assert arms_of(suite) == [
        "float16", "float32", "baseline", "baseline, torch.compile", "float16, streamed",
    ]  # fmt: skip
    assert all(line.error == 0 for line in suite.lines[2:])
    assert {"start", "score", "sweep", "class_sums", "energies"} <= set(
        suite.lines[2].detail["stages"]
    )


def test_a_tower(suite):
    arms.eva(suite, 2, width=24, layers=2, heads=3, side=28)
    assert arms_of(suite) == ["torch", "torch.compile"]


def test_other_labels_are_wrong(suite, monkeypatch):
    rival = solves.GpuProblem.rival
    monkeypatch.setattr(solves.GpuProblem, "rival", lambda *args: (rival(*args) + 1) % 5)
    solves.solve(suite, 12, 5, 16)
    assert [line.arm for line in suite.lines if line.wrong] == [
        "baseline",
        "baseline, torch.compile",
    ]
    assert suite.code == 1
