"""Solves of features in files, and what a million images take."""

from __future__ import annotations

from pathlib import Path

from bench.tables import Row, encodings, newest, plot, seconds, size, source, table

MILLION = 10**6


def streamed(folder: Path) -> list[Row]:
    """Return the newest lines of solves of features in files."""
    identity = "classes", "dim", "present", "published", "queries"
    return newest("stream", *identity, folder=folder, defaults={"present": 0, "published": False})


def stream(folder: Path) -> str:
    """Tabulate solves of features that stay on disk."""
    rows = streamed(folder)
    if not rows:
        return "Not recorded yet: `python -m bench.speed.stream`."
    sizes, costs = ["N", "K", "classes that occur", "d"], ["time", "time a row", "peak", "planned"]
    head = [*sizes, "class cost", *costs, "features", "read"]
    kept = {True: "auto: kept", False: "auto: lifted", None: "off"}  # early lines had none
    cells = []
    for row in rows:
        for n, done in zip(row["queries"], row["sizes"], strict=True):
            present = f"{row['present']:,}" if row.get("present") else "all"
            cost = "off" if row.get("published") else kept[done.get("class_cost")]
            line = [f"{n:,}", f"{row['classes']:,}", present, str(row["dim"]), cost]
            line += [seconds(done["seconds"]), f"{1e6 * done['seconds'] / n:.0f} µs"]
            line += [size(done["peak_bytes"]), size(done["planned_bytes"])]
            times = done["read_bytes"] / done["feature_bytes"]
            cells.append([*line, size(done["feature_bytes"]), f"{times:.1f} times"])
    return "\n\n".join([plot("stream", "Time and memory"), table(head, cells), source(rows)])


def million(folder: Path) -> str:
    """Tabulate the hours of encoding, and the seconds of the search and of solves."""
    lines, used = list[list[str]](), list[Row]()
    for row in encodings(folder)[-1:]:
        hours = MILLION / row["median"]["encode"] / 3600
        model = row["options"]["model"]
        used.append(row)
        lines.append([f"encode with {model}, extrapolated from fewer images", f"{hours:.0f} hours"])
    for row in newest("graph", "case", folder=folder):
        if row["case"] == "million":
            used.append(row)
            lines.append([f"find neighbours, d = {row['dim']}", seconds(row["seconds"])])
    for row in streamed(folder):
        for queries, done in zip(row["queries"], row["sizes"], strict=True):
            if queries == MILLION and row.get("published") is False:
                used.append(row)
                occur = f", of which {row['present']} occur" if row["present"] else ""
                what = f"then label with {row['classes']:,} classes{occur}, d = {row['dim']}"
                lines.append([what, seconds(done["seconds"])])
    if not lines:
        return "Not recorded yet: `python -m bench.speed.stream`."
    return table(["a million images", "time"], lines) + "\n\n" + source(used)


BLOCKS = {"million": million, "stream": stream}
