"""The tables of the documents: operations that failed once, and mutated files."""

from __future__ import annotations

from pathlib import Path

from bench.fuzz.trial import ACCEPTED, REFUSED
from bench.tables import Row, clean_lines, newest, source, table

OUTCOMES = ("refused", "finished", "killed")


def of_cases(folder: Path) -> list[Row]:
    """Return the newest line of each command, with what earlier ones of its stride tried beside."""
    found: dict[str, Row] = {}
    for line in clean_lines("faults", folder):
        earlier = found.get(line["case"])
        if earlier is not None and earlier["every"] == line["every"]:
            line = {**line, "faults": earlier["faults"] | line["faults"]}
        found[line["case"]] = line
    return [found[case] for case in sorted(found)]


def faults(folder: Path) -> str:
    """Tabulate failed operations of each command and how the command ended."""
    rows = of_cases(folder)
    if not rows:
        return "Not recorded yet: `python -m bench.faults`."
    cells = []
    for row in rows:
        tried = row["faults"]
        reads = tried.get("READ", {}).get("operations", 0)
        changes = max((x["operations"] for name, x in tried.items() if name != "READ"), default=0)
        counts = [sum(found.get(x, 0) for found in tried.values()) for x in ("tried", *OUTCOMES)]
        every = "all" if row["every"] == 1 else f"1 of {row['every']}"
        numbers = [f"{x:,}" for x in (changes, reads, *counts)]
        cells.append([f"`{row['case']}`", *numbers[:2], every, *numbers[2:]])
    head = ["command", "operations that write", "that read", "of which", "failed", "one line"]
    return table([*head, "whole", "killed"], cells) + "\n\n" + source(rows)


def mutated(folder: Path) -> str:
    """Tabulate the newest campaign with most mutated files: how their commands ended."""
    rows = newest("fuzz", "seed", "first", folder=folder)
    if not rows:
        return "Not recorded yet: `python -m bench.fuzz --count 50000`."

    def size(row: Row) -> tuple[int, str]:
        return sum(sum(found.values()) for found in row["formats"].values()), str(row["date"])

    row, cells = max(rows, key=size), []
    for name, found in sorted(row["formats"].items()):
        others = sum(found.values()) - found.get(REFUSED, 0) - found.get(ACCEPTED, 0)
        counts = sum(found.values()), found.get(REFUSED, 0), found.get(ACCEPTED, 0), others
        cells.append([name, *(f"{x:,}" for x in counts)])
    head = ["format", "mutated files", "one line", "a result", "anything else"]
    return table(head, cells) + "\n\n" + source([row])


BLOCKS = {"faults": faults, "mutated": mutated}
