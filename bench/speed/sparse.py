"""Sparse assignments: a solve with its graph given, beside the strong baseline and its bare GEMMs.

Labels come first: unless sparse and dense agree with the reference, the first arm, on 99.9 % of the
rows, no time is printed and the exit code is 1. Where only sparse fits in memory, its labels must
be better than the prior's. Every run is a process of its own. Time is that of a second solve (of
the first where that took more than a minute). Memory is measured in separate runs: the peak of a
solve beyond what is resident with features and graph loaded, where the allocator returns freed
blocks at once. Otherwise a peak varies with the holes that it left.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
from bench.processes import measured, run_isolated
from bench.rivals import baseline
from transclip_fast import TransCLIP
from transclip_fast.graph.neighbor_graph import NeighborGraph

N_NEIGHBORS = 3
N_SCORES = 11  # of the schedule, one GEMM each
GEMM_ROWS = 4096
ARRAYS = ("features", "prototypes", "neighbors", "similarities")  # of the problem's folder
ARMS = ("baseline", "dense", "sparse", "gemms")
LONG_SECONDS = 60.0  # a solve that took longer is not repeated in its process
MMAP_BYTES = 1 << 20  # blocks above are mapped, and so returned when they are freed


def run_arm(arm: str, folder: str, logit_scale: float) -> dict[str, Any]:
    """Solve the problem in `folder` in this process, and write the labels there."""
    place = Path(folder)
    # Copies have torch's own alignment, so that no arm makes another copy.
    tensors = [torch.from_numpy(np.load(place / f"{name}.npy")).clone() for name in ARRAYS]
    small = make_problem(300, 20, tensors[0].shape[1])
    rows, texts = map(torch.from_numpy, (small.features, small.prototypes))
    solve_arm(arm, [rows, texts, *baseline.nearest(rows, N_NEIGHBORS)], logit_scale)
    (labels, facts), seconds, peak = measured(lambda: solve_arm(arm, tensors, logit_scale))
    if seconds < LONG_SECONDS:
        (labels, facts), seconds, _ = measured(lambda: solve_arm(arm, tensors, logit_scale))
    np.save(place / f"{arm}.npy", labels)
    return {"seconds": seconds, "peak_bytes": peak, **facts}


def solve_arm(
    arm: str, tensors: list[Any], logit_scale: float
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return labels (N,), and the solver's backend and truncation."""
    features, prototypes, neighbors, similarities = tensors
    if arm == "gemms":
        block = torch.empty(GEMM_ROWS, len(prototypes))
        for _ in range(N_SCORES):
            for rows in torch.split(features, GEMM_ROWS):
                torch.mm(rows, prototypes.T, out=block[: len(rows)])
        return np.zeros(len(features), np.int64), {}
    if arm == "baseline":
        z = baseline.solve(features, prototypes, (neighbors, similarities), logit_scale=logit_scale)
        return z.argmax(1).numpy(), {}
    graph = NeighborGraph(neighbors.numpy(), similarities.numpy())
    model = TransCLIP(assignments=arm, device="cpu", logit_scale=logit_scale, class_cost=False)
    model.fit(features, text_features=prototypes, graph=graph)
    facts = {"backend": model.backend_, "truncation": model.truncation_}
    return np.asarray(model.transduction_), facts


def write_problem(
    queries: int, classes: int, dim: int, folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Write a made problem with its graph to `folder`; return true and zero-shot labels (N,)."""
    problem = make_problem(queries, classes, dim)
    features, prototypes = map(torch.from_numpy, (problem.features, problem.prototypes))
    neighbors, similarities = baseline.nearest(features, N_NEIGHBORS)
    arrays = problem.features, problem.prototypes, neighbors.numpy(), similarities.numpy()
    for name, array in zip(ARRAYS, arrays, strict=True):
        np.save(folder / f"{name}.npy", array)
    blocks = torch.split(features, GEMM_ROWS)
    zero_shot = torch.cat([(rows @ prototypes.T).argmax(1) for rows in blocks])
    return problem.labels, zero_shot.numpy()


def compare(options: argparse.Namespace) -> dict[str, Any] | None:
    """Return the row to record, or None where labels differ."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        truth, prior = write_problem(options.queries, options.classes, options.dim, place)

        def run(arm: str) -> Any:
            arguments = {"arm": arm, "folder": folder, "logit_scale": options.logit_scale}
            return run_isolated("bench.speed.sparse:run_arm", **arguments)

        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MMAP_BYTES)
        peaks = {arm: run(arm)["peak_bytes"] for arm in options.arms}
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
        runs = in_turns(run, options.arms, options.repeats)
        labels = {arm: np.load(place / f"{arm}.npy") for arm in runs if arm != "gemms"}
    reference = next(iter(labels))
    agreement = {arm: float((found == labels[reference]).mean()) for arm, found in labels.items()}
    accuracy = {arm: float((found == truth).mean()) for arm, found in labels.items()}
    zero_shot = float((prior == truth).mean())
    if min(agreement.values()) < SAME_LABELS or min(accuracy.values()) <= zero_shot:
        print(f"labels differ from {reference}'s: {agreement}; accuracy {accuracy}, {zero_shot}")
        return None
    seconds = {arm: [run["seconds"] for run in found] for arm, found in runs.items()}
    sizes = {name: getattr(options, name) for name in ("queries", "classes", "dim", "logit_scale")}
    return {
        **sizes,
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


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison and return the exit code."""
    parser = command_line(
        __spec__, __doc__, queries=20000, classes=1000, dim=512, logit_scale=100.0, repeats=3
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    row = compare(parser.parse_args(arguments))
    if row is None:
        return 1
    record("sparse", row)
    lines = []
    for name, arm in row["arms"].items():
        same = "" if arm["agreement"] is None else f"{100 * arm['agreement']:.2f} %"
        times = "" if arm["times_sparse"] is None else f"{arm['times_sparse']:.2f}"
        lines.append([name, f"{arm['median']:.2f}", f"{arm['peak_bytes'] / 1e9:.3f}", same, times])
    print_table(["arm", "solve s", "beyond GB", "same labels", "times sparse's seconds"], lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
