"""The kernels on one GPU: correct at real sizes, how fast, and beside what.

Measures the card first (copy bandwidth, 16-bit GEMM rate), then each operation against float64, its
time and its share of those ceilings beside torch eager, torch.compile and the vendor's library,
then whole solves beside the strong baseline. Every line goes to DIR/gpu_suite.jsonl with the card,
driver, versions and commit; a table comes last. Needs numpy, torch and triton only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import baseline
from bench.common import record
from bench.gpu_eva import EvaTower, eva_error
from bench.gpu_problems import (
    lists,
    made_graph,
    made_problem,
    score_operands,
    sweep_bytes,
    sweep_error,
)
from bench.gpu_timing import SETS, Arm, milliseconds, stopwatch
from transclip_fast import solver
from transclip_fast.assignments import Assignments, Scores
from transclip_fast.graph import affinity
from transclip_fast.ops import operations
from transclip_fast.parameters import Parameters
from transclip_fast.prior import LinearPrior
from transclip_fast.rows import Rows
from transclip_fast.truncation import Truncation

LIMIT = 7 * 60  # seconds after which nothing new is begun
SOLVES = ((50_000, 1000, 512), (1_280_000, 1000, 1280), (10_000_000, 21_000, 1024))
STREAMED = 2_000_000_000  # entries of features, at most, that are also read from host memory


@dataclass
class Line:
    """What one arm did: its time, its rate and that rate's share of the ceiling."""

    operation: str
    arm: str
    milliseconds: float
    rate: float = 0.0
    unit: str = ""
    share: float = 0.0
    error: float | None = None  # against float64
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass
class Ceilings:
    """Of this card, as measured."""

    bandwidth: float  # GB/s of a copy, read and written
    gemm: float  # TFLOP/s in 16 bits

    def rate(self, work: float, unit: str, milliseconds: float) -> tuple[float, float]:
        """GB/s or TFLOP/s of so many bytes or operations, and the share of the ceiling."""
        rate = work / milliseconds / (1e6 if unit == "GB/s" else 1e9)
        return rate, rate / (self.bandwidth if unit == "GB/s" else self.gemm)


def measure_ceilings() -> Ceilings:
    """Copy bandwidth on 4 GB and the rate of an 8192^3 product of random float16."""
    source = [torch.randn(1 << 29, device="cuda") for _ in range(2)]
    copy = milliseconds(lambda i: source[0].copy_(source[1]))
    matrices = [torch.randn(8192, 8192, device="cuda").half() for _ in range(SETS)]
    product = milliseconds(lambda i: matrices[i] @ matrices[(i + 1) % SETS])
    return Ceilings(2 * 4 * len(source[0]) / copy / 1e6, 2 * 8192**3 / product / 1e9)


class Suite:
    """The lines so far, and where they go."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines, self.begun = folder, list[Line](), time.monotonic()
        self.ceilings = measure_ceilings()
        self.add(Line("copy", "torch", 0.0, self.ceilings.bandwidth, "GB/s", 1.0))
        self.add(Line("16-bit GEMM", "cuBLAS", 0.0, self.ceilings.gemm, "TFLOP/s", 1.0))

    def add(self, line: Line) -> None:
        self.lines.append(line)
        record("gpu_suite", asdict(line), folder=self.folder)

    def arms(
        self,
        operation: str,
        arms: dict[str, Arm],
        work: float,
        unit: str,
        error: float,
        **detail: Any,
    ) -> None:
        """Time the arms of an operation; `error` is that of the first one, ours."""
        for place, (name, run) in enumerate(arms.items()):
            taken = self.attempt(f"{operation}, {name}", partial(milliseconds, run))
            if taken is not None:
                rate, share = self.ceilings.rate(work, unit, taken)
                own = error if place == 0 else None
                self.add(Line(operation, name, taken, rate, unit, share, own, detail))

    def attempt(self, what: str, run: Callable[[], Any]) -> Any:
        """Run it, or say loudly why not: no time is left, or the card has no room."""
        if time.monotonic() - self.begun > LIMIT:
            print(f"SKIPPED {what}: {LIMIT} s are over", flush=True)
            return None
        try:
            return run()
        except torch.OutOfMemoryError as error:
            print(f"SKIPPED {what}: {str(error).splitlines()[0]}", flush=True)
            return None
        finally:
            torch.cuda.empty_cache()


def sweeps(suite: Suite, n: int = 1_280_000, k: int = 1000) -> None:
    """One sweep of the short form at 16 and 32 candidates."""
    ours, eager = operations("triton"), operations("torch")
    graph = affinity(made_graph(n, k), device="cuda")
    for candidates in (16, 32):
        made = [lists(n, k, candidates, "cuda", seed) for seed in range(SETS)]
        out = made[0][1].empty_like()
        ours.sweep(made[0][0], graph, made[0][1], out=out)
        error = sweep_error(made[0][0], graph, made[0][1], out, rows=2000)

        def run(ops: Any, i: int, made: Any = made, out: Any = out) -> None:
            ops.sweep(made[i][0], graph, made[i][1], out=out)

        suite.arms(
            f"sweep, {candidates} candidates",
            {"kernel": partial(run, ours), "torch eager": partial(run, eager)},
            sweep_bytes(graph, made[0][1]), "GB/s", error, rows=n, classes=k,
        )  # fmt: skip


def dense_sweeps(suite: Suite, n: int = 50_000, k: int = 1000) -> None:
    """One sweep of the full form, beside cuSPARSE."""
    ours = operations("triton")
    graph = affinity(made_graph(n, k), device="cuda")
    zero = torch.zeros(n, device="cuda")
    z = [torch.softmax(torch.randn(n, k, device="cuda"), 1) for _ in range(SETS)]
    base, out = torch.randn(n, k, device="cuda"), torch.empty_like(z[0])
    matrix = torch.sparse_csr_tensor(graph.offsets, graph.columns, graph.weights, (n, n))

    def kernel(i: int) -> None:
        scores = Scores(base, None, k, zero, zero)
        ours.sweep(
            scores, graph, Assignments(z[i], None, k, zero), out=Assignments(out, None, k, zero)
        )

    def vendor(i: int) -> torch.Tensor:
        return torch.softmax(base + matrix @ z[i], 1)

    kernel(0)
    exact = torch.softmax(base.double() + matrix.double() @ z[0].double(), 1)
    error = float((out - exact).abs().max())
    del exact
    work = 4.0 * k * (2 * n + len(graph.columns)) + 12.0 * len(graph.columns)
    arms: dict[str, Arm] = {"kernel": kernel, "cuSPARSE": vendor}
    arms["torch.compile"] = torch.compile(vendor, dynamic=False)
    suite.arms("sweep, all classes", arms, work, "GB/s", error, rows=n, classes=k)


def scores(suite: Suite, n: int = 1 << 20, k: int = 1024, d: int = 512, width: int = 16) -> None:
    """F P^T to 16 candidates, float16 operands."""
    ours = operations("triton")
    features = [score_operands(n, k, d, "cuda", seed)[0] for seed in range(SETS)]
    _, weights, offset, out = score_operands(n, k, d, "cuda", 0, width)

    def kernel(i: int) -> None:
        ours.score(features[i], weights, offset, out=out)

    def eager(i: int) -> None:
        for rows in torch.split(features[i], 8192):
            x = (rows @ weights.T).float() + offset
            (x - x.logsumexp(1, keepdim=True)).topk(width, dim=1)

    def vendor(i: int) -> None:
        for rows in torch.split(features[i], 8192):
            torch.mm(rows, weights.T)

    kernel(0)
    sample = torch.arange(0, n, n // 2000, device="cuda")
    x = features[0][sample].double() @ weights.double().T + offset.double()
    b = x - x.logsumexp(1, keepdim=True)
    found = out.values[sample]
    off = (found - b.gather(1, out.classes[sample].long())).abs()  # type: ignore[index]
    error = float(off[found > -torch.inf].max())
    suite.arms(
        "score, 16 candidates",
        {"kernel": kernel, "torch eager": eager,
         "torch.compile": torch.compile(eager, dynamic=False), "cuBLAS, no selection": vendor},
        2.0 * n * k * d, "TFLOP/s", error, rows=n, classes=k, dim=d,
    )  # fmt: skip


def sums(suite: Suite, n: int = 1_280_000, k: int = 1000, d: int = 1280) -> None:
    """Z^T F of the short form, beside the dense product of chunks."""
    ours = operations("triton")
    z = [lists(n, k, 16, "cuda", seed)[1] for seed in range(SETS)]
    features = torch.nn.functional.normalize(torch.randn(n, d, device="cuda"), dim=1).half()

    def kernel(i: int) -> Any:
        return ours.class_sums(z[i], features)

    def vendor(i: int) -> torch.Tensor:
        total = torch.zeros(k, d, device="cuda")
        for start in range(0, n, 1 << 16):
            part = z[i].take(slice(start, start + (1 << 16))).dense().half()
            total += part.T @ features[start : start + (1 << 16)]
        return total

    exact = torch.zeros(k, d, dtype=torch.float64, device="cuda")
    for start in range(0, n, 1 << 16):
        rows = slice(start, start + (1 << 16))
        exact += z[0].take(rows).dense().double().T @ features[rows].double()
    dropped = (1 - z[0].values.sum(1)).double()
    share = z[0].dense().sum(0, dtype=torch.float64)
    share /= share.sum()
    tail = torch.stack([dropped[i : i + 4096] @ features[i : i + 4096].double()
                        for i in range(0, n, 4096)]).sum(0)  # fmt: skip
    error = float((kernel(0)[0] - exact - torch.outer(share, tail)).abs().max())
    work = 2.0 * d * (float((z[0].values > 0).sum()) + n)
    arms: dict[str, Arm] = {"kernel": kernel, "cuBLAS on dense chunks": vendor}
    suite.arms("class sums", arms, work, "GB/s", error, rows=n, classes=k, dim=d)


def neighbours(suite: Suite, d: int = 1280) -> None:
    """Exact neighbours at 131072 rows, beside a chunked product; at 1.28M rows once."""
    from transclip_fast.kernels.neighbors import neighbors

    features = made_problem(1_280_000, 1000, d, "cuda")[0].half()
    small = features[:131_072].contiguous()
    ids, similarities, again = neighbors(small, 3)
    sample = torch.arange(0, len(small), 64, device="cuda")
    exact = small[sample].double() @ small.double().T
    exact[torch.arange(len(sample), device="cuda"), sample] = -torch.inf
    error = float((similarities[sample] - exact.topk(3, dim=1).values).abs().max())
    del exact, ids

    def eager(i: int) -> None:
        for rows in torch.split(small, 4096):
            (rows @ small.T).topk(9, dim=1)

    suite.arms(
        "neighbours", {"kernel": lambda i: neighbors(small, 3), "torch eager": eager},
        2.0 * len(small) ** 2 * d, "TFLOP/s", error, rows=len(small), dim=d, again=again,
    )  # fmt: skip

    def whole() -> None:
        start = time.perf_counter()
        redone = neighbors(features, 3)[2]
        torch.cuda.synchronize()
        taken = 1e3 * (time.perf_counter() - start)
        rate, share = suite.ceilings.rate(2.0 * len(features) ** 2 * d, "TFLOP/s", taken)
        detail = {"rows": len(features), "dim": d, "again": redone}
        suite.add(Line("neighbours, 1.28M", "kernel", taken, rate, "TFLOP/s", share, None, detail))

    suite.attempt("neighbours of 1.28M rows", whole)


def eva(suite: Suite, batch: int = 64) -> None:
    """The image tower of EVA-CLIP-8B, random weights, bfloat16: images a second."""
    tower = EvaTower(device="cuda", dtype=torch.bfloat16).draw(0)
    images = [
        torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16) for _ in range(SETS)
    ]
    arms: dict[str, Arm] = {"torch": lambda i: tower(images[i])}
    compiled = torch.compile(tower, dynamic=False)
    arms["torch.compile"] = lambda i: compiled(images[i])
    with torch.inference_mode():
        suite.arms(
            "EVA-CLIP-8B image tower", arms, batch * tower.operations(), "TFLOP/s",
            eva_error("cuda"), batch=batch, operations_per_image=tower.operations(),
        )  # fmt: skip
    for line in suite.lines[-2:]:
        if line.operation.startswith("EVA"):
            print(f"{line.operation}, {line.arm}: {1e3 * batch / line.milliseconds:.0f} images/s")


def solve(suite: Suite, n: int, k: int, d: int) -> None:
    """A whole solve, 10 x 5, graph given, beside the baseline and its compiled form."""
    name = f"solve {n} x {k} x {d}"
    features, prototypes = made_problem(n, k, d, "cuda")
    graph = made_graph(n, k)
    prior = LinearPrior.from_prototypes(prototypes, 100.0)
    parameters = Parameters()

    def once(features: torch.Tensor | Rows) -> torch.Tensor:
        solution = solver.solve(
            features, prior, graph, parameters, kl_weight=1.0,
            truncation=Truncation(min(16, k), min(16, k)), backend="triton",
        )  # fmt: skip
        return solution.assignments.best()[0]

    def rival(run: Callable[..., torch.Tensor]) -> torch.Tensor:
        pair = (
            torch.from_numpy(graph.neighbors).cuda(),
            torch.from_numpy(graph.similarities).cuda(),
        )
        return run(features, prototypes, pair).argmax(1)

    arms: dict[str, Callable[[], torch.Tensor]] = {
        "kernels": partial(once, features),
        "baseline": partial(rival, baseline.solve),
        "baseline, torch.compile": partial(rival, partial(baseline.solve, compiled=True)),
    }
    if n * d <= STREAMED:
        arms["kernels, streamed"] = partial(once, Rows(features.cpu(), device="cuda", held=False))
    labels: torch.Tensor | None = None
    for arm, run in arms.items():
        taken = suite.attempt(f"{name}, {arm}", partial(timed_solve, run))
        if taken is None:
            continue
        found, seconds, peak = taken
        labels = found if labels is None else labels
        same = float((found == labels).float().mean())
        detail: dict[str, Any] = {"peak_gb": peak / 1e9, "same_labels": same}
        if arm == "kernels":
            with stopwatch(operations("triton")) as watch:
                run()
            detail["stages"] = watch.stages()
        suite.add(Line(name, arm, 1e3 * seconds, detail=detail))


def timed_solve(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float, int]:
    """Labels, seconds and peak memory of the second run."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    labels = run()
    torch.cuda.synchronize()
    return labels, time.perf_counter() - start, torch.cuda.max_memory_allocated()


def table(lines: list[Line]) -> str:
    """One row a line."""
    head = f"{'operation':<34}{'arm':<26}{'ms':>10}{'rate':>9} {'':<8}{'share':>7}{'error':>10}"
    rows = [head]
    for line in lines:
        share = f"{100 * line.share:.0f} %" if line.unit else ""
        error = "" if line.error is None else f"{line.error:.1e}"
        rate = f"{line.rate:.0f}" if line.unit else ""
        rows.append(
            f"{line.operation:<34}{line.arm:<26}{line.milliseconds:>10.3f}{rate:>9} "
            f"{line.unit:<8}{share:>7}{error:>10}"
        )
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """Run everything and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_suite", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu_suite needs a GPU, and torch finds none")
        return 2
    suite = Suite(options.out)
    for part in (sweeps, dense_sweeps, scores, sums, neighbours):
        suite.attempt(part.__name__, partial(part, suite))
    for sizes in SOLVES:
        suite.attempt(f"solve {sizes}", partial(solve, suite, *sizes))
    suite.attempt("eva", partial(eva, suite))
    print(table(suite.lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
