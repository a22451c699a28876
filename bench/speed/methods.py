"""Time and memory of TransCLIP and of other methods at 100,000 x 1,000 x 512.

Each method labels the same made rows, with settings as published and texts as shots where it needs
shots, TransCLIP with its defaults, in a process of its own that is allowed 8 GiB and has labelled a
few rows before. The graph is searched before. The exit code is 1, and nothing is recorded, where
one takes more memory or more than ten minutes.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from bench.common import busy_cores, command_line, make_problem, print_table, record
from bench.processes import process_memory, reset_peak_memory, run_isolated
from bench.tables import seconds, size
from transclip_fast import TransCLIP
from transclip_fast.graph.build import build_graph
from transclip_fast.methods import METHODS
from transclip_fast.methods.base import Method
from transclip_fast.store.results import TRANSCLIP

NAMES = [TRANSCLIP, "zero-shot", "stata", "laplacianshot", "zlap", "bd-cspn", "em-dirichlet"]
MOST_BYTES, MOST_SECONDS = 8 << 30, 600.0
WARM_UP = 500, 100  # rows and classes


def made(name: str) -> tuple[TransCLIP | Method, str | None, int]:
    """Return a method, what it learns the classes from, and its number of neighbours."""
    if name == TRANSCLIP:
        return TransCLIP(device="cpu", memory=MOST_BYTES), "texts", TransCLIP().n_neighbors
    method: type[Method] = METHODS[name]
    anchors = method.possible_anchors(texts=True, shots=False)
    model = method(anchors=anchors, device="cpu", memory=MOST_BYTES)
    return model, anchors, model.neighbors_needed(searched=False)


def run_method(name: str, queries: int, classes: int, dim: int) -> dict[str, Any]:
    """Label a made problem in this process."""
    small = make_problem(*WARM_UP, dim)
    made(name)[0].fit(small.features, text_features=small.prototypes)
    problem = make_problem(queries, classes, dim)
    model, anchors, n_neighbors = made(name)
    graph = build_graph(problem.features, n_neighbors) if n_neighbors else None
    reset_peak_memory()
    start = time.perf_counter()
    model.fit(problem.features, text_features=problem.prototypes, graph=graph)
    took = time.perf_counter() - start
    right = np.mean(model.transduction_ == problem.labels)
    return {
        "method": name,
        "text": anchors,
        "seconds": round(took, 2),
        "peak_bytes": process_memory("VmHWM"),
        "steps": model.n_iter_,
        "accuracy": round(100 * float(right), 2),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure every method and return the exit code."""
    parser = command_line(__spec__, __doc__, queries=100_000, classes=1000, dim=512)
    parser.add_argument("--methods", nargs="+", choices=[TRANSCLIP, *METHODS], default=NAMES)
    options = parser.parse_args(arguments)
    sizes = {"queries": options.queries, "classes": options.classes, "dim": options.dim}
    load, rows = busy_cores(), []
    for name in options.methods:
        row = run_isolated("bench.speed.methods:run_method", name=name, **sizes)
        rows.append(row)
        print(f"{name}: {seconds(row['seconds'])}, {size(row['peak_bytes'])}", flush=True)
    beyond = [
        row["method"]
        for row in rows
        if row["peak_bytes"] > MOST_BYTES or row["seconds"] > MOST_SECONDS
    ]
    if beyond:
        print(f"more than {size(MOST_BYTES)} or {seconds(MOST_SECONDS)}: {', '.join(beyond)}")
        return 1
    record("methods", {**sizes, "load_before": load, "rows": rows})
    print_table([*rows[0]], [[str(value) for value in row.values()] for row in rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
