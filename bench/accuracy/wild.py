"""Change against zero-shot on pools that are not what the method supposes.

TransCLIP supposes that all classes occur, about equally. Here few of them do, among names of other
sets, or the text is of little use: on golden data (`TRANSCLIP_GOLDEN`), by the rules of
`bench.accuracy.wild_scenarios`, and on made problems of 20,000 rows, or with `--large` of 200,000.
Beside the published method stand the default, the class cost throughout and, up to 5,000 rows,
StatA.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench.accuracy.golden import accuracy
from bench.accuracy.wild_problems import Pool, made
from bench.accuracy.wild_scenarios import (
    MADE,
    MADE_DRAWS,
    SCENARIOS,
    Draw,
    Scenario,
    made_family,
)
from bench.common import command_line, print_table, record
from bench.wild_tables import head, line
from transclip_fast import TransCLIP
from transclip_fast.graph.build import build_graph
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.methods import StatA

K = 3
DENSE_ROWS = 5000  # most for StatA, which is dense


def drawn(pool: Pool, draw: Draw) -> Pool:
    """Return the problem of a draw; the label of a row whose class has no name is -1."""
    place = np.full(len(pool.prototypes), -1)
    place[draw.names] = np.arange(len(draw.names))
    return pool._replace(
        features=pool.features[draw.rows],
        prototypes=pool.prototypes[draw.names],
        labels=place[pool.labels[draw.rows]],
    )


def by_stata(pool: Pool, graph: NeighborGraph) -> np.ndarray:
    """Return StatA's labels."""
    model = StatA(device="cpu", logit_scale=pool.logit_scale)
    return model.fit(pool.features, text_features=pool.prototypes, graph=graph).transduction_


def by_transclip(pool: Pool, graph: NeighborGraph, class_cost: bool | str) -> TransCLIP:
    """Return a fit."""
    model = TransCLIP(device="cpu", logit_scale=pool.logit_scale, class_cost=class_cost)
    return model.fit(pool.features, text_features=pool.prototypes, graph=graph)


def measure(pool: Pool) -> dict[str, Any]:
    """Return sizes, and the accuracy of each method on the rows whose class has a name."""
    graph = build_graph(pool.features, K)
    default = by_transclip(pool, graph, "auto")  # bit for bit one of the two
    charged = default.class_costs_ is not None
    other = by_transclip(pool, graph, not charged)
    found = {
        "zero_shot": default.zero_shot_labels_,
        "published": (other if charged else default).transduction_,
        "default": default.transduction_,
        "class_cost": (default if charged else other).transduction_,
    }
    if len(pool.features) <= DENSE_ROWS:
        found["stata"] = by_stata(pool, graph)
    listed = pool.labels >= 0
    accuracies = {x: accuracy(y[listed], pool.labels[listed]) for x, y in found.items()}
    return {
        "pool": pool.name,
        "queries": len(pool.features),
        "classes": len(pool.prototypes),
        "present": len(np.unique(pool.labels[listed])),
        "effective_classes": round(float(default.n_effective_classes_), 2),
        "charged": charged,
        "accuracy": {name: round(value, 2) for name, value in accuracies.items()},
    }


def in_columns(draws: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a list a key for what several draws found."""
    row: dict[str, Any] = {key: [draw[key] for draw in draws] for key in draws[0]}
    methods = draws[0]["accuracy"]
    return {**row, "accuracy": {x: [draw["accuracy"][x] for draw in draws] for x in methods}}


def problems(name: str, scenario: Scenario) -> Iterator[Pool]:
    """Yield the problem of every draw of a scenario, the same ones in every run."""
    for pool in scenario.pools():
        key = zlib.crc32(f"{name}, {pool.name}".encode())
        for seed in range(scenario.draws):
            rng = np.random.default_rng([key, seed])
            yield drawn(pool, scenario.rule(pool.labels, len(pool.prototypes), rng))


def made_problems(queries: int, n_classes: int, present: int, law: str) -> Iterator[Pool]:
    """Yield made problems of one size."""
    for seed in range(MADE_DRAWS[queries]):
        problem = made(queries, n_classes, present, law, seed)
        yield Pool(f"seed {seed}", problem.features, problem.prototypes, problem.labels)


def planned(large: bool) -> Iterator[tuple[str, str, Iterator[Pool]]]:
    """Yield family, name and problems of every scenario."""
    for family, scenarios in {} if large else SCENARIOS.items():
        for name, scenario in scenarios.items():
            yield family, name, problems(name, scenario)
    queries = max(MADE_DRAWS) if large else min(MADE_DRAWS)
    for name, sizes in MADE.items():
        yield made_family(queries), name, made_problems(queries, *sizes)


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Measure, record and print; the exit code."""
    parser = command_line(__spec__, __doc__)
    parser.add_argument("--large", action="store_true", help="made problems of 200,000 rows only")
    options = parser.parse_args(arguments)
    rows = []
    for family, name, pools in planned(options.large):
        row = {"family": family, "scenario": name, **in_columns([measure(x) for x in pools])}
        record("wild", row)
        rows.append(row)
        say(f"{family}: {name}")
    print_table(["scenario", *head()], [[row["scenario"], *line([row])] for row in rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
