"""What the tables of the documents share: which lines count, how figures are written."""

from __future__ import annotations

import json
import statistics as stats
from pathlib import Path
from typing import Any

from bench.common import RESULTS

# Of `bench.prompt_learners`, in the order of the table.
LEARNERS = {
    "coop": "CoOp",
    "coop-class": "CoOp, a context a class",
    "prograd": "ProGrad",
    "cocoop": "CoCoOp",
    "plot": "PLOT, over prompts",
    "plot-crops": "PLOT, over crops",
}
NAMINGS = {"words": "other words", "permuted": "another digit's"}


Row = dict[str, Any]


def newest(name: str, *identity: str, folder: Path = RESULTS) -> list[Row]:
    """Return the newest clean line of each measurement in `folder`/`name`.jsonl.

    Parameters
    ----------
    identity : str
        Keys that tell one measurement from another, beside the GPU it ran on, if any; the lines
        come in the order of their values.
    """
    file = folder / f"{name}.jsonl"
    if not file.exists():
        return []
    lines: list[Row] = [json.loads(line) for line in file.read_text().splitlines()]
    found: dict[tuple[Any, ...], Row] = {}
    for line in sorted(lines, key=lambda line: str(line["date"])):
        if line["machine"]["dirty"] is False:
            measurement = line["machine"]["gpu"] or "", *(line.get(key) for key in identity)
            found[measurement] = line
    return [found[key] for key in sorted(found, key=lambda key: [(x is None, x) for x in key])]


def seconds(value: float) -> str:
    """Three digits, as a reader wants them."""
    return f"{value:.0f} s" if value >= 99.5 else f"{value:#.3g} s"


def size(n_bytes: float) -> str:
    """Decimal megabytes or gigabytes."""
    return f"{n_bytes / 1e9:#.3g} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def percent(share: float) -> str:
    """Two decimals of a percentage, never rounded up to 100."""
    return f"{min(100 * share, 99.99 if share < 1 else 100):.2f} %"


def spread(values: list[float]) -> str:
    """Mean and sample deviation, two decimals."""
    return f"{stats.mean(values):.2f} ± {stats.stdev(values):.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(rows: list[Row]) -> str:
    """Machine, date, commit and command of the lines, for the note under a table."""
    machines: dict[str, list[str]] = {}
    for row in rows:
        facts = row["machine"]
        memory = f"{facts['memory_gb']:.0f} GB"
        parts = [facts["cpu"], f"{facts['cores']} cores", memory, facts["gpu"]]
        versions = [f"{x} {facts[x]}" for x in ("python", "torch") if facts[x]]
        machine = ", ".join(str(part) for part in [*parts, *versions] if part)
        run = f"`{row['command']}` at {facts['commit'][:7]}, {row['date'][:10]}"
        machines.setdefault(machine, [])
        if run not in machines[machine]:
            machines[machine].append(run)
    notes = [f"{machine}: {'; '.join(runs)}" for machine, runs in machines.items()]
    return "<sub>" + ". ".join(notes) + ".</sub>"
