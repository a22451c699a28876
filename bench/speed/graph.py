"""Searches for neighbours on the same features, each in a process of its own with one thread.

FAISS's arms run with AVX2 kernels of its BLAS, and with AVX-512 where the CPU has it. Its IVF arms
have as many lists, training rows and k-means steps as ours, and the first number of probes that
reaches a recall of 0.99; choosing it is not timed. Our times include it, the exact neighbours of
1,000 rows and reranking in float64. Recall is measured on 1,000 other rows, and comes first: where
an arm misses its target the exit code is 1, and no time is printed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import (
    command_line,
    in_turns,
    make_problem,
    medians,
    print_table,
    ratio,
    record,
)
from bench.processes import Process, process_memory, run_isolated
from transclip_fast.graph import centres
from transclip_fast.graph.build import build_graph
from transclip_fast.graph.candidates import rerank_float64
from transclip_fast.graph.exact import nearest

K = 3
TARGET = 0.99  # recall asked of the approximate searches
TOLERANCE = 0.005  # a recall measured on 1,000 images is off by as much
EXACT = 0.9999  # least recall of exact search: float32 may misorder near ties
EXACT_QUERIES = 50_000  # up to which exact arms run
SAMPLE_ROWS, SAMPLE_SEED = 1000, 12345  # not the seed of the made features
PROBES = (4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 48, 64)
KERNELS = {"avx2": "Haswell", "avx512": "SkylakeX"}
Found = tuple[np.ndarray, dict[str, Any]]


def faiss_exact(features: np.ndarray) -> Found:
    """Exact FAISS: every row against all."""
    import faiss

    _, ids = faiss.knn(features, features, K + 1, metric=faiss.METRIC_INNER_PRODUCT)
    return ids, {}


def ivf_index(features: np.ndarray, probes: int) -> Any:
    """Return an IVF index that is trained as much as ours."""
    import faiss

    d, lists = features.shape[1], centres.default_n_lists(len(features))
    quantizer = faiss.IndexFlatIP(d)
    index = faiss.IndexIVFFlat(quantizer, d, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.spherical = centres.KMEANS_STEPS, True
    index.cp.max_points_per_centroid = centres.SAMPLE_ROWS_PER_LIST
    index.train(features)
    index.add(features)
    index.nprobe = probes
    return index


def faiss_ivf(features: np.ndarray, probes: int = 1) -> Found:
    """Plain FAISS IVF."""
    return ivf_index(features, probes).search(features, K + 1)[1], {"probes": probes}


def faiss_big_batch(features: np.ndarray, probes: int = 1) -> Found:
    """The same index, searched list by list."""
    from faiss.contrib.big_batch_search import big_batch_search

    search: Any = big_batch_search
    _, ids = search(ivf_index(features, probes), features, K + 1)
    return ids, {"probes": probes}


def ours(search: str) -> Callable[[np.ndarray], Found]:
    """Return an arm of `build_graph`."""

    def run(features: np.ndarray) -> Found:
        graph = build_graph(features, K, search=search, recall=TARGET)
        return graph.neighbors, dict(graph.info)

    return run


ARMS: dict[str, Callable[..., Found]] = {
    "faiss_exact": faiss_exact,
    "faiss_ivf": faiss_ivf,
    "faiss_big_batch": faiss_big_batch,
    "exact": ours("exact"),
    "faiss": ours("faiss"),
}


def run_arm(arm: str, folder: str, **options: Any) -> dict[str, Any]:
    """Run one arm in this process on the features in `folder`, and write its neighbours there."""
    features = np.load(Path(folder) / "features.npy")
    ARMS[arm](features[:3000], **options)
    start = time.process_time()
    ids, info = ARMS[arm](features, **options)
    seconds = time.process_time() - start
    np.save(Path(folder) / "ids.npy", ids)
    return {"seconds": seconds, "info": info}


def recall(ids: np.ndarray, features: np.ndarray) -> float:
    """Share of the exact neighbours of 1,000 rows among `ids` (N, K or more), or of as similar."""
    rows = np.random.default_rng(SAMPLE_SEED).permutation(len(ids))[:SAMPLE_ROWS]
    own = torch.from_numpy(rows)
    sample, x = torch.from_numpy(features[rows]), torch.from_numpy(features)
    _, exact = nearest(sample, x, K, own=own)
    found = torch.from_numpy(ids[rows])
    found = found.where(found != own[:, None], -1)  # no row is its own neighbour
    _, similar = rerank_float64(sample, x, found, K)
    return float((similar >= exact[:, -1:] - 1e-9).double().mean())


def arms_of(queries: int) -> list[str]:
    """Return the names of the arms, FAISS's with the kernels of its BLAS."""
    kernels = ["avx2"]
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        kernels.append("avx512")
    names = [arm for arm in ARMS if queries <= EXACT_QUERIES or "exact" not in arm]
    return [
        f"{arm} {kernel}" if kernel else arm
        for arm in names
        for kernel in (kernels if arm.startswith("faiss_") else [""])
    ]


def compare(queries: int, classes: int, dim: int, repeats: int, file: str | None) -> int:
    """Check recall, time the arms in turns, record and print; the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        features = np.load(file) if file else make_problem(queries, classes, dim).features
        np.save(Path(folder) / "features.npy", features)
        names, options = arms_of(len(features)), dict[str, dict[str, Any]]()

        def run(name: str) -> Any:
            arm, _, kernel = name.partition(" ")
            environment = {"OPENBLAS_CORETYPE": KERNELS[kernel]} if kernel else {}
            with Process(1, environment) as process:
                call = {"arm": arm, "folder": folder, **options.get(name, {})}
                return process.call("bench.speed.graph:run_arm", **call)

        found: dict[str, float] = {}
        for name in names:
            arm = name.partition(" ")[0]
            for probes in PROBES if arm in ("faiss_ivf", "faiss_big_batch") else (0,):
                options[name] = {"probes": probes} if probes else {}
                run(name)
                found[name] = recall(np.load(Path(folder) / "ids.npy"), features)
                if found[name] >= TARGET:
                    break
        wanted = {name: EXACT if "exact" in name else TARGET - TOLERANCE for name in names}
        missed = [name for name in names if found[name] < wanted[name]]
        for name in missed:
            print(f"{name}: recall {found[name]:.4f}")
        if missed:
            return 1
        runs = in_turns(run, names, repeats)
    seconds = {name: [done["seconds"] for done in runs[name]] for name in names}
    middle = medians(seconds)
    plain = min((name for name in names if name.startswith("faiss_ivf")), key=middle.__getitem__)
    arms = {
        name: {
            "seconds": seconds[name],
            "median": middle[name],
            "recall": found[name],
            "plain_ivf_over_own": ratio(seconds, plain, name),
            "info": runs[name][-1]["info"],
        }
        for name in names
    }
    n, d = features.shape
    sizes = {"queries": n, "classes": classes, "dim": d, "made": file is None}
    record("graph", {"case": "arms", **sizes, "arms": arms})
    lines = []
    for name, row in arms.items():
        figures = f"{row['median']:.2f}", f"{row['recall']:.4f}", f"{row['plain_ivf_over_own']:.2f}"
        lines.append([name, *figures, str(row["info"].get("probes", "-"))])
    print_table(["arm", "core-s", "recall", "plain IVF's / own", "probes"], lines)
    return 0


def large(features: str) -> dict[str, Any]:
    """Search the features in a .npy file, mapped, in this process."""
    start = time.perf_counter()
    graph = build_graph(np.load(features, mmap_mode="r"), K, search="faiss", recall=TARGET)
    seconds, peak = time.perf_counter() - start, process_memory("VmHWM")
    return {"seconds": seconds, "info": dict(graph.info), "peak_bytes": peak}


def million(queries: int, dim: int) -> int:
    """Record time, recall and peak memory of a search of float16 features in a file."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "features.npy")
        np.save(file, make_problem(queries, 1000, dim, dtype=np.float16).features)
        found = run_isolated("bench.speed.graph:large", features=file)
    record("graph", {"case": "million", "queries": queries, "dim": dim, **found})
    print(
        f"N = {queries:,}: {found['seconds']:.0f} s, recall {found['info']['recall']:.4f}, "
        f"peak {found['peak_bytes'] / 2**30:.2f} GiB"
    )
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison, or the large case, and return the exit code."""
    parser = command_line(__spec__, __doc__, queries=33000, classes=1080, dim=512, repeats=3)
    parser.add_argument(
        "--million", action="store_true", help="a million rows in a file, ours only"
    )
    parser.add_argument("--features", help=".npy file of unit rows (N, d) instead of made ones")
    options = parser.parse_args(arguments)
    if options.million:
        return million(1_000_000, options.dim)
    sizes = options.queries, options.classes, options.dim
    return compare(*sizes, options.repeats, options.features)


if __name__ == "__main__":
    raise SystemExit(main())
