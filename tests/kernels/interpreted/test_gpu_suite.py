"""Every arm of the GPU suite and check at a very small size, with the CPU as its GPU."""

import pytest

from bench.gpu import arms, check, solves
from bench.gpu.lines import Ceilings, Suite, ceilings
from bench.gpu.parts import small_steps
from bench.gpu.timing import Cpu
from transclip_fast.data.feature_rows import Rows


@pytest.fixture(autouse=True)
def as_in_the_interpreter():
    with small_steps():
        yield


@pytest.fixture
def suite(tmp_path):
    return Suite(tmp_path, Cpu(), Ceilings(4000.0, 800.0))


def arms_of(suite):
    """What was added; nothing of it was wrong."""
    assert suite.code == 0
    return [line.arm for line in suite.lines]


def test_ceilings(suite):
    ceilings(suite, 1000, 16)
    assert [line.unit for line in suite.lines] == ["GB/s", "TFLOP/s"]
    assert all(line.rate > 0 for line in suite.lines)


def test_sweeps(suite):
    arms.sweeps(suite, 60, 50)
    assert arms_of(suite) == 2 * ["kernel", "kernel, with its bound", "torch eager"]


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
        "float16", "float32", "float16, streamed", "baseline", "baseline, torch.compile",
    ]  # fmt: skip
    assert all(line.error == 0 for line in suite.lines)
    assert {"start", "score", "sweep", "class_sums", "energies"} <= set(
        suite.lines[0].detail["stages"]
    )


def test_a_tower(suite):
    arms.eva(suite, 2, width=24, layers=2, heads=3, side=28)
    assert arms_of(suite) == ["torch", "torch.compile"]


def test_other_labels_are_wrong(suite, monkeypatch):
    rival = solves.GpuProblem.rival
    monkeypatch.setattr(solves.GpuProblem, "rival", lambda *args: (rival(*args) + 1) % 5)
    solves.solve(suite, 12, 5, 16, ["float16", "baseline", "baseline, torch.compile"])
    assert [line.arm for line in suite.lines if line.wrong] == [
        "baseline",
        "baseline, torch.compile",
    ]
    assert suite.code == 1


@pytest.mark.parametrize("name", ["sweeps", "scores", "starts", "sums", "graphs"])
def test_checks(suite, name):
    check.PARTS[name].run(suite)
    assert set(arms_of(suite)) == {"check"}
