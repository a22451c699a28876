"""Time of each operation on all rows, by backend: `pytest bench`.

Each result is checked against float64 before it is timed. `--benchmark-json FILE` writes the times,
with FLOPs, bytes and the machine in `extra_info`. Needs `pip install ".[bench,test]"`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bench.common import LOGIT_SCALE, machine_facts, make_problem
from bench.gpu.problems import sweep_bytes
from transclip_fast.device import exact_float32
from transclip_fast.graph import exact
from transclip_fast.graph.affinity import affinity
from transclip_fast.graph.build import build_graph
from transclip_fast.ops import backend_class
from transclip_fast.ops.int8_scores import int8_scores
from transclip_fast.ops.torch_backend import TorchOps
from transclip_fast.parallel import single_threaded_torch
from transclip_fast.types import FLOOR, Affinity, Assignments, LinearScore, Scores, Truncation

pytest.importorskip("pytest_benchmark", reason='pip install ".[bench]"')
N, K, D = 4000, 500, 256
N_NEIGHBORS = 3
CANDIDATES = 32
FORMS = {"torch, dense": "cpu", "torch, sparse": "cpu", "numba, sparse": "cpu"}
FORMS |= {"triton, sparse": "cuda"} if torch.cuda.is_available() else {}


@dataclass
class Setting:
    """A made problem on one backend, dense or sparse, with the scores and z of its prior."""

    ops: TorchOps
    features: torch.Tensor  # (N, d)
    linear: LinearScore
    affinity: Affinity
    base: Scores
    z: Assignments
    log_prior: torch.Tensor  # (N, K) float64, the truth
    int8_errors: torch.Tensor  # (N,) float64, four standard errors of int8 scores, or 0

    def from_int8(self, max_message: torch.Tensor | float = 0.0) -> torch.Tensor:
        """
        Return the errors (N, K) of scores that may come from int8 products, 0 of all others.

        Such are the classes whose z an error moves by less than the floor, even if the messages
        lift them by `max_message`, and if int8 underrates them by as much as it may.
        """
        errors = self.int8_errors[:, None]
        lift = torch.as_tensor(max_message, device=errors.device).reshape(-1, 1) - errors
        return torch.where((self.log_prior + lift).exp() * errors < FLOOR, errors, 0.0)

    def messages(self) -> torch.Tensor:
        """Return A z (N, K) float64."""
        rows = torch.repeat_interleave(self.affinity.offsets.diff())
        entries = (
            self.affinity.weights.double()[:, None] * self.z.dense().double()[self.affinity.columns]
        )
        return torch.zeros_like(self.log_prior).index_add_(0, rows, entries)

    def used(self) -> int:
        """Count the entries of z that are not zero."""
        return int((self.z.values > 0).sum())


@pytest.fixture(scope="module", params=FORMS)
def setting(request: pytest.FixtureRequest) -> Iterator[Setting]:
    backend, form = request.param.split(", ")
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    device = FORMS[request.param]
    problem = make_problem(N, K, D)
    truncation = Truncation(CANDIDATES, CANDIDATES) if form == "sparse" else None
    graph = build_graph(problem.features, N_NEIGHBORS, search="exact")
    near = affinity(graph, device=device)
    ops = backend_class(backend)(near)
    features, prototypes = (
        torch.from_numpy(x).to(device) for x in (problem.features, problem.prototypes)
    )
    weights = LOGIT_SCALE * (prototypes - prototypes.mean(0))  # as the solver has them
    z = Assignments.empty(N, K, truncation, torch.device(device))
    base = Scores.empty(near.max_message(), K, truncation)
    linear = LinearScore(weights, torch.zeros(K, device=device))
    truth = torch.log_softmax(features.double() @ weights.double().T, 1)
    with exact_float32(), single_threaded_torch():
        ops.start(features, weights, None, out=z)
        ops.score(features, linear, out=base)
        errors = torch.zeros(N, dtype=torch.float64, device=device)
        int8 = int8_scores(weights, linear.offset) if backend == "numba" else None
        if int8 is not None and int8.is_faster(features, base.log_threshold.numpy()):
            errors += torch.from_numpy(int8.errors(features))
        yield Setting(ops, features, linear, near, base, z, truth, errors)


def timed(benchmark: Any, run: Callable[[], Any], flops: float, n_bytes: float) -> None:
    """Time a call, on a GPU until it has done the work."""

    def whole() -> None:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark.group = benchmark.name.partition("[")[0].removeprefix("test_")
    benchmark(whole)
    if benchmark.disabled:
        return
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        sizes={"queries": N, "classes": K, "dim": D, "candidates": CANDIDATES},
        flops=flops,
        bytes=n_bytes,
        gflops_per_second=flops / seconds / 1e9,
        gbytes_per_second=n_bytes / seconds / 1e9,
        machine=machine_facts(),
    )


def close(found: Assignments, truth: torch.Tensor, allowed: torch.Tensor) -> None:
    """Assert that the entries in use equal those of the truth (N, K)."""
    whole = found.dense().double()
    off = torch.where(whole > 0, (whole - truth).abs(), 0).amax(1)
    assert (off <= allowed + 1e-4).all(), float(off.max())
    assert (found.best()[0] == truth.argmax(1)).float().mean() > 0.999


def normaliser_errors(z: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    """Return the errors (N,) of log-sum-exps of scores with independent errors (N, K)."""
    return (z * errors).square().sum(1).sqrt()


def product_bytes(z: Assignments) -> float:
    """Return the bytes of features and weights, read once, and of the result."""
    return 4.0 * (N * D + K * D) + 8.0 * z.values.numel()


def test_start(setting: Setting, benchmark: Any) -> None:
    out = setting.z.empty_like()

    def run() -> Any:
        return setting.ops.start(setting.features, setting.linear.weights, None, out=out)

    _, values, rows = run()
    truth = setting.log_prior.exp()
    close(out, truth, normaliser_errors(truth, setting.from_int8()))
    best = setting.log_prior.topk(8, dim=0)
    assert (values.double() - best.values).abs().max() < 1e-3
    assert (rows == best.indices).float().mean() > 0.999
    timed(benchmark, run, 2.0 * N * K * D, product_bytes(out))


def test_score(setting: Setting, benchmark: Any) -> None:
    out = setting.base

    def run() -> Any:
        return setting.ops.score(setting.features, setting.linear, out=out)

    run()
    errors = setting.from_int8(setting.affinity.max_message())
    allowed = 1e-3 + normaliser_errors(setting.log_prior.exp(), errors)[:, None]
    if out.classes is None:
        found, truth = torch.log_softmax(out.values.double(), 1), setting.log_prior
    else:
        allowed = allowed + errors.gather(1, out.classes.long())
        kept = out.values > -torch.inf
        truth = setting.log_prior.gather(1, out.classes.long()).where(kept, 0)
        found = out.values.double().where(kept, 0)
        assert kept.any(1).all()
    assert ((found - truth).abs() < allowed).all()
    timed(benchmark, run, 2.0 * N * K * D, product_bytes(setting.z))


def test_sweep(setting: Setting, benchmark: Any) -> None:
    out = setting.z.empty_like()

    def run() -> Any:
        return setting.ops.sweep(setting.base, setting.z, out=out)

    run()
    truth = torch.softmax(setting.log_prior + setting.messages(), 1)
    errors = setting.from_int8(setting.affinity.max_message())
    close(out, truth, out.bound.double() + normaliser_errors(truth, errors))
    gathered = float((setting.z.values > 0).sum(1)[setting.affinity.columns].sum())
    moved = sweep_bytes(setting.affinity, setting.z)
    if out.classes is None:
        edges = len(setting.affinity.columns)
        gathered, moved = float(edges * K), 4.0 * K * (2 * N + edges) + 12.0 * edges
    timed(benchmark, run, 2 * gathered + 4.0 * out.values.numel(), moved)


def test_class_sums(setting: Setting, benchmark: Any) -> None:
    def run() -> Any:
        return setting.ops.class_sums(setting.z, setting.features)

    sums, counts = run()
    z, features = setting.z.dense().double(), setting.features.double()
    dropped = 1 - z.sum(1) if setting.z.classes is not None else torch.zeros_like(z[:, 0])
    share = z.sum(0) / z.sum()
    assert (counts - z.sum(0) - share * dropped.sum()).abs().max() < 1e-3
    assert (sums - z.T @ features - torch.outer(share, dropped @ features)).abs().max() < 1e-3
    timed(benchmark, run, 2.0 * setting.used() * D, 4.0 * N * D + 8.0 * setting.used())


def test_energies(setting: Setting, benchmark: Any) -> None:
    def run() -> Any:
        return setting.ops.energies(setting.z)

    pairwise, entropy = run()
    z = setting.z.dense().double()
    assert float(pairwise) == pytest.approx(float((z * setting.messages()).sum()), rel=1e-4)
    assert float(entropy) == pytest.approx(float(torch.xlogy(z, z).sum()), rel=1e-4)
    used = (setting.z.values > 0).sum(1)
    gathered = float(used[setting.affinity.columns].sum())
    timed(benchmark, run, 2 * gathered, 8.0 * (gathered + setting.used()))


@pytest.mark.parametrize("backend", ["torch", *(["triton"] if torch.cuda.is_available() else [])])
def test_neighbours(backend: str, benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = torch.from_numpy(make_problem(N, K, D).features).to(device)

    if backend == "torch":
        monkeypatch.setattr(exact, "certifiable", lambda *_: False)

    def run() -> Any:
        return build_graph(rows, N_NEIGHBORS, search="exact", device=device).neighbors

    cosine = rows.double() @ rows.double().T
    cosine.fill_diagonal_(-torch.inf)
    ids = torch.as_tensor(run(), device=device)
    assert (ids == cosine.topk(N_NEIGHBORS, dim=1).indices).float().mean() > 0.999
    timed(benchmark, run, 2.0 * N * N * D, 4.0 * N * D)
