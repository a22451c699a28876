"""Few labels: what known queries, few or uneven shots, and the class cost with shots change.

On WHU-RS19 (three backbones, real text), Oxford Pets, DTD and Caltech101 (means of half of the
validation rows as text), each with all of its classes and with five of them present, in points of
accuracy. The weight of a known row is chosen on half of the sets and reported on the others.

- known: 20, 50 or 100 queries, at random or the most uncertain, against none; accuracy of the rest
- shots: uneven shots, too few of some class, against none; TransCLIP-FS with the same shots beside
- cost: balanced shots with the class cost, against TransCLIP-FS
- made: known rows of made problems, N = 20,000, with --large 200,000 (half an hour)
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from bench.accuracy.golden import accuracy, golden_folder, rows_of_each_class
from bench.common import make_problem, record, unit_rows
from bench.names import FEATURES
from transclip_fast import TransCLIP, build_graph
from transclip_fast.solver.known import KNOWN_WEIGHT

WEIGHTS = (1, 3, 10)
GAMMAS = (0.002, 0.02, 0.2)
KNOWN_ROWS = (20, 50, 100)
QUERIES, POOL = 1500, 16  # rows; shots that there are of a class
PRESENT = {"all classes": None, "five classes": 5}
# Shots in all, or of a class: at least, and more on average.
PATTERNS: dict[str, int | tuple[int, float]] = {
    "20 in all": 20,
    "50 in all": 50,
    "0 or more": (0, 2.0),
    "1 or more": (1, 2.0),
    "2 or more": (2, 4.0),
    "4 or more": (4, 4.0),
}
CHOOSING = ("whurs19_clip_rn50", "dtd_vitb32", "oxford_pets_vitb32")
SETS = (*FEATURES, "caltech101_vitb32")
MADE = ((100, 256), (1000, 256))  # classes, dimensions
MADE_KNOWN_ROWS = (100, 1000)
Rows = tuple[np.ndarray, np.ndarray]  # features (n, d), labels (n,)
Means = dict[str, dict[str, float]]


class Set(NamedTuple):
    """Queries, a pool of labelled rows, and texts."""

    name: str
    texts: np.ndarray  # (K, d)
    queries: Rows
    pool: Rows


def sets() -> Iterator[Set]:
    """Yield the golden sets."""
    for name in SETS:
        draw = np.random.default_rng(0)
        with np.load(golden_folder() / f"{name}.npz", allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        if "image_features" in arrays:
            rows, labels = arrays["image_features"].astype(np.float32), arrays["labels"]
            pool = rows_of_each_class(labels, (POOL,), draw)[0]
            others = np.setdiff1d(np.arange(len(rows)), pool)
            texts = arrays["text_features"].astype(np.float32)
            queries = rows[others], labels[others]
            yield Set(name, texts, queries, (rows[pool], labels[pool]))
            continue
        held, labels = arrays["val_features"].astype(np.float32), arrays["val_labels"]
        half = np.concatenate([np.flatnonzero(labels == k)[::2] for k in range(labels.max() + 1)])
        means = [held[half][labels[half] == k].mean(0) for k in range(labels.max() + 1)]
        rest = np.setdiff1d(np.arange(len(held)), half)
        pooled = held[rest], labels[rest]
        if "shots16_features" in arrays:
            pooled = arrays["shots16_features"].astype(np.float32), arrays["shots16_labels"]
        some = draw.permutation(len(arrays["test_labels"]))[:QUERIES]
        queries = arrays["test_features"][some].astype(np.float32), arrays["test_labels"][some]
        yield Set(name, unit_rows(np.stack(means)), queries, (unit_rows(pooled[0]), pooled[1]))


def draws(found: Set, n_draws: int) -> Iterator[tuple[str, Set, np.random.Generator]]:
    """Yield the set with all classes and with five of them among its queries."""
    for present, n_classes in PRESENT.items():
        for seed in range(n_draws):
            draw = np.random.default_rng(seed)
            rows, labels = found.queries
            inside = np.isin(labels, draw.permutation(len(found.texts))[:n_classes])
            yield present, found._replace(queries=(rows[inside], labels[inside])), draw


def shots_of(pool: Rows, pattern: int | tuple[int, float], draw: np.random.Generator) -> np.ndarray:
    """Return the rows of uneven shots of a pool."""
    labels = pool[1]
    order = draw.permutation(len(labels))
    if isinstance(pattern, int):
        return order[:pattern]
    least, more = pattern
    numbers = least + draw.poisson(more, labels.max() + 1)
    return np.concatenate([order[labels[order] == k][:n] for k, n in enumerate(numbers)])


def solver(found: Set, **always: Any) -> Callable[..., TransCLIP]:
    """Return a function that fits the set's queries with other arrays, parameters and weights."""
    rows, graph = found.queries[0], build_graph(found.queries[0], device="cpu")

    def fit(weight: float = KNOWN_WEIGHT, **arrays: Any) -> TransCLIP:
        own = {x: arrays.pop(x) for x in ("gamma", "class_cost") if x in arrays}
        with mock.patch("transclip_fast.solver.state.KNOWN_WEIGHT", weight):
            model = TransCLIP(device="cpu", **always, **own)
            return model.fit(rows, found.texts, graph=graph, **arrays)

    return fit


def known(
    found: Set, draw: np.random.Generator, numbers: tuple[int, ...], **always: Any
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield which rows are known, and by weight how many more of the others are right."""
    fit, labels = solver(found, **always), found.queries[1]
    none = fit()
    orders = {
        "at random": draw.permutation(len(labels)),
        "most uncertain": np.argsort(none.zero_shot_confidences_, kind="stable"),
    }
    for n in (n for n in numbers if 2 * n <= len(labels)):
        for how, order in orders.items():
            rest = order[n:]
            given = np.full(len(labels), -1)
            given[order[:n]] = labels[order[:n]]
            before = accuracy(none.transduction_[rest], labels[rest])
            yield (
                f"{n} {how}",
                {
                    f"weight {w}": accuracy(
                        fit(w, known_labels=given).transduction_[rest], labels[rest]
                    )
                    - before
                    for w in WEIGHTS
                },
            )


def shots(found: Set, draw: np.random.Generator) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the pattern of the shots, and the change by each form against no shots."""
    fit, labels = solver(found), found.queries[1]
    before = accuracy(fit().transduction_, labels)
    for name, pattern in PATTERNS.items():
        rows = shots_of(found.pool, pattern, draw)
        given = {"support_features": found.pool[0][rows], "support_labels": found.pool[1][rows]}
        with mock.patch("transclip_fast.solver.problem.enough", return_value=False):
            models = {f"weight {w}": fit(w, **given) for w in WEIGHTS}
        models |= {f"gamma {x}": fit(gamma=x, **given) for x in GAMMAS}
        yield name, {x: accuracy(m.transduction_, labels) - before for x, m in models.items()}


def cost(found: Set, draw: np.random.Generator) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the number of shots, and the change by the class cost at each gamma."""
    fit, labels = solver(found), found.queries[1]
    for n in (1, 4):
        rows = rows_of_each_class(found.pool[1], (n,), draw)[0]
        given = {"support_features": found.pool[0][rows], "support_labels": found.pool[1][rows]}
        change = {}
        for gamma in GAMMAS:
            right = [
                accuracy(fit(gamma=gamma, class_cost=on, **given).transduction_, labels)
                for on in (True, False)
            ]
            change[f"gamma {gamma}"] = right[0] - right[1]
        yield f"{n} of each class", change


def averaged(found: dict[str, list[dict[str, float]]]) -> Means:
    """Return the mean of each figure."""
    return {
        key: {name: float(np.mean([x[name] for x in values])) for name in values[0]}
        for key, values in found.items()
    }


def best_weight(found: dict[str, list[dict[str, float]]]) -> int:
    """Return the weight that gains the most on average over all rows of the table."""
    means = averaged(found).values()
    return max(WEIGHTS, key=lambda w: sum(x[f"weight {w}"] for x in means))


def golden(n_draws: int, say: Callable[[str], None]) -> None:
    """Measure on the golden sets, and record."""
    parts = {"known": lambda x, d: known(x, d, KNOWN_ROWS), "shots": shots, "cost": cost}
    # By half of the sets, part and row of the table the changes in every draw.
    halves: dict[str, dict[str, dict[str, list[dict[str, float]]]]] = {
        half: {part: defaultdict(list) for part in parts} for half in ("choosing", "held out")
    }
    worst: dict[str, dict[str, float]] = defaultdict(dict)
    for one in sets():
        half = "choosing" if one.name in CHOOSING else "held out"
        own: dict[str, dict[str, list[dict[str, float]]]] = {x: defaultdict(list) for x in parts}
        for present, drawn, draw in draws(one, n_draws):
            for part, measure in parts.items():
                for what, change in measure(drawn, draw):
                    halves[half][part][f"{present}, {what}"].append(change)
                    own[part][f"{present}, {what}"].append(change)
        for part, table in own.items():
            worst[part][one.name] = min(
                x.get(f"weight {KNOWN_WEIGHT:g}", min(x.values())) for x in averaged(table).values()
            )
        say(f"{one.name}: lowest means { ({p: round(x[one.name], 2) for p, x in worst.items()}) }")
    chosen = best_weight({**halves["choosing"]["known"], **halves["choosing"]["shots"]})
    say(f"weight {chosen} is the best on {', '.join(CHOOSING)}")
    for part in parts:
        means = {half: averaged(halves[half][part]) for half in halves}
        record(
            "known_labels",
            {
                "part": part,
                "draws": n_draws,
                "chosen": chosen,
                "means": means,
                "worst": worst[part],
            },
        )
        for what, change in means["held out"].items():
            say(f"{part}: {what}: { ({x: round(v, 2) for x, v in change.items()}) }")


def made(n_rows: int, n_draws: int, say: Callable[[str], None]) -> None:
    """Measure on made problems in sparse form, and record."""
    for n_classes, dim in MADE:
        found: dict[str, list[dict[str, float]]] = defaultdict(list)
        for seed in range(n_draws):
            problem = make_problem(n_rows, n_classes, dim, seed=seed)
            rows = problem.features, problem.labels
            one = Set("made", problem.prototypes, rows, rows)
            draw = np.random.default_rng(seed)
            for what, change in known(one, draw, MADE_KNOWN_ROWS, assignments="sparse"):
                found[what].append(change)
        means = averaged(found)
        row = {"queries": n_rows, "classes": n_classes, "dim": dim, "draws": n_draws}
        record("known_labels", {"part": "made", **row, "means": {"held out": means}})
        for what, change in means.items():
            say(f"made, {row}: {what}: { ({x: round(v, 2) for x, v in change.items()}) }")


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Measure, record and print; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--queries", type=int, default=20_000, help="of made problems")
    parser.add_argument("--large", action="store_true", help="only made problems of 200,000 rows")
    options = parser.parse_args(arguments)
    if options.large:
        made(200_000, 1, say)
        return 0
    golden(options.draws, say)
    made(options.queries, 1, say)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
