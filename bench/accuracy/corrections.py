"""Corrections: what they gain by which rows are corrected, in points of accuracy over all rows.

On WHU-RS19 (three backbones, real text), Oxford Pets, DTD and Caltech101 (means of half of the
validation rows as text), 80 % of the queries in each draw. 20, 50 or 100 rows get their true class
and are solved again as known labels; rows are drawn at random, or chosen by an uncertainty of what
a result holds: alone, without neighbours of chosen ones ("apart"), or with the uncertainty of the
neighbours ("and dense"). What the corrected rows gain themselves and what spreads to others is told
apart. The choice that gains most on half of the sets is reported on the others. With --large
200,000 made rows.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench.accuracy.golden import accuracy
from bench.accuracy.known_labels import CHOOSING, Set, sets, solver
from bench.common import make_problem, record
from transclip_fast import TransCLIP

CORRECTED = (20, 50, 100)  # rows
SHARE = 0.8  # of the queries, in each draw
RANDOM = "at random"
LEAST_AGREEMENT = 0.05  # of neighbours: so that no uncertainty is beyond all others
MADE = 200_000, 1000, 256  # rows, classes, dimensions
Pairs = tuple[np.ndarray, np.ndarray]
Gains = dict[str, float]


def uncertainties(model: TransCLIP, pairs: Pairs) -> dict[str, np.ndarray]:
    """Return how uncertain each label is, (N,), by several parts of a result."""
    labels, z = model.transduction_, _largest(model.label_distributions_)
    text, (first, second) = model.zero_shot_confidences_, pairs
    agree = np.bincount(first, z[second] * (labels[first] == labels[second]), minlength=len(z))
    agree = np.maximum(agree / np.maximum(np.bincount(first, minlength=len(z)), 1), LEAST_AGREEMENT)
    return {
        "z": 1 - z,
        "zero-shot": 1 - text,
        "z and zero-shot": 1 - np.sqrt(z * text),
        "z and neighbours": 1 - np.sqrt(z * agree),
        "calibrated": 1 - model.calibrated_confidences_.astype(np.float64),
        "z and calibrated": 1 - np.sqrt(z * model.calibrated_confidences_),
        "z, zero-shot and neighbours": 1 - np.cbrt(z * text * agree),
    }


def _largest(z: Any) -> np.ndarray:
    """Return the largest entry of each row, (N,)."""
    largest = z.max(1)
    found: np.ndarray = np.asarray(largest.todense() if hasattr(largest, "todense") else largest)
    return found.ravel().astype(np.float64)


def apart(uncertain: np.ndarray, pairs: Pairs, n: int) -> np.ndarray:
    """Return the `n` most uncertain rows of which no two are neighbours, as far as there are."""
    first, second = pairs
    edges = np.searchsorted(first, np.arange(len(uncertain) + 1))
    near = np.zeros(len(uncertain), bool)
    chosen: list[int] = []
    late: list[int] = []
    for row in np.argsort(-uncertain, kind="stable").tolist():
        (late if near[row] else chosen).append(row)
        near[second[edges[row] : edges[row + 1]]] |= not near[row]
    return np.array([*chosen, *late][:n])


def dense(uncertain: np.ndarray, pairs: Pairs, n: int) -> np.ndarray:
    """
    Return `n` rows, each the one with the largest sum of its uncertainty and its neighbours'.

    A chosen row and its neighbours count no more, until nothing else counts.
    """
    first, second = pairs
    left, open_rows = uncertain.copy(), np.ones(len(uncertain), bool)
    chosen: list[int] = []
    while len(chosen) < n:
        scores = left + np.bincount(first, left[second], minlength=len(left))
        if not scores[open_rows].any():
            left = np.where(open_rows, uncertain, 0)
            continue
        row = int(np.where(open_rows, scores, -np.inf).argmax())
        chosen.append(row)
        open_rows[row] = False
        left[[row, *second[first == row]]] = 0
    return np.array(chosen)


def linked(neighbors: np.ndarray) -> Pairs:
    """Return the pairs of neighbours (N, k) in both directions, each once, sorted."""
    starts, places = (neighbors >= 0).nonzero()
    ends = neighbors[starts, places]
    both = np.concatenate([np.stack([starts, ends]), np.stack([ends, starts])], axis=1)
    first, second = np.unique(both, axis=1)
    return first, second


def orders(model: TransCLIP, draw: np.random.Generator) -> dict[str, np.ndarray]:
    """Return the rows that each choice corrects, the first first."""
    pairs, n = linked(model.graph_.neighbors), max(CORRECTED)
    found = {RANDOM: draw.permutation(len(model.transduction_))[:n]}
    for name, uncertain in uncertainties(model, pairs).items():
        found[name] = np.argsort(-uncertain, kind="stable")[:n]
        found[f"{name}, apart"] = apart(uncertain, pairs, n)
        found[f"{name}, and dense"] = dense(uncertain, pairs, n)
    return found


def measure(
    found: Set, draw: np.random.Generator, only: set[str] | None = None, **always: Any
) -> tuple[float, dict[tuple[int, str], Gains]]:
    """Return the accuracy without corrections, and by number and choice what corrections gain."""
    fit, labels = solver(found, **always), found.queries[1]
    none = fit()
    before = none.transduction_ == labels
    gains = {}
    for how, order in orders(none, draw).items():
        for n in CORRECTED if only is None or how in only else ():
            rows = order[:n]
            known = np.full(len(labels), -1)
            known[rows] = labels[rows]
            after = fit(known_labels=known).transduction_ == labels
            own = 100 * float((~before[rows]).sum()) / len(labels)
            total = 100 * float(after.sum() - before.sum()) / len(labels)
            gains[n, how] = {"gain": total, "own": own, "spread": total - own}
    return accuracy(none.transduction_, labels), gains


def draws(found: Set, n_draws: int) -> Iterator[tuple[Set, np.random.Generator]]:
    """Yield the set with some of its queries."""
    rows, labels = found.queries
    for seed in range(n_draws):
        draw = np.random.default_rng(seed)
        some = np.sort(draw.permutation(len(labels))[: round(SHARE * len(labels))])
        yield found._replace(queries=(rows[some], labels[some])), draw


def averaged(found: list[dict[tuple[int, str], Gains]]) -> dict[str, dict[str, Gains]]:
    """Return the means over draws by choice and number, and the least gain."""
    table: dict[str, dict[str, Gains]] = defaultdict(dict)
    for n, how in found[0]:
        some = [one[n, how] for one in found]
        table[how][str(n)] = {
            **{name: float(np.mean([x[name] for x in some])) for name in some[0]},
            "worst": min(x["gain"] for x in some),
        }
    return dict(table)


def best_choice(tables: dict[str, dict[str, dict[str, Gains]]]) -> str:
    """Return the choice that gains most on average over the choosing sets and numbers."""
    means: dict[str, list[float]] = defaultdict(list)
    for name, choices in tables.items():
        for how, numbers in choices.items():
            if name in CHOOSING and how != RANDOM:
                means[how] += [x["gain"] for x in numbers.values()]
    return max(means, key=lambda how: float(np.mean(means[how])))


def golden(n_draws: int, say: Callable[[str], None]) -> None:
    """Measure on the golden sets, and record."""
    tables, starts = {}, {}
    for one in sets():
        measured = [measure(some, draw) for some, draw in draws(one, n_draws)]
        tables[one.name] = averaged([gains for _, gains in measured])
        starts[one.name] = float(np.mean([start for start, _ in measured]))
        for how, numbers in tables[one.name].items():
            say(
                f"{one.name}, {how}: "
                + ", ".join(f"{n} {x['gain']:+.2f}" for n, x in numbers.items())
            )
    chosen = best_choice(tables)
    say(f"best on {', '.join(CHOOSING)}: {chosen}")
    row = {"part": "golden", "draws": n_draws, "chosen": chosen, "choosing": CHOOSING}
    record("corrections", {**row, "before": starts, "gains": tables})


def made(n_draws: int, choice: str, say: Callable[[str], None]) -> None:
    """Measure one choice, and a random one, on made rows, and record."""
    n_rows, n_classes, dim = MADE
    measured = []
    for seed in range(n_draws):
        problem = make_problem(n_rows, n_classes, dim, seed=seed)
        rows = problem.features, problem.labels
        one, draw = Set("made", problem.prototypes, rows, rows), np.random.default_rng(seed)
        measured.append(measure(one, draw, {RANDOM, choice}, assignments="sparse"))
    table = averaged([gains for _, gains in measured])
    for how, numbers in table.items():
        say(f"made, {how}: " + ", ".join(f"{n} {x['gain']:+.4f}" for n, x in numbers.items()))
    row = {"part": "made", "draws": n_draws, "chosen": choice, "queries": n_rows}
    start = float(np.mean([start for start, _ in measured]))
    shape = {"classes": n_classes, "dim": dim}
    record("corrections", {**row, **shape, "before": {"made": start}, "gains": {"made": table}})


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Measure, record and print; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--large", metavar="CHOICE", help="only this choice, on 200,000 made rows")
    options = parser.parse_args(arguments)
    if options.large:
        made(options.draws, options.large, say)
    else:
        golden(options.draws, say)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
