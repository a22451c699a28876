"""The scenarios of `bench.accuracy.wild`: rows of few classes, uneven sizes, missing names.

Each is a rule that takes rows and names of a pool, drawn several times from each of some pools.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bench.accuracy.wild_problems import (
    Pool,
    all_sets,
    among_lvis,
    long_lists,
    own_lists,
    poor_prompts,
    scaled,
    single_prompts,
    textures,
    weak_texts,
    whurs19,
)

BATCH = 64  # rows, as in StatA's protocol
TAIL = 50  # rows of the largest class for one of the smallest
CONCENTRATION = 0.2  # of the Dirichlet distribution of class sizes
UNLISTED = 1 / 3  # of the classes that occur lose their names
ROWS = 1500  # of one set: fewer than the smallest has, so that draws differ
ROWS_OF_ALL = 2000
SOFT = 30.0  # tau, beside the usual 100
FEW = "Few of the classes occur"
FINE = "Fine-grained classes in a long list"
PROMPTS = "WHU-RS19, single prompts"
WEAK = "Weak text"


class Draw(NamedTuple):
    """Some rows of a pool, and the names that are offered for them."""

    rows: np.ndarray  # in order
    names: np.ndarray  # in order


# Labels (N,) of a pool, the number of names K, and a generator.
Rule = Callable[[np.ndarray, int, np.random.Generator], Draw]


class Scenario(NamedTuple):
    """A rule, and the pools that it draws from."""

    rule: Rule
    pools: Callable[[], list[Pool]]
    draws: int  # from each pool


def of_classes(low: int, high: int, rows: int | None = None) -> Rule:
    """Return a rule: `low` to `high` classes, of them at most `rows` rows."""

    def draw(labels: np.ndarray, n_names: int, rng: np.random.Generator) -> Draw:
        present = np.unique(labels)
        number = min(int(rng.integers(low, high + 1)), len(present))
        chosen = rng.permutation(present)[:number]
        inside = np.flatnonzero(np.isin(labels, chosen))
        return Draw(np.sort(rng.permutation(inside)[:rows]), np.arange(n_names))

    return draw


def sample(rows: int | None = None) -> Rule:
    """Return a rule: at most `rows` rows at random, of whatever class."""

    def draw(labels: np.ndarray, n_names: int, rng: np.random.Generator) -> Draw:
        return Draw(np.sort(rng.permutation(len(labels))[:rows]), np.arange(n_names))

    return draw


def half(labels: np.ndarray, n_names: int, rng: np.random.Generator) -> Draw:
    """Draw all rows of half the classes."""
    number = len(np.unique(labels)) // 2
    return of_classes(number, number)(labels, n_names, rng)


def sized(labels: np.ndarray, kept: np.ndarray, n_names: int, rng: np.random.Generator) -> Draw:
    """Draw of each class that occurs the share `kept` of its rows, rounded to the next."""
    parts = []
    for label, share in zip(np.unique(labels), kept, strict=True):
        rows = rng.permutation(np.flatnonzero(labels == label))
        parts.append(rows[: round(share * len(rows))])
    return Draw(np.sort(np.concatenate(parts)), np.arange(n_names))


def dirichlet(labels: np.ndarray, n_names: int, rng: np.random.Generator) -> Draw:
    """Draw class sizes from a Dirichlet distribution; the largest class keeps all its rows."""
    sizes = rng.dirichlet(np.full(len(np.unique(labels)), CONCENTRATION))
    return sized(labels, sizes / sizes.max(), n_names, rng)


def long_tail(labels: np.ndarray, n_names: int, rng: np.random.Generator) -> Draw:
    """Draw shares of the rows that fall evenly, on a logarithmic scale, from 1 to 1 / TAIL."""
    kept = TAIL ** -np.linspace(0, 1, len(np.unique(labels)))
    return sized(labels, rng.permutation(kept), n_names, rng)


def out_of_list(labels: np.ndarray, n_names: int, rng: np.random.Generator) -> Draw:
    """Draw all rows, without the names of some classes that occur."""
    present = np.unique(labels)
    missing = rng.permutation(present)[: round(UNLISTED * len(present))]
    return Draw(np.arange(len(labels)), np.setdiff1d(np.arange(n_names), missing))


def mixed() -> list[Pool]:
    """Return the pools of the first family: good, poor and made text, and a list of 1,203 names."""
    return [*whurs19(), *poor_prompts(), *textures(), *among_lvis()]


def few(rule: Rule, draws: int = 4) -> Scenario:
    """Return a scenario of the first family."""
    return Scenario(rule, mixed, draws)


def fine(rule: Rule, pools: Callable[[], list[Pool]], draws: int) -> dict[str, Scenario]:
    """Return a scenario of the second family with tau 100, and with a softer text."""
    return {
        "": Scenario(rule, pools, draws),
        f", tau {SOFT:g}": Scenario(rule, lambda: scaled(pools(), SOFT), draws),
    }


FINE_RULES = {
    "one set in 184 classes": fine(sample(ROWS), long_lists, 3),
    "5 of 184 classes": fine(of_classes(5, 5, ROWS_OF_ALL), all_sets, 6),
    "50 of 184 classes": fine(of_classes(50, 50, ROWS_OF_ALL), all_sets, 6),
    "184 of 184 classes": fine(sample(ROWS_OF_ALL), all_sets, 3),
    "each set, its own list": fine(sample(ROWS), own_lists, 3),
}
SCENARIOS: dict[str, dict[str, Scenario]] = {
    FEW: {
        "all": few(sample(), 1),
        "1 class, 64 rows": few(of_classes(1, 1, BATCH)),
        "1 to 4 classes, 64 rows": few(of_classes(1, 4, BATCH)),
        "2 to 10 classes, 64 rows": few(of_classes(2, 10, BATCH)),
        "5 to 25 classes, 64 rows": few(of_classes(5, 25, BATCH)),
        "64 rows at random": few(sample(BATCH)),
        "2 to 5 classes, all rows": few(of_classes(2, 5)),
        "half the classes": few(half),
        "Dirichlet sizes": few(dirichlet),
        "long tail": few(long_tail),
        "a third of the names missing": few(out_of_list),
    },
    FINE: {
        name + soft: scenario
        for name, both in FINE_RULES.items()
        for soft, scenario in both.items()
    },
    PROMPTS: {
        "all": Scenario(sample(), single_prompts, 1),
        **{
            f"{n} of 19 classes": Scenario(of_classes(n, n), single_prompts, 1)
            for n in (10, 5, 2, 1)
        },
        "2 classes, 64 rows": Scenario(of_classes(2, 2, BATCH), single_prompts, 1),
        "64 rows at random": Scenario(sample(BATCH), single_prompts, 1),
    },
    WEAK: {
        "all classes": Scenario(sample(), weak_texts, 1),
        "200 rows at random": Scenario(sample(200), weak_texts, 2),
        "half the classes": Scenario(half, weak_texts, 2),
        "2 to 5 classes": Scenario(of_classes(2, 5), weak_texts, 2),
        "Dirichlet sizes": Scenario(dirichlet, weak_texts, 2),
    },
}

LAWS = ("Dirichlet", "power law")  # of class sizes in made problems
MADE = {
    f"{present:,} of {n_classes:,} classes, {law}": (n_classes, present, law)
    for n_classes, present in ((100, 5), (1000, 20), (1000, 200), (1000, 1000))
    for law in LAWS
}
MADE_DRAWS = {20_000: 2, 200_000: 1}  # by the number of rows


def made_family(queries: int) -> str:
    """Return the name of the made problems of one size."""
    return f"Made problems, {queries:,} rows"


FAMILIES: dict[str, list[str]] = {
    **{family: list(scenarios) for family, scenarios in SCENARIOS.items()},
    **{made_family(queries): list(MADE) for queries in MADE_DRAWS},
}
