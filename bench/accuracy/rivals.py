"""Every method beside TransCLIP: where it wins, and where it does not.

On golden data (`TRANSCLIP_GOLDEN`), three draws of each setting. Zero-shot: WHU-RS19 by three
backbones, as many images of each class, a long tail, and 5 of its 19 classes, settings as
published. Few-shot: 1, 4 and 16 shots of a class, on WHU-RS19 with its text, on Oxford Pets, DTD
and Caltech101 without any; as many validation rows of a class, at most 4, choose the settings, over
the published grids but for `THINNED`. The recorded lines have what was chosen, and of how many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from bench.accuracy import wild
from bench.accuracy.golden import accuracy, rows_of_each_class
from bench.accuracy.wild_problems import arrays, whurs19
from bench.accuracy.wild_scenarios import Draw, Rule, Scenario, long_tail, of_classes
from bench.common import command_line, record
from transclip_fast import TransCLIP
from transclip_fast.graph.build import build_graph
from transclip_fast.methods import METHODS, Method

DRAWS = 3
SHOTS = (1, 4, 16)  # of a class
MOST_VALIDATION = 4  # rows of a class
N_NEIGHBORS = 10  # the most of any grid
ZERO_SHOT, WITH_TEXT, WITHOUT_TEXT = "zero-shot", "shots and text", "shots alone"
SETS = {"oxford_pets": "shots16", "dtd": "val", "caltech101": "shots16"}  # where shots come from
# Values of the published grids that are tried: all of them would take hours.
THINNED: dict[str, dict[str, tuple[float, ...]]] = {
    "tim-adm": {"shots_weight": (0.1,), "entropy_weight": (0.1,)},
    "alpha-tim": {"alpha": (2.0, 7.0)},
    "transductive-finetuning": {"max_iter": (25,)},
}
TRANSCLIP = "transclip"
ON_LR, UNCHARGED = f"{TRANSCLIP} on logistic-regression", f"{TRANSCLIP} without class cost"


class Task(NamedTuple):
    """The arguments of `fit` but the graph, and the true labels (N,) of the rows."""

    pool: str
    arguments: dict[str, np.ndarray]
    labels: np.ndarray


class Arm(NamedTuple):
    """A method, and what it learns the classes from."""

    method: str
    text: str


def balanced(labels: np.ndarray, n_names: int, rng: np.random.Generator) -> Draw:
    """Draw as many rows of each class as the smallest has."""
    (rows,) = rows_of_each_class(labels, (int(np.bincount(labels).min()),), rng)
    return Draw(np.sort(rows), np.arange(n_names))


def zero_shot_tasks(name: str, rule: Rule) -> Iterator[Task]:
    """Yield WHU-RS19 without shots."""
    for pool in wild.problems(name, Scenario(rule, whurs19, DRAWS)):
        found = {"X": pool.features, "text_features": pool.prototypes}
        yield Task(pool.name, found, pool.labels)


def sizes(shots: int) -> tuple[int, int]:
    """Return the numbers of shots and of validation rows of a class."""
    return shots, min(shots, MOST_VALIDATION)


def tasks_with_text(shots: int) -> Iterator[Task]:
    """Yield WHU-RS19 with its text; rows that are drawn are no queries."""
    for pool in whurs19():
        for seed in range(DRAWS):
            drawn = rows_of_each_class(pool.labels, sizes(shots), np.random.default_rng(seed))
            queries = np.setdiff1d(np.arange(len(pool.labels)), np.concatenate(drawn))
            found = {"X": pool.features[queries], "text_features": pool.prototypes}
            for use, rows in zip(("support", "validation"), drawn, strict=True):
                found |= labelled(use, pool.features, pool.labels, rows)
            yield Task(pool.name, found, pool.labels[queries])


def tasks_without_text(name: str, shots: int) -> Iterator[Task]:
    """Yield one of `SETS`; shots, validation rows and queries are different images."""
    parts = {
        part: arrays(f"{name}_vitb32", f"{part}_features", f"{part}_labels")
        for part in ("test", "val", SETS[name])
    }
    (queries, truth), others, pool = (parts[part] for part in ("test", "val", SETS[name]))
    few = sizes(shots)
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        if pool is others:
            support, validation = rows_of_each_class(others[1], few, rng)
        else:
            (support,) = rows_of_each_class(pool[1], few[:1], rng)
            (validation,) = rows_of_each_class(others[1], few[1:], rng)
        found = {"X": queries} | labelled("support", pool[0], pool[1], support)
        found |= labelled("validation", others[0], others[1], validation)
        yield Task(name, found, truth)


def labelled(
    use: str, features: np.ndarray, labels: np.ndarray, rows: np.ndarray
) -> dict[str, np.ndarray]:
    """Return rows as arguments of `fit`."""
    return {f"{use}_features": features[rows], f"{use}_labels": labels[rows]}


def settings() -> dict[tuple[str, str], Callable[[], Iterator[Task]]]:
    """Return the tasks of each family and setting."""
    rules = {"balanced": balanced, "long tail": long_tail, "5 of 19 classes": of_classes(5, 5)}
    found: dict[tuple[str, str], Callable[[], Iterator[Task]]] = {
        (ZERO_SHOT, name): partial(zero_shot_tasks, name, rule) for name, rule in rules.items()
    }
    for shots in SHOTS:
        found[WITH_TEXT, f"{shots}"] = partial(tasks_with_text, shots)
    for name in SETS:
        for shots in SHOTS:
            found[WITHOUT_TEXT, f"{name}, {shots}"] = partial(tasks_without_text, name, shots)
    return found


def thinned(cls: type[Method]) -> type[Method]:
    """Return a method with the grid that is tried here."""
    values = THINNED.get(cls.name, {})
    grid = {k: replace(s, values=values.get(k, s.values)) for k, s in cls.grid.items()}
    return type(cls.__name__, (cls,), {"grid": grid})


def arms(*, texts: bool, shots: bool) -> list[Arm]:
    """Return the methods that such arrays allow, as published, and with texts as one more shot."""
    found = []
    for name, cls in METHODS.items():
        published = cls.possible_anchors(texts=texts, shots=shots)
        if published is not None:
            found.append(Arm(name, published))
        if texts and shots and "both" in cls.kinds and published != "both":
            found.append(Arm(name, "both"))
    return found


def found_by(model: TransCLIP | Method, labels: np.ndarray, before: int = 0) -> dict[str, Any]:
    """Return accuracy, settings chosen and runs, with `before` runs of a method below this one."""
    chosen = model.chosen_
    return {
        "accuracy": round(accuracy(model.transduction_, labels), 4),
        "chosen": chosen.values if chosen.runs > 1 else {},
        "runs": chosen.runs + before,
        "assumes_balanced": isinstance(model, Method) and model.assumes_balanced,
    }


def measure(task: Task) -> dict[Arm, dict[str, Any]]:
    """Return what each method finds."""
    graph = build_graph(task.arguments["X"], N_NEIGHBORS)
    given: dict[str, Any] = {**task.arguments, "graph": graph}
    texts, shots = (f"{use}_features" in given for use in ("text", "support"))
    models = {
        arm: thinned(METHODS[arm.method])(anchors=arm.text, device="cpu").fit(**given)
        for arm in arms(texts=texts, shots=shots)
    }
    found = {arm: found_by(model, task.labels) for arm, model in models.items()}

    def add(arm: Arm, before: int = 0, *, class_cost: bool | str = "auto", **prior: Any) -> None:
        model = TransCLIP(device="cpu", class_cost=class_cost).fit(**given, **prior)
        found[arm] = found_by(model, task.labels, before)

    if texts:
        add(Arm(TRANSCLIP, "both" if shots else "texts"))
        if not shots:
            add(Arm(UNCHARGED, "texts"), class_cost=False)
    else:
        regression = models[Arm("logistic-regression", "shots")]
        z = regression.label_distributions_
        add(Arm(TRANSCLIP, "shots"), prior=np.full_like(z, 1 / z.shape[1]))
        add(Arm(ON_LR, "shots"), regression.chosen_.runs, prior=z)
    return found


def in_columns(tasks: Iterator[Task]) -> dict[str, Any]:
    """Return a list a key for what several draws found."""
    pools, queries, draws = [], [], []
    for task in tasks:
        pools.append(task.pool)
        queries.append(len(task.labels))
        draws.append(measure(task))
    methods = [
        {**arm._asdict(), **{key: [draw[arm][key] for draw in draws] for key in draws[0][arm]}}
        for arm in draws[0]
    ]
    return {"pool": pools, "queries": queries, "methods": methods}


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Measure, record and print; the exit code."""
    parser = command_line(__spec__, __doc__)
    families = [ZERO_SHOT, WITH_TEXT, WITHOUT_TEXT]
    parser.add_argument("--families", nargs="+", choices=families, default=families)
    options = parser.parse_args(arguments)
    for (family, name), tasks in settings().items():
        if family not in options.families:
            continue
        row = {"family": family, "setting": name, **in_columns(tasks())}
        record("rivals", row)
        say(f"{family}: {name}")
        for done in row["methods"]:
            mean = np.mean(done["accuracy"])
            say(f"  {mean:6.2f}  {done['method']}, {done['text']}, {max(done['runs'])} tried")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
