"""How time and memory grow with the problem, and what fewer candidates and steps do to labels.

`--against queries`, `classes` or `dim`: whole solves of growing size, the default and the baseline
in turns, each in a process of its own, and the exponents a of time ~ size^a that fit them. Labels
come first, as in `bench.speed.compare`. `--against lists` (C and R) or `schedule` (outer steps,
sweeps): the share of labels equal to those of the dense solver with 10 x 5, and accuracy; nothing
is timed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.common import command_line, make_problem, print_table, record
from bench.speed.compare import Sizes, compare_sizes, default_arm, usable_threads
from transclip_fast import TransCLIP
from transclip_fast.graph.build import build_graph

SIZES = {
    "queries": (2000, 4000, 8000),
    "classes": (250, 500, 1000),
    "dim": (128, 256, 512),
}
LISTS = ((128, 128), (64, 64), (64, 32), (32, 32), (32, 16), (16, 16), (8, 8))  # C, R
OPTIONS = {"candidates": "C", "rank": "R", "max_iter": "outer steps", "inner_iter": "sweeps"}
SCHEDULES = ((10, 5), (10, 3), (10, 1), (6, 5), (6, 1), (3, 5), (3, 1), (1, 5))  # outer, sweeps


def exponent(sizes: list[int], values: list[float]) -> float:
    """Return a of values ~ sizes^a, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def grow(against: str, fixed: Sizes, repeats: int) -> dict[str, Any] | None:
    """Measure every size; None where labels differ."""
    _, threads = usable_threads()
    sizes = [{**fixed, against: size} for size in SIZES[against]]
    # The form of the largest size at all of them, or the fit would join two curves.
    arms = "baseline", default_arm(**sizes[-1], device="cpu")
    rows = compare_sizes(sizes, arms, repeats, threads=threads)
    if rows is None:
        return None
    fits: dict[str, dict[str, float]] = {}
    for arm in rows[0]["arms"]:
        done = [row["arms"][arm] for row in rows]
        measured = {stage: [x["stages"][stage] for x in done] for stage in done[0]["stages"]}
        measured["bytes"] = [max(x["peak_bytes"], 1) for x in done]
        grown = list(SIZES[against])
        fits[arm] = {name: exponent(grown, values) for name, values in measured.items()}
    return {"rows": rows, "exponents": fits}


def labels_of(sizes: Sizes, options: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Agreement with the dense default, accuracy and truncation of each option."""
    problem = make_problem(sizes["queries"], sizes["classes"], sizes["dim"])
    graph = build_graph(problem.features)
    dense: dict[str, Any] = {"assignments": "dense", "device": "cpu", "class_cost": False}
    shared: dict[str, Any] = {"text_features": problem.prototypes, "graph": graph}
    expected = TransCLIP(**dense).fit(problem.features, **shared).transduction_
    found = []
    for option in options:
        model = TransCLIP(**(dense | option)).fit(problem.features, **shared)
        found.append(
            {
                **option,
                "agreement": float((model.transduction_ == expected).mean()),
                "accuracy": float((model.transduction_ == problem.labels).mean()),
                "truncation": model.truncation_,
            }
        )
    return found


def print_growth(against: str, found: dict[str, Any]) -> None:
    """Print one line a size and arm, and one an exponent."""
    lines = []
    for row in found["rows"]:
        for arm, done in row["arms"].items():
            took = (f"{seconds:.3f}" for seconds in done["stages"].values())
            lines.append([str(row[against]), arm, *took, f"{done['peak_bytes'] / 1e6:.1f}"])
    print_table([against, "arm", "knn s", "solve s", "MB"], lines)
    for arm, fits in found["exponents"].items():
        print(f"{arm}: " + ", ".join(f"{name} ~ {against}^{a:.2f}" for name, a in fits.items()))


def print_labels(results: list[dict[str, Any]]) -> None:
    """Print one line an option."""
    lines = []
    for found in results:
        options = (f"{letter} {found[name]}" for name, letter in OPTIONS.items() if name in found)
        line = [", ".join(options)]
        line += [f"{100 * found[share]:.2f} %" for share in ("agreement", "accuracy")]
        truncation = found["truncation"]
        dropped = f"{100 * truncation['mean_dropped']:.3f} %" if truncation else ""
        lines.append([*line, dropped])
    print_table(["option", "same labels", "accuracy", "mass of z left out"], lines)


def main(arguments: list[str] | None = None) -> int:
    """Answer one question and return the exit code."""
    parser = command_line(__spec__, __doc__, queries=8000, classes=500, dim=256, repeats=3)
    parser.add_argument("--against", choices=[*SIZES, "lists", "schedule"], required=True)
    options = parser.parse_args(arguments)
    fixed = {name: getattr(options, name) for name in SIZES}
    row = {"against": options.against, **fixed}
    if options.against in SIZES:
        found = grow(options.against, fixed, options.repeats)
        if found is None:
            return 1
        record("scaling", row | found)
        print_growth(options.against, found)
        return 0
    tried: dict[str, list[dict[str, Any]]] = {
        "lists": [{"assignments": "sparse", "candidates": c, "rank": r} for c, r in LISTS],
        "schedule": [{"max_iter": outer, "inner_iter": sweeps} for outer, sweeps in SCHEDULES],
    }
    results = labels_of(fixed, tried[options.against])
    record("scaling", row | {"options": results})
    print_labels(results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
