"""What a million images take, from the lines of several measurements."""

from __future__ import annotations

from pathlib import Path

from bench.tables import Row, encodings, newest, seconds, source, streamed, table

MILLION = 10**6


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


BLOCKS = {"million": million}
