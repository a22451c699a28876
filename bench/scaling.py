"""How time and memory grow with the problem, and what shorter lists and schedules do to labels.

`--against queries`, `classes` or `dim`: whole solves of growing size, the default and the baseline
in turns, each in a process of its own, and the exponents a of time ~ size^a that fit them. Labels
come first, as in `bench.compare`. `--against lists` (C and R) or `schedule` (outer steps, sweeps):
the share of labels that the dense solver with 10 x 5 gives too, and accuracy; nothing is timed.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import make_problem, record
from bench.compare import default_arm, make_case, same_labels, time_arms, usable_threads

SIZES = {
    "queries": (2000, 4000, 8000),
    "classes": (250, 500, 1000),
    "dim": (128, 256, 512),
}
LISTS = ((128, 128), (64, 64), (64, 32), (32, 32), (32, 16), (16, 16), (8, 8))  # C, R
SCHEDULES = ((10, 5), (10, 3), (10, 1), (6, 5), (6, 1), (3, 5), (3, 1), (1, 5))  # outer, sweeps


def exponent(sizes: list[int], values: list[float]) -> float:
    """Return a of values ~ sizes^a, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def grow(against: str, fixed: dict[str, int], repeats: int) -> dict[str, Any] | None:
    """Measure every size; None where labels differ."""
    _, threads = usable_threads()
    sizes = [{**fixed, against: size} for size in SIZES[against]]
    # The form of the largest size at all of them, or the fit would join two curves.
    arms = "baseline", default_arm(**sizes[-1], device="cpu")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:
        cases = [
            make_case(
                size["queries"],
                size["classes"],
                size["dim"],
                Path(folder) / str(i),
                arms=arms,
                threads=threads,
            )
            for i, size in enumerate(sizes)
        ]
        for case in cases:
            processes.callback(case.close)
        agreed = [same_labels(case) for case in cases]
        if not all(agreed):
            return None
        rows = [time_arms(case, repeats) for case in cases]
    fits: dict[str, dict[str, float]] = {}
    for arm in cases[0].arms:
        done = [row["arms"][arm] for row in rows]
        measured = {stage: [x["stages"][stage] for x in done] for stage in done[0]["stages"]}
        measured["bytes"] = [max(x["peak_bytes"], 1) for x in done]
        steps = list(SIZES[against])
        fits[arm] = {name: exponent(steps, values) for name, values in measured.items()}
    return {"rows": rows, "exponents": fits}


def labels_of(sizes: dict[str, int], options: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Agreement with the dense default, accuracy, and what lists left out, of each option."""
    from transclip_fast import TransCLIP
    from transclip_fast.graph.build import build_graph

    problem = make_problem(sizes["queries"], sizes["classes"], sizes["dim"])
    graph = build_graph(problem.features)
    dense: dict[str, Any] = {"assignments": "dense", "device": "cpu"}
    given: dict[str, Any] = {"text_features": problem.prototypes, "graph": graph}
    expected = TransCLIP(**dense).fit(problem.features, **given).transduction_
    found = []
    for option in options:
        model = TransCLIP(**(dense | option)).fit(problem.features, **given)
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
    for row in found["rows"]:
        for arm, done in row["arms"].items():
            stages = "  ".join(f"{name} {took:8.3f} s" for name, took in done["stages"].items())
            print(f"{row[against]:>8}  {arm:<14} {stages}  {done['peak_bytes'] / 1e6:8.1f} MB")
    for arm, fits in found["exponents"].items():
        print(f"{arm}: " + ", ".join(f"{name} ~ {against}^{a:.2f}" for name, a in fits.items()))


def print_labels(results: list[dict[str, Any]]) -> None:
    """Print one line an option."""
    shown = {"candidates": "C", "rank": "R", "max_iter": "outer steps", "inner_iter": "sweeps"}
    for line in results:
        what = ", ".join(f"{shown[name]} {line[name]}" for name in shown if name in line)
        same, right = 100 * line["agreement"], 100 * line["accuracy"]
        print(f"{what:<26} same labels {same:6.2f} %  accuracy {right:5.2f} %", end="")
        lost = line["truncation"]
        print(f"  mass of z left out {100 * lost['mean_dropped']:.3f} %" if lost else "")


def main(arguments: list[str] | None = None) -> int:
    """Answer one question and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--against", choices=[*SIZES, "lists", "schedule"], required=True)
    parser.add_argument("--queries", type=int, default=8000, metavar="N")
    parser.add_argument("--classes", type=int, default=500, metavar="K")
    parser.add_argument("--dim", type=int, default=256, metavar="D")
    parser.add_argument("--repeats", type=int, default=3, metavar="R")
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
