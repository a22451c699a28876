"""The table of the documents: operations that failed once."""

from __future__ import annotations

from pathlib import Path

from bench.tables import newest, source, table

OUTCOMES = ("refused", "finished", "killed")


def faults(folder: Path) -> str:
    """Tabulate failed operations of each command and how the command ended."""
    rows = newest("faults", "case", folder=folder)
    if not rows:
        return "Not recorded yet: `python -m bench.faults`."
    cells = []
    for row in rows:
        tried = row["faults"]
        reads = tried.get("READ", {}).get("operations", 0)
        changes = max((x["operations"] for name, x in tried.items() if name != "READ"), default=0)
        counts = [sum(found.get(x, 0) for found in tried.values()) for x in ("tried", *OUTCOMES)]
        cells.append([f"`{row['case']}`", *(f"{x:,}" for x in (changes, reads, *counts))])
    head = ["command", "operations that write", "that read", "failed", "one line", "whole"]
    return table([*head, "killed"], cells) + "\n\n" + source(rows)


BLOCKS = {"faults": faults}
