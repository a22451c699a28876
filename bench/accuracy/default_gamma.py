"""TransCLIP-FS without validation rows: the gamma that is the default.

On six golden sets (`bench.accuracy.known_labels`), with 1, 2, 4, 8 and 16 shots of each class, in
three draws: a gamma of the published grid, and gammas with which a shot weighs a share of the mean
queries of a class, against no shots. Half of the sets choose the share, the table is of the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.accuracy.golden import accuracy, rows_of_each_class
from bench.accuracy.known_labels import CHOOSING, Set, sets, solver
from bench.common import command_line, print_table, record
from bench.wild_tables import GAMMA_HEAD, gamma_lines
from transclip_fast.solver import support
from transclip_fast.solver.parameters import GAMMAS

SHOTS, DRAWS = (1, 2, 4, 8, 16), 3
SHARES = (4, 8, 16, 32, 64)  # one of this many parts


def gammas(n_shots: int) -> dict[str, float]:
    """Return the gammas to try with so many shots of a class."""
    shares = {f"1/{x}": n_shots / (support.SUPPORT_SCALE * x) for x in SHARES}
    return shares | {f"gamma {x:g}": x for x in GAMMAS}


def measure(found: Set) -> dict[str, list[dict[str, float]]]:
    """Return by shots of a class the change in accuracy by each gamma, of every draw."""
    fit, labels, changes = solver(found), found.queries[1], defaultdict(list)
    before = accuracy(fit(class_cost=False).transduction_, labels)
    for n_shots in SHOTS:
        for seed in range(DRAWS):
            rows = rows_of_each_class(found.pool[1], (n_shots,), np.random.default_rng(seed))[0]
            if np.bincount(found.pool[1][rows]).min() < n_shots:
                continue  # the pool has fewer of some class
            given = {"support_features": found.pool[0][rows], "support_labels": found.pool[1][rows]}
            changes[str(n_shots)].append(
                {
                    name: round(accuracy(fit(gamma=x, **given).transduction_, labels) - before, 3)
                    for name, x in gammas(n_shots).items()
                }
            )
    return dict(changes)


def averaged(draws: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean change by each gamma."""
    return {name: round(float(np.mean([x[name] for x in draws])), 3) for name in draws[0]}


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Measure, record and print; the exit code."""
    command_line(__spec__, __doc__).parse_args(arguments)
    halves: dict[str, dict[str, list[dict[str, float]]]] = {
        half: defaultdict(list) for half in ("choosing", "held out")
    }
    for one in sets():
        half = halves["choosing" if one.name in CHOOSING else "held out"]
        for n_shots, draws in measure(one).items():
            half[n_shots] += draws
        say(one.name)
    means = {half: {x: averaged(draws) for x, draws in of.items()} for half, of in halves.items()}
    names = [name for name in gammas(1) if name.startswith("1/")]
    chosen = max(names, key=lambda name: sum(x[name] for x in means["choosing"].values()))
    row: dict[str, Any] = {"draws": DRAWS, "chosen": chosen, "means": means}
    record("default_gamma", row)
    say(f"chosen: {chosen}")
    print_table(GAMMA_HEAD, gamma_lines(row))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
