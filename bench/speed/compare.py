"""The published code, the strong baseline and each of our solvers on the same problem.

Labels come first: unless every arm agrees with the reference (the published code where it runs,
else the baseline) on 99.9 % of the rows at every size, no time is printed and the exit code is 1.
These arms solve as published, without a class cost. One more is `TransCLIP()` as it comes: where it
is open whether few of the classes occur it solves twice, with a class cost and without, and so may
have other labels; the accuracies are recorded.
Each arm has a process of its own, on a GPU where torch finds one. Memory is the peak of the first
solve there; then the arms take turns, and the ratio of two arms is the median over rounds, in each
of which both met the same machine. The published code takes minutes: it runs once, at the smallest
size.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import (
    SAME_LABELS,
    busy_cores,
    command_line,
    in_turns,
    make_problem,
    medians,
    print_table,
    ratio,
    record,
)
from bench.processes import Process, measured
from bench.rivals import baseline, published
from transclip_fast import TransCLIP
from transclip_fast.graph.build import build_graph
from transclip_fast.ops import choose_backend
from transclip_fast.solver.layout import Size, choose_layout
from transclip_fast.types import Truncation

N_NEIGHBORS = 3
QUIET_SHARE = 0.1  # of the cores: with more of them busy, the machine has other work
SIZES = ("queries", "classes", "dim")
Stages = dict[str, float]  # seconds
Sizes = dict[str, int]  # of `SIZES`
ARMS = (
    "published",
    "baseline",
    "baseline_compiled",
    "dense_torch",  # ours: assignments and backend
    "sparse_torch",
    "sparse_numba",
    "sparse_triton",
    "default",  # `TransCLIP()`
)


@contextmanager
def _timed(stages: Stages, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    stages[name] = time.perf_counter() - start


def solve(
    arm: str, features: np.ndarray, prototypes: np.ndarray, device: str
) -> tuple[np.ndarray, Stages]:
    """Return labels (N,) of an arm of `ARMS`, and the seconds of each stage."""
    stages: Stages = {}
    if arm == "published":
        f, t = (torch.from_numpy(array).to(device) for array in (features, prototypes))
        z, stages = published.zero_shot(f, t)
        return z.argmax(1).cpu().numpy(), stages
    if arm.startswith("baseline"):
        with _timed(stages, "knn"):
            f, t = (torch.from_numpy(array).to(device) for array in (features, prototypes))
            neighbors = baseline.nearest(f, N_NEIGHBORS)
        with _timed(stages, "solve"):
            z = baseline.solve(f, t, neighbors, compiled=arm == "baseline_compiled")
            return z.argmax(1).cpu().numpy(), stages
    values: dict[str, Any] = {}
    if arm != "default":
        assignments, backend = arm.split("_")
        values = {"class_cost": False, "assignments": assignments, "backend": backend}
    with _timed(stages, "knn"):
        graph = build_graph(features, N_NEIGHBORS, device=device)
    with _timed(stages, "solve"):
        model = TransCLIP(n_neighbors=N_NEIGHBORS, device=device, **values)
        labels = model.fit(features, text_features=prototypes, graph=graph).transduction_
    return np.asarray(labels), stages


def default_arm(queries: int, classes: int, dim: int, device: str) -> str:
    """Return the arm that `TransCLIP(class_cost=False)` is at this size."""
    where = torch.device(device)
    size = Size(queries, classes, dim, N_NEIGHBORS, copied=device != "cpu")
    sparse = choose_layout(size, where, form="auto").candidates is not None
    backend = choose_backend("auto", where, Truncation(1, 1) if sparse else None)
    return f"{'sparse' if sparse else 'dense'}_{backend}"


def run_arm(arm: str, folder: str, device: str) -> dict[str, Any]:
    """Run one arm in this process on the problem in `folder`, and write its labels there.

    The peak is counted from what is resident after a small problem has brought in every import,
    and before the problem is loaded: the features themselves count.
    """
    place = Path(folder)
    small = make_problem(300, 20, np.load(place / "features.npy", mmap_mode="r").shape[1])
    solve(arm, small.features, small.prototypes, device)
    on_device = torch.cuda if device == "cuda" else None
    if on_device:
        on_device.reset_peak_memory_stats()
    (labels, stages), _, peak = measured(lambda: solve(arm, *_load(folder), device))
    np.save(place / f"{arm}.npy", labels)
    return {
        "stages": stages,
        "peak_bytes": peak,
        "device_peak_bytes": on_device.max_memory_allocated() if on_device else None,
    }


def run_again(arm: str, folder: str, device: str) -> Stages:
    """Return the seconds of each stage, where all is compiled and in memory."""
    return solve(arm, *_load(folder), device)[1]


def _load(folder: str) -> tuple[np.ndarray, np.ndarray]:
    features, prototypes = (np.load(Path(folder) / f"{x}.npy") for x in ("features", "prototypes"))
    return features, prototypes


@dataclass
class Case:
    """One size: its problem, the arms that run on it, and their results."""

    sizes: Sizes
    folder: Path
    device: str
    arms: list[str]  # the first is the reference, whose labels the others must have
    skipped: dict[str, str]  # arms that cannot run here, and why
    threads: int
    processes: dict[str, Process] = field(default_factory=dict)
    first: dict[str, dict[str, Any]] = field(default_factory=dict)  # results of `run_arm`
    agreement: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)

    def call(self, function: str, arm: str) -> Any:
        """Call `run_arm` or `run_again` in the arm's process."""
        if arm not in self.processes:
            self.processes[arm] = Process(self.threads)
        arguments = {"arm": arm, "folder": str(self.folder), "device": self.device}
        return self.processes[arm].call(f"bench.speed.compare:{function}", **arguments)

    def close(self) -> None:
        """End the processes."""
        for process in self.processes.values():
            process.close()


def why_not_published(queries: int, classes: int, dim: int, device: str) -> str | None:
    """Return why the published code cannot run at this size, or None where it can."""
    if not published.available():
        return f"{published.VARIABLE} names no checkout of it"
    if queries < max(8, classes):
        return "it needs at least 8 queries and one a class"
    chunk = min(queries, 2500) * classes * dim  # its fp32 temporary; two are alive at once
    needed = 4 * (2.2 * chunk + queries**2 + 8 * queries * classes)
    free = free_bytes(device)
    if needed > 0.9 * free:
        return f"it needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
    return None


def free_bytes(device: str) -> int:
    """Return the free memory of the device."""
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
    sizes: Sizes, folder: Path, arms: Iterable[str], device: str, threads: int, smallest: bool
) -> Case:
    """Write a problem to `folder` and choose those of the arms that can run."""
    folder.mkdir()
    problem = make_problem(sizes["queries"], sizes["classes"], sizes["dim"])
    np.save(folder / "features.npy", problem.features)
    np.save(folder / "prototypes.npy", problem.prototypes)
    np.save(folder / "labels.npy", problem.labels)
    reasons = {arm: why_not(arm, device) for arm in arms}
    if "published" in reasons and smallest:
        reasons["published"] = why_not_published(**sizes, device=device)
    elif "published" in reasons:
        reasons["published"] = "it takes minutes, and runs at the smallest size only"
    skipped = {arm: reason for arm, reason in reasons.items() if reason}
    for arm, reason in skipped.items():
        print(f"N = {sizes['queries']}: SKIPPED {arm}: {reason}", flush=True)
    able = [arm for arm in reasons if arm not in skipped]
    return Case(sizes, folder, device, able, skipped, threads)


def same_labels(case: Case) -> bool:
    """Run every arm once; print those that disagree with the reference, and return if none does."""
    case.first = {arm: case.call("run_arm", arm) for arm in case.arms}
    expected, truth = (np.load(case.folder / f"{x}.npy") for x in (case.arms[0], "labels"))
    for arm in case.arms:
        found = np.load(case.folder / f"{arm}.npy")
        case.agreement[arm] = float((found == expected).mean())
        case.accuracy[arm] = round(100 * float((found == truth).mean()), 2)
        if arm != "default" and case.agreement[arm] < SAME_LABELS:
            print(
                f"N = {case.sizes['queries']}: {arm} has other labels than {case.arms[0]} on "
                f"{(found != expected).sum()} rows ({100 * case.agreement[arm]:.2f} % equal)"
            )
    return all(x >= SAME_LABELS for arm, x in case.agreement.items() if arm != "default")


def time_arms(case: Case, repeats: int) -> dict[str, Any]:
    """Run the fast arms in turns and return the row to record; the published code has had its."""
    turns: dict[str, list[Stages]] = {arm: [case.first[arm]["stages"]] for arm in case.arms}
    quick = [arm for arm in case.arms if arm != "published"]
    turns |= in_turns(partial(case.call, "run_again"), quick, repeats)
    seconds = {arm: [sum(turn.values()) for turn in turns[arm]] for arm in case.arms}
    return {
        **case.sizes,
        "device": case.device,
        "threads": case.threads,
        "one_solve": default_arm(**case.sizes, device=case.device),
        "skipped": case.skipped,
        "arms": {
            arm: {
                "seconds": seconds[arm],
                "median": medians(seconds)[arm],
                "stages": {
                    stage: float(np.median([turn[stage] for turn in turns[arm]]))
                    for stage in turns[arm][0]
                },
                **{name: case.first[arm][name] for name in ("peak_bytes", "device_peak_bytes")},
                "agreement": case.agreement[arm],
                "accuracy": case.accuracy[arm],
                "times_faster": {
                    slow: ratio(seconds, slow, arm) for slow in case.arms[: case.arms.index(arm)]
                },
            }
            for arm in case.arms
        },
    }


def compare_sizes(
    tried: Sequence[Sizes],
    arms: Iterable[str],
    repeats: int,
    *,
    device: str = "cpu",
    threads: int = 1,
) -> list[dict[str, Any]] | None:
    """Return a row to record of each size, or None where the labels of one differ."""
    fewest = min(sizes["queries"] for sizes in tried)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:
        cases = []
        for i, sizes in enumerate(tried):
            smallest = sizes["queries"] == fewest
            case = make_case(sizes, Path(folder, str(i)), arms, device, threads, smallest)
            processes.callback(case.close)
            cases.append(case)
        agreed = [same_labels(case) for case in cases]  # all sizes, to report every failure
        return [time_arms(case, repeats) for case in cases] if all(agreed) else None


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print one line for each arm at each size."""
    head = ["N", "K", "d", "arm", "knn s", "solve s", "total s", "peak GB", "on GPU"]
    lines = []
    for row in rows:
        for name, arm in row["arms"].items():
            rivals = ((x, arm["times_faster"].get(x)) for x in ("published", "baseline"))
            faster = ", ".join(f"{slow} {times:.2f}" for slow, times in rivals if times)
            peak, on_device = arm["peak_bytes"], arm["device_peak_bytes"]
            took = [*arm["stages"].values(), arm["median"]]
            line = [*(str(row[size]) for size in SIZES), name, *(f"{x:.2f}" for x in took)]
            line += [f"{peak / 1e9:.3f}", "" if on_device is None else f"{on_device / 1e9:.3f}"]
            labels = f"{100 * arm['agreement']:.2f} %", f"{arm['accuracy']:.2f}"
            lines.append([*line, *labels, faster])
    print_table([*head, "same labels", "accuracy", "times faster than"], lines)


def usable_threads() -> tuple[float, int]:
    """
    Return the cores that other work takes, and the threads of an arm: all cores, or one beside it.

    Threads that wait for each other lose whole time slices to other work, and some arms more than
    others: on several threads the load changes the ratio itself, on one it does not.
    """
    load, cores = busy_cores(), len(os.sched_getaffinity(0))
    if load <= QUIET_SHARE * cores:
        return load, cores
    print(f"WARNING: {load:.1f} of {cores} cores are busy with other work: an arm gets one thread")
    return load, 1


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison and return the exit code."""
    parser = command_line(__spec__, __doc__, queries=[2500, 5000], classes=500, dim=512, repeats=7)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load, threads = usable_threads()
    tried = [
        {"queries": n, "classes": options.classes, "dim": options.dim} for n in options.queries
    ]
    rows = compare_sizes(tried, ARMS, options.repeats, device=device, threads=threads)
    if rows is None:
        return 1
    for row in rows:
        record("compare", {"load_before": load, **row})
    print_rows(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
