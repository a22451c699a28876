"""Sparse assignments: a solve with its graph given, beside the strong baseline and its bare GEMMs.

Labels come first: unless sparse and dense agree with the reference, the first arm, on 99.9 % of the
rows, no time is printed and the exit code is 1. Where only sparse fits in memory, its labels must
be better than the prior's. Every run is a process of its own. Time is that of a second solve (of
the first where that took more than a minute); memory, measured in runs apart, the peak of a solve
beyond what was resident with features and graph loaded, where freed blocks go back at once:
otherwise a peak varies with the holes that the allocator left.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import interleaved, make_problem, medians, ratio, record
from bench.processes import process_memory, reset_peak_memory, run_isolated

SAME_LABELS = 0.999
N_NEIGHBORS = 3
STEPS = 11  # scores of the schedule, one GEMM each
GEMM_ROWS = 4096
ARMS = ("baseline", "dense", "sparse", "gemms")
LONG = 60.0  # seconds


def run_arm(arm: str, folder: str, logit_scale: float) -> dict[str, Any]:
    """Solve the problem in `folder` in this process, and leave the labels there."""
    import torch

    place = Path(folder)
    names = ("features", "prototypes", "neighbors", "similarities")
    # Copies are aligned as torch likes it, so that no arm makes its own.
    tensors = [torch.from_numpy(np.load(place / f"{name}.npy")).clone() for name in names]
    small = make_problem(300, 20, tensors[0].shape[1])
    near = (np.arange(300)[:, None] + 1 + np.arange(N_NEIGHBORS)) % 300
    arrays = (small.features, small.prototypes, near, np.ones(near.shape, np.float32))
    solve_arm(arm, [torch.from_numpy(x) for x in arrays], logit_scale)
    reset_peak_memory()
    before = process_memory("VmRSS")
    start = time.perf_counter()
    labels, facts = solve_arm(arm, tensors, logit_scale)
    seconds = time.perf_counter() - start
    peak = process_memory("VmHWM") - before
    if seconds < LONG:
        start = time.perf_counter()
        labels, facts = solve_arm(arm, tensors, logit_scale)
        seconds = time.perf_counter() - start
    np.save(place / f"{arm}.npy", labels)
    return {"seconds": seconds, "peak_bytes": peak, **facts}


def solve_arm(
    arm: str, tensors: list[Any], logit_scale: float
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return labels (N,), and what the solver says of itself."""
    import torch

    features, prototypes, neighbors, similarities = tensors
    if arm == "gemms":
        block = torch.empty(GEMM_ROWS, len(prototypes))
        for _ in range(STEPS):
            for rows in torch.split(features, GEMM_ROWS):
                torch.mm(rows, prototypes.T, out=block[: len(rows)])
        return np.zeros(len(features), np.int64), {}
    if arm == "baseline":
        from bench.baseline import solve

        z = solve(features, prototypes, (neighbors, similarities), logit_scale=logit_scale)
        return z.argmax(1).numpy(), {}
    from transclip_fast import TransCLIP
    from transclip_fast.types import NeighborGraph

    graph = NeighborGraph(neighbors.numpy(), similarities.numpy())
    model = TransCLIP(assignments=arm, device="cpu", logit_scale=logit_scale)
    model.fit(features, text_features=prototypes, graph=graph)
    facts = {"backend": model.backend_, "truncation": model.truncation_}
    return np.asarray(model.transduction_), facts


def write_problem(
    queries: int, classes: int, dim: int, folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Write a made problem with its graph to `folder`; return true and zero-shot labels (N,)."""
    import torch

    from bench.baseline import nearest

    problem = make_problem(queries, classes, dim)
    features, prototypes = map(torch.from_numpy, (problem.features, problem.prototypes))
    neighbors, similarities = nearest(features, N_NEIGHBORS)
    for name, array in (
        ("features", problem.features),
        ("prototypes", problem.prototypes),
        ("neighbors", neighbors.numpy()),
        ("similarities", similarities.numpy()),
    ):
        np.save(folder / f"{name}.npy", array)
    blocks = torch.split(features, GEMM_ROWS)
    zero_shot = torch.cat([(rows @ prototypes.T).argmax(1) for rows in blocks])
    return problem.labels, zero_shot.numpy()


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.sparse", description=__doc__)
    parser.add_argument("--queries", type=int, default=20000, metavar="N")
    parser.add_argument("--classes", type=int, default=1000, metavar="K")
    parser.add_argument("--dim", type=int, default=512, metavar="D")
    parser.add_argument("--logit-scale", type=float, default=100.0, metavar="TAU")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--repeats", type=int, default=3, metavar="R")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        truth, prior = write_problem(options.queries, options.classes, options.dim, place)
        runs: dict[str, list[Any]] = {arm: [] for arm in options.arms}

        def measure(arm: str) -> dict[str, Any]:
            arguments = {"arm": arm, "folder": folder, "logit_scale": options.logit_scale}
            found: dict[str, Any] = run_isolated("bench.sparse:run_arm", **arguments).result
            return found

        def run(arm: str) -> None:
            runs[arm].append(measure(arm))

        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
        peaks = {arm: measure(arm)["peak_bytes"] for arm in runs}
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
        interleaved({arm: partial(run, arm) for arm in runs}, options.repeats, cold=options.arms)
        labels = {arm: np.load(place / f"{arm}.npy") for arm in runs if arm != "gemms"}
    reference = next(iter(labels))
    agreement = {arm: float((found == labels[reference]).mean()) for arm, found in labels.items()}
    accuracy = {arm: float((found == truth).mean()) for arm, found in labels.items()}
    zero_shot = float((prior == truth).mean())
    if min(agreement.values()) < SAME_LABELS or min(accuracy.values()) <= zero_shot:
        print(f"labels differ from {reference}'s: {agreement}; accuracy {accuracy}, {zero_shot}")
        return 1
    seconds = {arm: [run["seconds"] for run in found] for arm, found in runs.items()}
    row = {
        "queries": options.queries,
        "classes": options.classes,
        "dim": options.dim,
        "logit_scale": options.logit_scale,
        "zero_shot_accuracy": zero_shot,
        "arms": {
            arm: {
                "seconds": seconds[arm],
                "median": medians(seconds)[arm],
                "peak_bytes": peaks[arm],
                "agreement": agreement.get(arm),
                "accuracy": accuracy.get(arm),
                **{name: found[0].get(name) for name in ("backend", "truncation")},
                "times_sparse": ratio(seconds, arm, "sparse") if "sparse" in runs else None,
            }
            for arm, found in runs.items()
        },
    }
    record("sparse", row)
    print_table(row)
    return 0


def print_table(row: dict[str, Any]) -> None:
    """Print one line an arm."""
    print(
        f"{'arm':<10} {'solve s':>8} {'beyond GB':>10} {'same labels':>12}  times sparse's seconds"
    )
    for name, arm in row["arms"].items():
        same = "" if arm["agreement"] is None else f"{100 * arm['agreement']:.2f} %"
        times = "" if arm["times_sparse"] is None else f"{arm['times_sparse']:.2f}"
        print(
            f"{name:<10} {arm['median']:>8.2f} {arm['peak_bytes'] / 1e9:>10.3f} {same:>12}  {times}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
