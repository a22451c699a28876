"""A solve whose rows several processes share, beside one process.

A plain solve, then 1, 2 and 4 ranks of torch.distributed on this machine, over loopback, in turns:
core-seconds of all ranks, the most memory of one, and the bytes that they send. "2 apart" and "4
apart" are so many processes at a time that share nothing but the machine: each solves a problem of
its share of the rows, plainly. Unless all numbers of ranks end with the same bits, and with the
labels of the plain solve on 99.9 % of the rows, nothing is printed and the exit code is 1.
Core-seconds and memory are those of the fit, from files to labels: before it each process has
imported everything and made a small fit.
"""

from __future__ import annotations

import hashlib
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import (
    SAME_LABELS,
    command_line,
    in_turns,
    make_problem,
    medians,
    print_table,
    ratio,
    record,
)
from bench.processes import Process, measured
from bench.speed.stream import N_NEIGHBORS, write_problem
from transclip_fast import TransCLIP
from transclip_fast.cli.plan import problem_of
from transclip_fast.graph.build import build_graph
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.ops.ranked import RankedOps
from transclip_fast.ranks import joined
from transclip_fast.solver.problem import Problem, Settings
from transclip_fast.store.features import load_features
from transclip_fast.types import Assignments

PLAIN = "plain"  # one process, without torch.distributed
APART = " apart"  # after the number of processes that solve a problem each
ARMS = [PLAIN, "1", "2", "4", f"2{APART}", f"4{APART}"]
SMALL = 1 << 13  # rows of the fit that warms up: some for every rank


def run_rank(folder: str) -> dict[str, Any]:
    """Solve this rank's rows of the problem in `folder`, in this process."""
    place = Path(folder)
    with joined() as ranks:
        warm_up()
        ranks.all_gather("ready")
        sweeps = count_sweeps()
        start = time.process_time()
        (model, problem), seconds, peak = measured(lambda: solve(place))
        used = time.process_time() - start
        sent, exchange = 0, problem.exchange
        found: dict[str, Any] = {
            "rows": [model.rows_.start, model.rows_.stop],
            "sha256": None,
            "halo_rows": 0,
        }
        if exchange is not None:
            sent = exchange.sent
            found["sha256"] = exchange.digest(lambda rows: sha256(model, rows))
            found["halo_rows"] = len(exchange.halo.ids)
    np.save(place / f"labels-{ranks.size}-{ranks.rank}.npy", model.transduction_)
    return {
        **found,
        "core_seconds": used,
        "seconds": seconds,
        "peak_bytes": peak,
        "before_core_seconds": start,
        "sent_bytes": sent,
        "sweep_bytes": sweeps,
    }


def warm_up() -> None:
    """Fit a small problem, so that loops are loaded and threads are there."""
    small = make_problem(SMALL, 20, 64)
    graph = build_graph(small.features, N_NEIGHBORS, device="cpu")
    model = TransCLIP(device="cpu", assignments="sparse", logit_scale=100.0)
    model.fit(small.features, text_features=small.prototypes, graph=graph)


def count_sweeps() -> list[int]:
    """A list that receives the bytes that this rank sends for the halo of each sweep."""
    sweeps: list[int] = []
    with_halo = RankedOps.with_halo

    def counted(ops: RankedOps, z: Assignments) -> Assignments:
        before = ops.exchange.sent
        found = with_halo(ops, z)
        sweeps.append(ops.exchange.sent - before)
        return found

    setattr(RankedOps, "with_halo", counted)  # noqa: B010 - mypy refuses to assign a method
    return sweeps


def solve(place: Path) -> tuple[TransCLIP, Problem]:
    """Fit the problem in a folder."""
    model = TransCLIP(device="cpu", assignments="sparse", class_cost=True)  # one solve
    problem = problem_of(load_features(place), model)
    names = ("neighbors", "similarities")
    lists = (np.load(place / f"{name}.npy", mmap_mode="r") for name in names)
    model.fit_problem(problem, Settings.resolve(model, problem), NeighborGraph(*lists))
    return model, problem


def sha256(model: TransCLIP, rows: slice) -> str:
    """Hash of z of some of the own rows, and of what all rows decide."""
    z: Any = model.label_distributions_[rows]
    bits = (z.data, z.indices, z.indptr, model.objective_, model.means_, model.variances_)
    return hashlib.sha256(b"".join(array.tobytes() for array in bits)).hexdigest()


def run_arm(arm: str, folder: str) -> dict[str, Any]:
    """Solve with so many ranks, or plainly; sums and maxima over the ranks."""
    alone = arm == PLAIN or arm.endswith(APART)
    size = 1 if arm == PLAIN else int(arm.removesuffix(APART))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ExitStack() as stack, ThreadPoolExecutor(size) as pool:
        processes = [
            stack.enter_context(
                Process(threads=1, environment={} if alone else shared | {"RANK": str(rank)})
            )
            for rank in range(size)
        ]
        call = "bench.speed.ranks:run_rank"
        found = list(pool.map(lambda process: process.call(call, folder=folder), processes))
    if not arm.endswith(APART):
        labels = [np.load(Path(folder) / f"labels-{size}-{rank}.npy") for rank in range(size)]
        np.save(Path(folder) / f"labels-{arm}.npy", np.concatenate(labels))
    return {
        "core_seconds": sum(rank["core_seconds"] for rank in found),
        "before_core_seconds": sum(rank["before_core_seconds"] for rank in found),
        "seconds": max(rank["seconds"] for rank in found),
        "peak_bytes": max(rank["peak_bytes"] for rank in found),
        "sent_bytes": sum(rank["sent_bytes"] for rank in found),
        "sweep_bytes": sum(np.mean([x for x in r["sweep_bytes"] if x] or [0]) for r in found),
        "halo_rows": sum(rank["halo_rows"] for rank in found),
        "sha256": found[0]["sha256"],
        "ranks": found,
    }


def compare(queries: int, classes: int, dim: int, arms: list[str], repeats: int) -> Any:
    """The row to record, or None where results differ."""
    with tempfile.TemporaryDirectory() as folder:
        places = {arm: Path(folder) / (arm if arm.endswith(APART) else "all") for arm in arms}
        for arm, place in places.items():
            if not place.exists():
                parts = int(arm.removesuffix(APART)) if arm.endswith(APART) else 1
                write_problem(queries // parts, classes, dim, 0, place)
        runs = in_turns(lambda arm: run_arm(arm, str(places[arm])), arms, repeats)
        shared = [arm for arm in arms if not arm.endswith(APART)]
        labels = {arm: np.load(places[arm] / f"labels-{arm}.npy") for arm in shared}
    first = labels[shared[0]]
    same = {arm: float((found == first).mean()) for arm, found in labels.items()}
    hashes = {run["sha256"] for arm in shared if arm != PLAIN for run in runs[arm]}
    if min(same.values()) < SAME_LABELS or len(hashes) > 1:
        print(f"not a result to time: labels {same}, {len(hashes)} different results of ranks")
        return None
    core_seconds = {arm: [run["core_seconds"] for run in found] for arm, found in runs.items()}
    return {
        "queries": queries,
        "classes": classes,
        "dim": dim,
        "arms": {
            arm: {
                **{name: value for name, value in found[0].items() if name != "ranks"},
                "core_seconds": core_seconds[arm],
                "median": medians(core_seconds)[arm],
                "times_one_rank": ratio(core_seconds, arm, "1") if "1" in runs else None,
                "same_labels": same.get(arm),
            }
            for arm, found in runs.items()
        },
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison and return the exit code."""
    parser = command_line(__spec__, __doc__, queries=200_000, classes=1000, dim=512, repeats=3)
    parser.add_argument("--arms", nargs="+", default=ARMS, help="ranks")
    options = parser.parse_args(arguments)
    row = compare(**vars(options))
    if row is None:
        return 1
    record("ranks", row)
    lines = []
    for name, arm in row["arms"].items():
        times = "" if arm["times_one_rank"] is None else f"{arm['times_one_rank']:.2f}"
        seconds = f"{arm['median']:.2f}", times, f"{arm['seconds']:.1f}"
        sizes = (arm["peak_bytes"], arm["sweep_bytes"], arm["sent_bytes"])
        lines.append([name, *seconds, *(f"{x / 1e6:.1f}" for x in sizes)])
    head = ["ranks", "core-s", "times one rank", "s", "peak MB", "MB a sweep", "MB sent"]
    print_table(head, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
