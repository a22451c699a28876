"""Same problem to the published code, to the strong baseline and to each of our solvers.

Labels come first: unless every arm agrees with the reference (the published code where it runs, or
else the baseline) on 99.9 % of the rows at every size, no time is printed and the exit code is 1.
Each arm has a process of its own, on a GPU where torch finds one. Memory is that of the first solve
there; then the arms take turns, and the ratio of two is the median over rounds, in each of which
both met the same machine. The published code takes minutes: it runs once, at the smallest size.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import busy_cores, interleaved, make_problem, medians, ratio, record
from bench.processes import Process, process_memory, reset_peak_memory
from bench.published import VARIABLE, available

SAME_LABELS = 0.999
N_NEIGHBORS = 3
QUIET = 0.1  # of the cores: with more of them busy the machine has other work
Stages = dict[str, float]


@contextmanager
def _timed(stages: Stages, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    stages[name] = time.perf_counter() - start


def run_published(
    features: np.ndarray, prototypes: np.ndarray, device: str
) -> tuple[np.ndarray, Stages]:
    """Return labels (N,) and the seconds of each stage."""
    from bench.published import zero_shot

    f, t = (torch.from_numpy(array).to(device) for array in (features, prototypes))
    z, stages = zero_shot(f, t)
    return z.argmax(1).cpu().numpy(), stages


def run_baseline(
    features: np.ndarray, prototypes: np.ndarray, device: str, *, compiled: bool = False
) -> tuple[np.ndarray, Stages]:
    """Return labels (N,) and the seconds of each stage."""
    from bench.baseline import nearest, solve

    stages: Stages = {}
    with _timed(stages, "knn"):
        f, t = (torch.from_numpy(array).to(device) for array in (features, prototypes))
        graph = nearest(f, N_NEIGHBORS)
    with _timed(stages, "solve"):
        labels = solve(f, t, graph, compiled=compiled).argmax(1).cpu().numpy()
    return labels, stages


def run_ours(
    features: np.ndarray, prototypes: np.ndarray, device: str, *, assignments: str, backend: str
) -> tuple[np.ndarray, Stages]:
    """Return labels (N,) and the seconds of each stage."""
    from transclip_fast import TransCLIP
    from transclip_fast.graph.build import build_graph

    stages: Stages = {}
    with _timed(stages, "knn"):
        graph = build_graph(features, N_NEIGHBORS, device=device)
    with _timed(stages, "solve"):
        model = TransCLIP(
            n_neighbors=N_NEIGHBORS, device=device, assignments=assignments, backend=backend
        )
        labels = model.fit(features, text_features=prototypes, graph=graph).transduction_
    return np.asarray(labels), stages


ARMS: dict[str, Callable[[np.ndarray, np.ndarray, str], tuple[np.ndarray, Stages]]] = {
    "published": run_published,
    "baseline": run_baseline,
    "baseline_compiled": partial(run_baseline, compiled=True),
    "dense_torch": partial(run_ours, assignments="dense", backend="torch"),
    "sparse_torch": partial(run_ours, assignments="sparse", backend="torch"),
    "sparse_numba": partial(run_ours, assignments="sparse", backend="numba"),
    "dense_triton": partial(run_ours, assignments="dense", backend="triton"),
    "sparse_triton": partial(run_ours, assignments="sparse", backend="triton"),
}


def default_arm(queries: int, classes: int, dim: int, device: str) -> str:
    """Return which of our arms `TransCLIP()` is at this size."""
    from transclip_fast.ops import choose_backend
    from transclip_fast.solver.layout import Size, choose_layout
    from transclip_fast.types import Truncation

    where = torch.device(device)
    size = Size(queries, classes, dim, N_NEIGHBORS, copied=device != "cpu")
    short = choose_layout(size, where, form="auto").candidates is not None
    backend = choose_backend("auto", where, Truncation(1, 1) if short else None)
    return f"{'sparse' if short else 'dense'}_{backend}"


def run_arm(arm: str, folder: str, device: str) -> dict[str, Any]:
    """Run one arm in this process on the problem in `folder`, and leave its labels there.

    The peak is counted from what is resident after a small problem has brought in every import,
    and before the problem is loaded: the features themselves count.
    """
    place = Path(folder)
    dim = np.load(place / "features.npy", mmap_mode="r").shape[1]
    small = make_problem(300, 20, dim)
    ARMS[arm](small.features, small.prototypes, device)
    reset_peak_memory()
    before = process_memory("VmRSS")
    on_device = torch.cuda if device == "cuda" else None
    if on_device:
        on_device.reset_peak_memory_stats()
    labels, stages = ARMS[arm](*_load(folder), device)
    np.save(place / f"{arm}.npy", labels)
    return {
        "stages": stages,
        "peak_bytes": process_memory("VmHWM") - before,
        "device_peak_bytes": on_device.max_memory_allocated() if on_device else None,
    }


def run_again(arm: str, folder: str, device: str) -> Stages:
    """Return the seconds of each stage, where all is compiled and in memory."""
    return ARMS[arm](*_load(folder), device)[1]


def _load(folder: str) -> tuple[np.ndarray, np.ndarray]:
    features, prototypes = (np.load(Path(folder) / f"{x}.npy") for x in ("features", "prototypes"))
    return features, prototypes


@dataclass
class Case:
    """One size: where its problem lies, the arms that run on it, and what they did."""

    queries: int
    classes: int
    dim: int
    folder: Path
    device: str
    arms: list[str]
    skipped: dict[str, str]  # arms that cannot run here, and why
    threads: int
    processes: dict[str, Process] = field(default_factory=dict)
    first: dict[str, dict[str, Any]] = field(default_factory=dict)  # what `run_arm` returned
    turns: dict[str, list[Stages]] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """The arm whose labels the others must have."""
        return self.arms[0]

    def call(self, arm: str, function: str) -> Any:
        """Call `run_arm` or `run_again` in the arm's process."""
        if arm not in self.processes:
            self.processes[arm] = Process(self.threads)
        given = {"arm": arm, "folder": str(self.folder), "device": self.device}
        return self.processes[arm].call(f"bench.compare:{function}", **given)

    def turn(self, arm: str) -> None:
        """Run an arm once more."""
        self.turns[arm].append(self.call(arm, "run_again"))

    def close(self) -> None:
        """End the processes."""
        for process in self.processes.values():
            process.close()


def why_not_published(queries: int, classes: int, dim: int, device: str) -> str | None:
    """Return why the published code cannot run at this size, or None where it can."""
    if not available():
        return f"{VARIABLE} names no checkout of it"
    if queries < max(8, classes):
        return "it needs at least 8 queries and one a class"
    chunk = min(queries, 2500) * classes * dim  # its fp32 temporary; two are alive at once
    needed = 4 * (2.2 * chunk + queries**2 + 8 * queries * classes)
    free = free_bytes(device)
    if needed > 0.9 * free:
        return f"it needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
    return None


def free_bytes(device: str) -> int:
    """Return the memory that is free where the arms compute."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def why_not(arm: str, device: str) -> str | None:
    """Return why an arm of `ARMS` cannot run here at any size, or None where it can."""
    compiler = os.environ.get("CXX", "g++")
    if arm == "baseline_compiled" and device == "cpu" and shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and there is no {compiler}"
    if arm.endswith("triton") and device == "cpu":
        return "torch finds no GPU"
    if arm.endswith("numba") and device == "cuda":
        return "numba's loops are for a CPU"
    module = arm.rpartition("_")[2]
    if module in ("numba", "triton") and importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    return None


def make_case(
    queries: int,
    classes: int,
    dim: int,
    folder: Path,
    *,
    device: str = "cpu",
    arms: Iterable[str] = ARMS,
    smallest: bool = True,
    threads: int = 1,
) -> Case:
    """Write a problem to `folder` and choose those of the arms that can run."""
    folder.mkdir()
    problem = make_problem(queries, classes, dim)
    np.save(folder / "features.npy", problem.features)
    np.save(folder / "prototypes.npy", problem.prototypes)
    reasons = {arm: why_not(arm, device) for arm in arms}
    if "published" in reasons and smallest:
        reasons["published"] = why_not_published(queries, classes, dim, device)
    elif "published" in reasons:
        reasons["published"] = "it takes minutes, and runs at the smallest size only"
    skipped = {arm: reason for arm, reason in reasons.items() if reason}
    for arm, reason in skipped.items():
        print(f"N = {queries}: SKIPPED {arm}: {reason}", flush=True)
    able = [arm for arm in reasons if arm not in skipped]
    return Case(queries, classes, dim, folder, device, able, skipped, threads)


def same_labels(case: Case) -> bool:
    """Run every arm once and say whether all agree with the reference; print those that do not."""
    for arm in case.arms:
        case.first[arm] = case.call(arm, "run_arm")
        case.turns[arm] = [case.first[arm]["stages"]]
    labels = {arm: np.load(case.folder / f"{arm}.npy") for arm in case.arms}
    expected = labels[case.reference]
    for arm, found in labels.items():
        case.agreement[arm] = float((found == expected).mean())
        if case.agreement[arm] < SAME_LABELS:
            print(
                f"N = {case.queries}: {arm} has other labels than {case.reference} on "
                f"{(found != expected).sum()} rows ({100 * case.agreement[arm]:.2f} % equal)"
            )
    return min(case.agreement.values()) >= SAME_LABELS


def time_arms(case: Case, repeats: int) -> dict[str, Any]:
    """Run the fast arms in turns, the published one no more, and return the row to record."""
    quick = [arm for arm in case.arms if arm != "published"]
    for arm in quick:
        case.turns[arm].clear()  # the first run is not what a turn is
    interleaved({arm: partial(case.turn, arm) for arm in quick}, repeats, cold=quick)
    seconds = {arm: [sum(turn.values()) for turn in case.turns[arm]] for arm in case.arms}
    return {
        "queries": case.queries,
        "classes": case.classes,
        "dim": case.dim,
        "device": case.device,
        "threads": case.threads,
        "default": default_arm(case.queries, case.classes, case.dim, case.device),
        "skipped": case.skipped,
        "arms": {
            arm: {
                "seconds": seconds[arm],
                "median": medians(seconds)[arm],
                "stages": {
                    stage: float(np.median([turn[stage] for turn in turns])) for stage in turns[0]
                },
                **{name: case.first[arm][name] for name in ("peak_bytes", "device_peak_bytes")},
                "agreement": case.agreement[arm],
                "times_faster": {
                    slow: ratio(seconds, slow, arm) for slow in case.arms[: case.arms.index(arm)]
                },
            }
            for arm, turns in case.turns.items()
        },
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line for each arm at each size."""
    print(
        f"{'N':>8} {'K':>6} {'d':>5}  {'arm':<18} {'knn s':>8} {'solve s':>8} {'total s':>8} "
        f"{'peak GB':>8} {'on GPU':>8} {'same labels':>12}  times faster than"
    )
    for row in rows:
        for name, arm in row["arms"].items():
            rivals = ((x, arm["times_faster"].get(x)) for x in ("published", "baseline"))
            faster = ", ".join(f"{slow} {times:.2f}" for slow, times in rivals if times)
            on_device = arm["device_peak_bytes"]
            on_gpu = "" if on_device is None else f"{on_device / 1e9:.3f}"
            print(
                f"{row['queries']:>8} {row['classes']:>6} {row['dim']:>5}  {name:<18} "
                f"{arm['stages']['knn']:>8.2f} {arm['stages']['solve']:>8.2f} "
                f"{arm['median']:>8.2f} "
                f"{arm['peak_bytes'] / 1e9:>8.3f} {on_gpu:>8} "
                f"{100 * arm['agreement']:>10.2f} %  {faster}"
            )


def usable_threads() -> tuple[float, int]:
    """
    Return the cores that other work takes, and the threads of an arm: all cores, or one beside it.

    Threads that wait for each other lose whole time slices to other work, and some arms more than
    others: on several threads the load changes the ratio itself, on one it does not.
    """
    load, cores = busy_cores(), len(os.sched_getaffinity(0))
    if load <= QUIET * cores:
        return load, cores
    print(f"WARNING: {load:.1f} of {cores} cores are busy with other work: an arm gets one thread")
    return load, 1


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("--queries", type=int, nargs="+", default=[2500, 5000], metavar="N")
    parser.add_argument("--classes", type=int, default=500, metavar="K")
    parser.add_argument("--dim", type=int, default=512, metavar="D")
    parser.add_argument("--repeats", type=int, default=7, metavar="R")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load, threads = usable_threads()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:
        cases = [
            make_case(
                n,
                options.classes,
                options.dim,
                Path(folder) / str(i),
                device=device,
                smallest=n == min(options.queries),
                threads=threads,
            )
            for i, n in enumerate(options.queries)
        ]
        for case in cases:
            processes.callback(case.close)
        agreed = [same_labels(case) for case in cases]  # all sizes, to report every failure
        if not all(agreed):
            return 1
        rows = [time_arms(case, options.repeats) for case in cases]
    for row in rows:
        record("compare", {"load_before": load, **row})
    print_table(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
