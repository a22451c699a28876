"""The table of a solve that several processes share, from the newest clean line of its bench."""

from __future__ import annotations

from pathlib import Path

from bench.tables import newest, seconds, size, source, table


def ranks(folder: Path) -> str:
    """Tabulate core-seconds, memory and traffic by the number of processes."""
    rows = newest("ranks", "queries", "classes", "dim", folder=folder)
    if not rows:
        return "Not recorded yet: `python -m bench.speed.ranks`."
    cells = [
        [
            *(f"{row[x]:,}" for x in ("queries", "classes", "dim")),
            "a plain solve" if name == "plain" else name,
            seconds(arm["median"]),
            f"{arm['times_one_rank']:.2f}",
            size(arm["peak_bytes"]),
            size(arm["sweep_bytes"]),
        ]
        for row in rows
        for name, arm in row["arms"].items()
    ]
    head = ["N", "K", "d", "processes", "core time of all", "times that of one"]
    head += ["peak of a process", "sent a sweep, by all"]
    return table(head, cells) + "\n\n" + source(rows)


BLOCKS = {"ranks": ranks}
