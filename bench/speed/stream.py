"""A million rows on disk with their graph: time a row, memory and bytes read, beside the plan.

Each size is solved in a process of its own, with so little memory that features stay on disk.
The smallest size is also solved with features in memory: unless both end with the same bits, and
labels are better than zero-shot, no time is printed and the exit code is 1. The graph is made
(two of three neighbours have the row's own class): `bench.speed.graph` measures the search.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import command_line, make_problem, record
from bench.processes import process_memory, reset_peak_memory, run_isolated
from transclip_fast import TransCLIP
from transclip_fast.cli.plan import plan_of, problem_of
from transclip_fast.device import resolve_device
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.solver.layout import USUAL_CANDIDATES, Layout
from transclip_fast.solver.problem import Settings
from transclip_fast.store.features import load_features

SHARDS = 4
N_NEIGHBORS = 3
OWN_CLASS = 0.65  # of neighbours; on real features 62 to 71 % share the zero-shot label


def write_problem(queries: int, classes: int, dim: int, present: int, folder: Path) -> None:
    """Write a made problem to `folder`: features in float16 shards, a graph, true labels.

    Only `present` of the classes occur, equally often, if that is not 0.
    """
    shares = None
    if present:
        chosen = np.random.default_rng(present).permutation(classes)[:present]
        shares = np.bincount(chosen, minlength=classes) / present
    problem = make_problem(queries, classes, dim, dtype=np.float16, shares=shares)
    (folder / "img_emb").mkdir(parents=True)
    for number, part in enumerate(np.array_split(problem.features, SHARDS)):
        np.save(folder / "img_emb" / f"img_emb_{number:05}.npy", part)
    np.save(folder / "prototypes.npy", problem.prototypes)
    np.save(folder / "labels.npy", problem.labels)
    draw = np.random.default_rng(0)
    order = np.lexsort([draw.random(queries), problem.labels])  # rows by class
    place = np.empty_like(order)
    place[order] = np.arange(queries)
    neighbors = order[(place[:, None] + 1 + np.arange(N_NEIGHBORS)) % queries]
    other = draw.integers(queries - 1, size=neighbors.shape)
    other += other >= np.arange(queries)[:, None]  # not the row itself
    neighbors = np.where(draw.random(neighbors.shape) < OWN_CLASS, neighbors, other)
    similarities = np.empty(neighbors.shape, np.float32)
    for start in range(0, queries, 65536):
        rows = problem.features[start : start + 65536].astype(np.float32)
        near = problem.features[neighbors[start : start + 65536]]
        similarities[start : start + 65536] = np.einsum("nd,nkd->nk", rows, near)
    np.save(folder / "neighbors.npy", neighbors)
    np.save(folder / "similarities.npy", similarities)


def run_size(folder: str, held: bool, published: bool) -> dict[str, Any]:
    """Plan and solve the problem in `folder` in this process."""
    place = Path(folder)
    arrays = load_features(place)
    features = arrays.get("image_features")
    graph = NeighborGraph(np.load(place / "neighbors.npy"), np.load(place / "similarities.npy"))
    class_cost = False if published else "auto"
    model = TransCLIP(device="cpu", assignments="sparse", class_cost=class_cost)
    problem = problem_of(arrays, model)
    if not held:  # exactly the memory of streaming with lists of the usual length
        device = resolve_device("cpu")
        size = problem.size(model, device)
        lists = Layout(USUAL_CANDIDATES, held=False).bytes(size, device)
        model.memory = size.used(device) + sum(lists.values())
    plan = plan_of(problem, Settings.resolve(model, problem), None)
    reset_peak_memory()
    read, start = bytes_read(), time.perf_counter()
    model.fit(features, text_features=arrays.get("text_features"), graph=graph)
    seconds, read = time.perf_counter() - start, bytes_read() - read
    peak = process_memory("VmHWM")
    solve = next(stage for stage in plan.stages if stage.name == "solve")
    labels = np.load(place / "labels.npy")
    z: Any = model.label_distributions_
    bits = (z.data, z.indices, z.indptr, model.objective_, model.means_, model.variances_)
    return {
        "held": model.layout_.held,
        "memory": model.memory,
        "seconds": seconds,
        "peak_bytes": peak,
        "read_bytes": read,
        "feature_bytes": len(features) * features.shape[1] * features.dtype.itemsize,
        "planned_bytes": solve.host,
        "planned_passes": plan.passes,
        "effective_classes": model.n_effective_classes_,
        "class_cost": model.class_costs_ is not None,
        "truncation": model.truncation_,
        "accuracy": float((model.transduction_ == labels).mean()),
        "zero_shot_accuracy": float((model.zero_shot_labels_ == labels).mean()),
        "sha256": hashlib.sha256(b"".join(array.tobytes() for array in bits)).hexdigest(),
    }


def bytes_read() -> int:
    """Return the bytes that this process has read from files so far, cached or not."""
    return int(Path("/proc/self/io").read_text().partition("rchar:")[2].split()[0])


def main(arguments: list[str] | None = None) -> int:
    """Measure every size and return the exit code."""
    sizes = [125_000, 250_000, 500_000, 1_000_000]
    parser = command_line(__spec__, __doc__, queries=sizes, classes=1000, dim=512)
    parser.add_argument("--present", type=int, default=0, metavar="P", help="classes that occur")
    parser.add_argument("--published", action="store_true", help="without the class cost")
    options = parser.parse_args(arguments)
    found: list[dict[str, Any]] = []
    for queries in options.queries:
        with tempfile.TemporaryDirectory() as folder:
            write_problem(queries, options.classes, options.dim, options.present, Path(folder))

            def run(held: bool, folder: str = folder) -> Any:
                given = {"folder": folder, "held": held, "published": options.published}
                return run_isolated("bench.speed.stream:run_size", **given)

            found.append(run(held=False))
            same = queries != options.queries[0] or run(held=True)["sha256"] == found[0]["sha256"]
        last = found[-1]
        worse = last["accuracy"] <= last["zero_shot_accuracy"] and not options.published
        if last["held"] or not same or worse:
            print(f"not a result to time: {last}, the same bits as held: {same}")
            return 1
        print_row(queries, last)
    record("stream", {**vars(options), "sizes": found})
    return 0


def print_row(queries: int, row: dict[str, Any]) -> None:
    """Print one line a size."""
    passes = row["read_bytes"] / row["feature_bytes"]
    seconds, gib = row["seconds"], 2**30
    print(
        f"{queries:>9,} rows {seconds:>7.1f} s {1e6 * seconds / queries:>7.1f} us a row  "
        f"peak {row['peak_bytes'] / gib:.2f} GiB (planned "
        f"{row['planned_bytes'] / gib:.2f})  features read {passes:.1f} times",
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
