"""The table of few-shot heads, from the newest clean lines of `bench.accuracy.heads`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.names import FEATURES
from bench.tables import newest, source, table

ALLOWED_POINTS = 1.0  # of accuracy, between a head and its plain fit


def heads(folder: Path) -> str:
    """Tabulate heads alone and below TransCLIP."""
    rows = newest("heads", "features", "head", folder=folder)
    if not rows:
        return "Not recorded yet: `python -m bench.accuracy.heads`."
    sets = [name for name in FEATURES if any(row["features"] == name for row in rows)]
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        found = f"{row['alone']:.2f} → {row['with_transclip']:.2f}"
        cells.setdefault(row["head"], {})[row["features"]] = found
    head = ["head", *(FEATURES[name] for name in sets)]
    lines = [[name, *(found.get(x, "") for x in sets)] for name, found in sorted(cells.items())]
    zero_shot = {row["features"]: row["zero_shot"] for row in rows}
    text = "Accuracy of the head alone → of TransCLIP on top, with 16 shots; zero-shot has " + (
        ", ".join(f"{zero_shot[x]:.2f} on {FEATURES[x].split(',')[0]}" for x in sets) + "."
    )
    apart = [row for row in rows if abs(row["alone"] - row["plain"]) > ALLOWED_POINTS]
    if apart:
        text += " More than a point from the plain fit: " + ", ".join(
            f"{row['head']} on {FEATURES[row['features']].split(',')[0]}, {row['alone']:.2f} "
            f"against {row['plain']:.2f}"
            for row in apart
        )
        text += "."
    return "\n\n".join([text, table(head, lines), source(rows)])


BLOCKS: dict[str, Callable[[Path], str]] = {"heads": heads}
