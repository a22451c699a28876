"""The tables of `bench.accuracy.corrections`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.accuracy.corrections import RANDOM
from bench.names import FEATURES
from bench.tables import Row, newest, source, table

NAMES = {
    **FEATURES,
    "caltech101_vitb32": "Caltech101, CLIP ViT-B/32",
    "made": "200,000 made rows",
}


def corrections(folder: Path) -> str:
    """Tabulate what each choice gains where it was chosen, and the chosen one on every set."""
    rows = newest("corrections", "part", folder=folder)
    if not rows:
        return "Not recorded yet: `python -m bench.accuracy.corrections`."
    golden = next(row for row in rows if row["part"] == "golden")
    sets = [(row, name) for row in rows for name in row["gains"]]
    parts = [
        "Mean gain on the choosing sets, in points.",
        _choices(golden),
        f"Gain of *{golden['chosen']}* and of random rows: points in all, of which the corrected "
        "rows themselves are the first and others the second part; and the worst draw.",
        table(_head(golden), [_line(row, name) for row, name in sets]),
    ]
    return "\n\n".join([*parts, source(rows)])


def _numbers(row: Row) -> list[str]:
    return [*next(iter(next(iter(row["gains"].values())).values()))]


def _choices(row: Row) -> str:
    """The mean over the choosing sets of each choice's gain, best first."""
    numbers, some = _numbers(row), [row["gains"][name] for name in row["choosing"]]
    means = {how: [np.mean([x[how][n]["gain"] for x in some]) for n in numbers] for how in some[0]}
    best = sorted(means, key=lambda how: -float(np.mean(means[how])))
    lines = [[how, *(f"{mean:+.2f}" for mean in means[how])] for how in best]
    return table(["rows corrected", *numbers], lines)


def _head(row: Row) -> list[str]:
    pairs = [f"{n} {how}" for n in _numbers(row) for how in ("chosen", "at random")]
    return ["set", "use", "without", *pairs]


def _line(row: Row, name: str) -> list[str]:
    choices = row["gains"][name]
    use = "choosing" if name in row.get("choosing", ()) else "held out"
    cells = [
        f"{gain['gain']:+.2f} = {gain['own']:.2f} {gain['spread']:+.2f}, {gain['worst']:+.2f}"
        for n in _numbers(row)
        for gain in (choices[row["chosen"]][n], choices[RANDOM][n])
    ]
    return [NAMES[name], use, f"{row['before'][name]:.2f}", *cells]


BLOCKS = {"corrections": corrections}
