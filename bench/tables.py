"""The tables of the documents, each from the newest clean lines of its measurements."""

from __future__ import annotations

import json
import re
import statistics as stats
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.common import RESULTS
from bench.names import (
    FEATURES,
    GRAPH_ARMS,
    LEARNERS,
    NAMINGS,
    SPARSE_ARMS,
    SPEED_ARMS,
    counted_cores,
    most_memory,
)

Row = dict[str, Any]


def clean_lines(name: str, folder: Path) -> list[Row]:
    """Return the lines of `folder`/`name`.jsonl that a clean tree recorded, the oldest first."""
    file = folder / f"{name}.jsonl"
    if not file.exists():
        return []
    lines: list[Row] = [json.loads(line) for line in file.read_text().splitlines()]
    clean = [line for line in lines if line["machine"]["dirty"] is False]
    return sorted(clean, key=lambda line: str(line["date"]))


def newest(
    name: str,
    *identity: str,
    folder: Path = RESULTS,
    shown: Callable[[Row], bool] = lambda line: True,
    defaults: Mapping[str, Any] = {},
) -> list[Row]:
    """Return the newest clean line of each measurement in `folder`/`name`.jsonl.

    The keys `identity` tell one measurement from another, beside the GPU, if any; lines come in the
    order of their values. Only lines for which `shown` is true count; `defaults` are the values of
    keys that early lines lack.
    """
    found: dict[tuple[Any, ...], Row] = {}
    for line in filter(shown, clean_lines(name, folder)):
        row = {**defaults, **line}
        values = [row["machine"]["gpu"] or "", *(row.get(key) for key in identity)]
        found[tuple(tuple(x) if isinstance(x, list) else x for x in values)] = row
    return [found[key] for key in sorted(found, key=lambda key: [(x is None, x) for x in key])]


def seconds(value: float) -> str:
    """Format a time with three digits."""
    return f"{value:.0f} s" if value >= 99.5 else f"{value:#.3g} s"


def size(n_bytes: float) -> str:
    """Format bytes as decimal megabytes or gigabytes."""
    return f"{n_bytes / 1e9:#.3g} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def percent(share: float) -> str:
    """Format a share as a percentage with two decimals, never rounded up to 100."""
    return f"{min(100 * share, 99.99 if share < 1 else 100):.2f} %"


def spread(values: list[float]) -> str:
    """Format mean and sample deviation with two decimals."""
    return f"{stats.mean(values):.2f} ± {stats.stdev(values):.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def widest(row: Row) -> str:
    """Return the widest vector instructions of a line's CPU; earlier lines do not name them."""
    instructions: list[str] = row["machine"].get("instructions", [])
    return instructions[-1] if instructions else ""


def source(rows: list[Row]) -> str:
    """Return the note under a table: machine, command, commit and date of its lines."""
    machines: dict[str, list[str]] = {}
    for row in rows:
        facts = row["machine"]
        memory = f"{facts['memory_gb']:.0f} GB"
        parts = [
            " with ".join(filter(None, [facts["cpu"], widest(row)])),
            counted_cores(facts),
            memory,
            facts["gpu"],
        ]
        versions = [f"{x} {facts[x]}" for x in ("python", "torch") if facts[x]]
        machine = ", ".join(str(part) for part in [*parts, *versions] if part)
        run = f"`{row['command']}` at {facts['commit'][:7]}, {row['date'][:10]}"
        machines.setdefault(machine, [])
        if run not in machines[machine]:
            machines[machine].append(run)
    notes = [f"{machine}: {'; '.join(runs)}" for machine, runs in machines.items()]
    return "<sub>" + ". ".join(notes) + ".</sub>"


def plot(name: str, text: str) -> str:
    """Return the Markdown of a plot for README.md."""
    return f"![{text}](bench/plots/{name}.png)"


def labelled(folder: Path) -> list[Row]:
    """Return the lines of `bench.accuracy.graph_labels`, in the order of `FEATURES`."""
    rows = newest("graph_labels", "features", folder=folder)
    return sorted(rows, key=lambda row: list(FEATURES).index(row["features"]))


def accuracy(folder: Path) -> str:
    """Tabulate accuracy on golden data."""
    rows = [row for row in labelled(folder) if row.get("published")]
    cells = []
    for row in rows:
        published, default = row["published"], row["variants"]["default"]
        cells.append(
            [
                FEATURES[row["features"]],
                f"{row['queries']:,}",
                str(row["classes"]),
                f"{row['zero_shot_accuracy']:.2f}",
                f"{default['accuracy']:.2f}",
                percent(published["same_labels"]),
                f"{published['largest_difference']:.0e}".replace("e-0", "e-"),
            ]
        )
    head = ["features", "N", "K", "zero-shot", "TransCLIP"]
    head += ["labels of the published code", "largest difference of z from its own"]
    return table(head, cells) + "\n\n" + source(rows)


def on_all_cores(row: Row) -> bool:
    """Return whether a line of `bench.speed.compare` used all cores: no other work was running."""
    return bool(row.get("threads") == row["machine"]["cores"])


def compared(folder: Path) -> list[Row]:
    """Return the lines of `bench.speed.compare` on all cores."""
    return newest("compare", "classes", "dim", "queries", folder=folder, shown=on_all_cores)


def busy(folder: Path) -> str:
    """Tabulate calls of `bench.speed.compare` beside other work: do their ratios agree?"""
    rows = [row for row in clean_lines("compare", folder) if row.get("threads") == 1]
    arms = [arm for arm in SPEED_ARMS if all(arm in row["arms"] for row in rows)][1:]
    cells = [
        [f"{row['load_before']:.1f}", *(f"{row[x]:,}" for x in ("queries", "classes", "dim"))]
        + [f"{row['arms'][arm]['times_faster']['baseline']:.2f}" for arm in arms]
        for row in rows
    ]
    head = ["other load", "N", "K", "d", *(f"dense torch / {SPEED_ARMS[arm]}" for arm in arms)]
    return table(head, cells) + "\n\n" + source(rows)


def speed(folder: Path) -> str:
    """Tabulate whole solves beside the baseline and the published code."""
    rows = compared(folder)
    arms = [arm for arm in SPEED_ARMS if any(arm in row["arms"] for row in rows)]
    cells = []
    for row in rows:
        gpu = row["machine"]["gpu"]
        line = [f"{row['queries']:,}" + (f" ({gpu})" if gpu else "")]
        line += [f"{row['classes']:,}", str(row["dim"])]
        ours = row.get("one_solve") or row["default"]  # earlier lines name it so
        for arm in arms:
            done = row["arms"].get(arm)
            cell = f"{seconds(done['median'])}, {size(most_memory(done))}" if done else ""
            line.append(f"**{cell}**" if arm == ours else cell)
        done = [row["arms"].get(arm) for arm in (ours, "default")]
        line += [f"{x['times_faster']['baseline']:.2f}" if x else "" for x in done]
        cells.append(line)
    faster = ["dense torch's time / bold's", "dense torch's time / `TransCLIP()`'s"]
    head = ["N", "K", "d", *(SPEED_ARMS[arm] for arm in arms), *faster]
    text = f"{_labels_of_arms(rows)} The last columns are medians of the ratio over rounds.\n\n"
    return "\n\n".join(
        [plot("speed", "Seconds against N"), table(head, cells), text + source(rows)]
    )


def _labels_of_arms(rows: list[Row]) -> str:
    """Say which arms of `bench.speed.compare` have the same labels, and what the default has."""
    same = min(x["agreement"] for row in rows for arm, x in row["arms"].items() if arm != "default")
    text = (
        "Bold solves once, as published and as the rivals do (`class_cost=False`). These arms give "
        f"the same labels on at least {percent(same)} of rows."
    )
    both = [
        " and ".join(f"{row['arms'][arm]['accuracy']:.1f}" for arm in ("baseline", "default"))
        for row in rows
        if "default" in row["arms"]
    ]
    if both:
        text += (
            " `TransCLIP()` as it comes solves twice here, with a class cost and without, to decide"
            f" whether few classes occur; accuracies of dense torch and of it: {', '.join(both)} %."
        )
    return text


def sparse(folder: Path) -> str:
    """Tabulate solves of a given graph."""
    rows = newest("sparse", "classes", "dim", "queries", "logit_scale", folder=folder)
    cells = []
    for row in rows:
        sizes = [f"{row['queries']:,}", f"{row['classes']:,}", f"{row['logit_scale']:g}"]
        reference = next(iter(row["arms"]))
        for arm, done in row["arms"].items():
            same = "" if done["agreement"] is None else percent(done["agreement"])
            same = "reference" if arm == reference else same
            memory = "" if arm == "gemms" else size(done["peak_bytes"])
            took = [SPARSE_ARMS[arm], seconds(done["median"]), memory]
            cells.append([*sizes, *took, f"{done['times_sparse']:.2f}", same])
    head = ["N", "K", "logit scale", "graph given", "solve", "memory beyond features and graph"]
    head += ["times sparse's", "same labels"]
    return "\n\n".join([plot("sparse", "Time and memory"), table(head, cells), source(rows)])


def graph(folder: Path) -> str:
    """Tabulate searches for neighbours."""
    rows = newest("graph", "case", "queries", "dim", folder=folder)
    head = ["N", "d", "search", "core-seconds", "recall", "`IndexIVFFlat`'s / its own"]
    cells = []
    for row in rows:
        sizes = [f"{row['queries']:,}", str(row["dim"])]
        for arm, done in row.get("arms", {}).items():
            recall, faster = done["recall"], done["plain_ivf_over_own"]
            found = [f"{done['median']:.2f}", f"{recall:.4f}", f"{faster:.2f}"]
            cells.append([*sizes, GRAPH_ARMS[arm], *found])
        if row["case"] == "million":
            what = f"`--search faiss`, two threads, features in a file, {size(row['peak_bytes'])}"
            recall = f"{row['info']['recall']:.4f}"
            cells.append([*sizes, what, seconds(row["seconds"]), recall, ""])
    return "\n\n".join([plot("graph", "Time against recall"), table(head, cells), source(rows)])


def graph_labels(folder: Path) -> str:
    """Tabulate the effect of graphs on labels."""
    rows = labelled(folder)
    cells: dict[str, list[str]] = {}
    for row in rows:
        for variant, found in row["variants"].items():
            changed = f" ({percent(found['changed'])})" if found["changed"] else ""
            # The name of an approximate search has its recall, which differs between data sets.
            name = re.sub(r", recall .*", ", recall of 0.99", variant)
            cells.setdefault(name, []).append(f"{found['accuracy']:.2f}{changed}")
    head = ["graph", *(FEATURES[row["features"]] for row in rows)]
    lines = [[name, *line] for name, line in cells.items()]
    text = "Accuracy, and in brackets the share of labels that differ from the default's."
    return "\n\n".join([text, table(head, lines), source(rows)])


def prompt_learners(folder: Path) -> str:
    """Tabulate prompt learners on names that prompts cannot use."""
    rows = newest("prompt_learners", "naming", "learner", folder=folder)
    if not rows:
        return "Not recorded yet: `python -m bench.accuracy.prompt_learners`."
    order = {x: place for place, x in enumerate([*NAMINGS, *LEARNERS])}
    rows.sort(key=lambda row: (order[row["naming"]], order[row["learner"]]))
    head = ["digits are called by", "learner", "zero-shot", "learner alone", "TransCLIP on top"]
    cells = [
        [
            NAMINGS[row["naming"]],
            LEARNERS[row["learner"]],
            *(spread(row[x]) for x in ("zero_shot", "alone", "with_transclip")),
        ]
        for row in rows
    ]
    draws, shots, queries, own = (rows[0][x] for x in ("alone", "shots", "queries", "own_names"))
    text = (
        f"Accuracy on {queries} digits, mean and deviation over {len(draws)} draws of {shots} "
        f"shots a class; by their own names zero-shot is right on {own:.2f} % of all."
    )
    return "\n\n".join([text, table(head, cells), source(rows)])


def encodings(folder: Path) -> list[Row]:
    """Return the lines of `bench.speed.encode`, the oldest first."""
    return sorted(newest("encode", "command", folder=folder), key=lambda row: str(row["date"]))


def encode(folder: Path) -> str:
    """Tabulate encoding beside its two halves."""
    rows = list({row["options"]["model"]: row for row in encodings(folder)}.values())
    arms = {
        "forward": "model alone",
        "decode": "decoding alone",
        "encode": "both and writing",
        "clip-retrieval": "clip-retrieval",
    }
    shown = [arm for arm in arms if any(arm in row["median"] for row in rows)]
    cells = []
    for row in rows:
        rates = (row["median"].get(arm) for arm in shown)
        found = ["" if rate is None else f"{rate:.1f} images/s" for rate in rates]
        cells.append([row["options"]["model"], *found, f"{100 * row['share']:.0f} %"])
    head = ["model", *(arms[arm] for arm in shown), "share of the slower half"]
    return table(head, cells) + "\n\n" + source(rows)


def kills(folder: Path) -> str:
    """Tabulate killed commands that end in the same bytes."""
    head = ["command", "kills", "runs", "ended in the same bytes"]
    cells, rows = [], []
    keys: dict[str, tuple[str, ...]] = {"encode": (), "graph": (), "solve": (), "ranks": ("what",)}
    for name, key in keys.items():
        for row in newest(f"kill_{name}", *key, folder=folder):
            rows.append(row)
            numbers = sum(row["kills"]), row["runs"], row["identical"]
            command = f"`{row['options'].get('what', name)}`"
            if name == "ranks":
                command += f" on {' or '.join(map(str, row['options']['ranks']))} processes"
            cells.append([command, *map(str, numbers)])
    return table(head, cells) + "\n\n" + source(rows)


def scaling(folder: Path) -> str:
    """Tabulate exponents of time and memory, and labels of fewer candidates and steps."""
    rows = newest("scaling", "against", folder=folder)
    if not rows:
        return "Not recorded yet: `python -m bench.speed.scaling`."
    grown: list[list[str]] = []
    labels: list[list[str]] = []
    for row in rows:
        for arm, fits in row.get("exponents", {}).items():
            done = [x[row["against"]] for x in row["rows"]]
            what = f"{row['against']}, {done[0]:,} to {done[-1]:,}"
            powers = [f"{fits[x]:.1f}" for x in ("knn", "solve", "bytes")]
            grown.append([what, SPEED_ARMS[arm], *powers])
        sizes = [f"{row[x]:,}" for x in ("queries", "classes", "dim")]
        for option in row.get("options", []):
            names = {"candidates": "C", "rank": "R", "max_iter": "outer", "inner_iter": "sweeps"}
            what = ", ".join(f"{names[x]} {option[x]}" for x in names if x in option)
            found = [percent(option["agreement"]), f"{100 * option['accuracy']:.2f} %"]
            labels.append([*sizes, what, *found])
    parts = []
    if grown:
        parts.append(table(["against", "arm", "search", "solve", "memory"], grown))
    if labels:
        head = ["N", "K", "d", "option", "labels of dense, 10 x 5", "accuracy"]
        parts.append(table(head, labels))
    return "\n\n".join([*parts, source(rows)])


def gpu(folder: Path) -> str:
    """Tabulate the suite of one GPU."""
    rows = newest("gpu_suite", "operation", "arm", folder=folder)
    if not rows:
        return (
            "No GPU has run this yet. What is expected of one is predicted only, from counts of "
            "bytes and\noperations: [bench/gpu/predictions.md](bench/gpu/predictions.md)."
        )
    cells = []
    for row in rows:
        share = (
            f"{row['rate']:.0f} {row['unit']}, {100 * row['share']:.0f} %" if row["unit"] else ""
        )
        cells.append([row["operation"], row["arm"], f"{row['milliseconds']:.3g} ms", share])
    head = ["operation", "by", "time", "rate, share of the ceiling"]
    return table(head, cells) + "\n\n" + source(rows)


def known_labels(folder: Path) -> str:
    """Tabulate what few labels change."""
    rows = newest("known_labels", "part", "queries", "classes", folder=folder)
    if not rows:
        return "Not recorded yet: `python -m bench.accuracy.known_labels`."
    texts = {
        "known": "Known queries against none: accuracy of the others.",
        "shots": "Uneven shots against none; a gamma is TransCLIP-FS.",
        "cost": "Balanced shots with the class cost against TransCLIP-FS.",
        "made": "Known queries of made problems against none: accuracy of the others.",
    }
    chosen = {row["chosen"] for row in rows if "chosen" in row}
    parts = [f"Weight that is best on the choosing half: {', '.join(map(str, chosen))}."]
    for part, text in texts.items():
        lines = [row for row in rows if row["part"] == part]
        if not lines:
            continue
        names = list(next(iter(lines[0]["means"]["held out"].values())))
        cells = [
            [f"N = {row['queries']:,}, K = {row['classes']:,}, {what}" if part == "made" else what]
            + [f"{change[name]:+.2f}" for name in names]
            for row in lines
            for what, change in row["means"]["held out"].items()
        ]
        parts += [text, table(["points", *names], cells)]
    return "\n\n".join([*parts, source(rows)])


BLOCKS: dict[str, Callable[[Path], str]] = {
    "accuracy": accuracy,
    "speed": speed,
    "busy": busy,
    "sparse": sparse,
    "graph": graph,
    "graph-labels": graph_labels,
    "known-labels": known_labels,
    "prompt-learners": prompt_learners,
    "encode": encode,
    "kills": kills,
    "scaling": scaling,
    "gpu": gpu,
}
