"""The parts of the GPU suite that need no GPU: its problems, formulas and table."""

import json
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from bench.gpu import check as gpu_check
from bench.gpu import lines as gpu_lines
from bench.gpu import parts
from bench.gpu import suite as gpu_suite
from bench.gpu.eva import EvaTower
from bench.gpu.lines import Ceilings, Line, Suite
from bench.gpu.problems import (
    bound_error,
    energies_error,
    lists,
    made_graph,
    made_problem,
    messages_to,
    score_error,
    score_operands,
    start_errors,
    sweep_bytes,
    sweep_error,
)
from bench.gpu.timing import Gpu, bits_differ, setting
from tests.bench.gpu import fake_parts
from transclip_fast.graph.affinity import affinity
from transclip_fast.ops.torch_backend import TorchOps
from transclip_fast.types import Assignments, LinearScore, Messages, Truncation


def test_the_graph_is_one():
    graph = made_graph(600, 20)
    graph.check(600, 3)
    labels = np.arange(600) // 30
    same = (labels[graph.neighbors] == labels[:, None]).mean()
    assert 0.55 < same < 0.8


def test_problems_can_be_solved():
    features, prototypes = made_problem(500, 10, 64, "cpu")
    np.testing.assert_allclose(features.norm(dim=1), 1, atol=1e-6)
    labels = torch.arange(500) * 10 // 500
    assert ((features @ prototypes.T).argmax(1) == labels).float().mean() > 0.5
    operands = score_operands(10, 40, 64, "cpu", 0)
    assert operands[0].dtype == operands[1].dtype == torch.float16


@pytest.mark.parametrize("candidates", [4, 16])
def test_sweeps_are_counted_and_checked(candidates):
    base, z = lists(200, 30, candidates, "cpu", 0)
    assert all(len(set(row)) == candidates for row in base.classes.tolist())
    np.testing.assert_allclose(base.values.exp().sum(1) + base.tail, 1, atol=1e-5)
    graph = affinity(made_graph(200, 30))
    out = TorchOps(graph).sweep(base, z, out=z.empty_like())
    messages = messages_to(graph, z, 150)
    assert sweep_error(base, messages, out) < 1e-6
    assert bound_error(base, messages, out, listed=30) < 1e-6
    out.values[7, 0] += 0.1
    out.bound[7] += 0.1
    assert sweep_error(base, messages, out) > 0.09
    assert bound_error(base, messages, out, listed=30) > 0.09
    assert bound_error(base, messages, out, listed=-1) < 1e-6  # is a bound
    energies = TorchOps(graph).row_energies(z)
    assert energies_error(messages, z, energies) < 1e-6
    energies[7, 1] += 0.1
    assert energies_error(messages, z, energies) > 0.09
    lists_and_edges = 200 * (16 * candidates + 16) + 12 * len(graph.columns)
    assert sweep_bytes(graph, z) >= lists_and_edges + 8 * len(graph.columns)
    assert sweep_bytes(graph, z) <= lists_and_edges + 8 * candidates * len(graph.columns)


def test_scores_are_checked():
    features, weights, offset, out = score_operands(300, 40, 64, "cpu", 0, width=8)
    ops = TorchOps(affinity(made_graph(300, 40)))
    score = LinearScore(weights.float(), offset)
    ops.score(features.float(), score, out=out)
    assert score_error(features, score, out, rows=100) < 1e-5
    kept = out.values.clone()
    out.values[9, 0] += 0.1
    assert score_error(features, score, out, rows=100) > 1e-3
    out.values.copy_(kept)[9, 0] = -torch.inf  # a candidate that is missing
    assert score_error(features, score, out, rows=100) > 1e-3


def test_few_shot_scores_are_checked():
    features, weights, offset, out = score_operands(60, 40, 64, "cpu", 0, width=8)
    rows = torch.arange(60)
    messages = Messages.of(rows, rows % 40, torch.ones(60), 60)
    score = LinearScore(weights.float(), offset, torch.randn(60, 40), 0.5, messages)
    TorchOps(affinity(made_graph(60, 40))).score(features.float(), score, out=out)
    assert score_error(features, score, out) < 1e-5
    for left_out in ({"log_prior": None}, {"messages": None}):
        assert score_error(features, replace(score, **left_out), out) > 1e-3


def test_starts_are_checked():
    features, prototypes = made_problem(60, 20, 33, "cpu")
    z = Assignments.empty(60, 20, Truncation(8, 8), features.device)
    _, *top = TorchOps.start(features, 100 * prototypes, None, out=z)
    assert max(start_errors(features, 100 * prototypes, z, top)) < 1e-4
    z.values[7, 0] -= 0.01
    top[1][0, 3] = top[1][5, 3]
    assert min(start_errors(features, 100 * prototypes, z, top)) > 1e-3


def test_rates_and_shares():
    ceilings = Ceilings(bandwidth=4000.0, gemm=800.0)
    assert ceilings.rate(4e9, "GB/s", 2.0) == (2000.0, 0.5)
    assert ceilings.rate(4e12, "TFLOP/s", 10.0) == (400.0, 0.5)


@pytest.mark.parametrize(
    ("error", "wrong"), [(None, False), (0.1, False), (0.3, True), (float("nan"), True)]
)
def test_what_is_wrong(error, wrong):
    assert Line("score", "kernel", 1.0, error=error, allowed=0.2).wrong == wrong


def test_settings_are_taken_back():
    before, during = gpu_lines.LINES, []

    def broken():
        with setting(gpu_lines, "LINES", "other"):
            during.append(gpu_lines.LINES)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert (during, gpu_lines.LINES) == (["other"], before)


def test_bits_that_differ():
    x = torch.arange(6.0)
    assert bits_differ([x, x], [x, x.clone()]) == 0
    assert bits_differ([x, x], [x, x + (x > 3)]) == 2


class Instant(Gpu):
    """Takes as many milliseconds as a run returns."""

    def milliseconds(self, run, repeats=12):
        return float(run(0))


def test_lines_and_table(tmp_path, capsys):
    suite = Suite(tmp_path, Instant(), Ceilings(4000.0, 800.0))
    arms = {"kernel": lambda i: 1.0, "rival": lambda i: 2.0}
    suite.arms("sweep", arms, 2e9, "GB/s", {"kernel": 1e-7}, 1e-6, n=5)
    rows = [json.loads(line) for line in (tmp_path / "gpu_suite.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["kernel", "rival"]
    assert rows[0]["share"] == 0.5
    assert rows[0]["error"] == 1e-7
    assert rows[1]["error"] is None
    assert {"commit", "gpu", "torch", "triton"} <= set(rows[0]["machine"])
    assert gpu_lines.recorded(tmp_path) == suite.lines
    gpu_lines.print_lines(suite.lines)
    assert "2000 GB/s" in capsys.readouterr().out
    assert suite.code == 0

    def full():
        raise torch.OutOfMemoryError("no room\nat all")

    def broken():
        raise RuntimeError("a bug")

    assert suite.attempt("a large one", full) is None
    assert suite.code == 0
    assert suite.attempt("a broken one", broken) is None
    assert suite.code == 1
    said = capsys.readouterr()
    assert "SKIPPED a large one: no room\n" in said.out
    assert "FAILED a broken one" in said.out
    assert "a bug" in said.err
    suite.failed = False
    suite.check("bits", 3.0, 0.0)
    assert suite.code == 1
    assert "WRONG bits" in capsys.readouterr().out
    gpu_lines.print_lines(suite.lines)
    assert capsys.readouterr().out.endswith("WRONG\n")


def test_shares_are_of_the_ceilings_measured_last(tmp_path):
    assert np.isnan(gpu_lines.ceilings_of(gpu_lines.recorded(tmp_path)).gemm)
    for bandwidth in (100.0, 4000.0):
        suite = Suite(tmp_path, Instant(), Ceilings(0.0, 0.0))
        suite.add(Line("copy", "torch", 0.0, bandwidth, "GB/s", 1.0))
    start = (tmp_path / "gpu_suite.jsonl").stat().st_size
    suite.add(Line("16-bit GEMM", "cuBLAS", 0.0, 800.0, "TFLOP/s", 1.0))
    lines = gpu_lines.recorded(tmp_path)
    assert gpu_lines.ceilings_of(lines) == Ceilings(4000.0, 800.0)
    assert gpu_lines.recorded(tmp_path, start) == lines[-1:]


def test_a_part_that_fails_takes_no_other_with_it(tmp_path, monkeypatch, capfd):
    pytest.importorskip("triton")
    monkeypatch.setattr(parts, "START_SECONDS", 15)
    (tmp_path / "labels_1_2_3.npy").write_bytes(b"of an earlier run")
    arguments = ["--cpu", "--out", str(tmp_path)]
    spec = find_spec("tests.bench.gpu.fake_parts")
    assert parts.main(spec, "", fake_parts.PARTS, arguments, minutes=10) == 1
    said = capfd.readouterr().out
    assert "STOPPED hanging" in said
    assert "FAILED part" in said
    assert "WRONG labels" in said
    found = [line.operation for line in gpu_lines.recorded(tmp_path)]
    assert found == ["bits", "before the error", "labels"]
    assert not list(tmp_path.glob("*.npy"))
    good = {"good": fake_parts.PARTS["good"]}
    assert parts.main(spec, "", good, arguments, minutes=10) == 0
    assert parts.main(spec, "", good, [*arguments, "--minutes", "0.1"], minutes=10) == 0
    assert "SKIPPED good: 0.1 minutes are over" in capfd.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("module", [gpu_suite, gpu_check])
def test_without_a_gpu_it_says_so(tmp_path, capsys, module):
    out = ["--out", str(tmp_path)]
    assert parts.main(module.__spec__, module.__doc__, module.PARTS, out, minutes=1) == 2
    assert "needs a GPU" in capsys.readouterr().out


def test_the_eva_tower_is_timms():
    from timm.models.eva import Eva

    theirs = Eva(
        img_size=28, patch_size=14, embed_dim=24, depth=2, num_heads=3, mlp_ratio=5,
        qkv_bias=False, global_pool="token", num_classes=0,
        norm_layer=lambda width, **kinds: torch.nn.RMSNorm(width, eps=1e-6, **kinds),
    ).eval()  # fmt: skip
    ours = EvaTower(24, 2, 3, 28).draw(0)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)


def test_the_operations_of_eva_8b():
    tower = EvaTower(device="meta")
    assert sum(p.numel() for p in tower.parameters()) == 7_520_845_824
    assert 3.85e12 < tower.operations() < 3.95e12
