"""How well `outlier_score_` finds images of classes whose name is missing.

On golden data (`TRANSCLIP_GOLDEN`): a third of the classes that occur lose their names, by the rule
and from the pools of `bench.accuracy.wild_scenarios`. The area under the ROC curve is the chance
that a row without a name scores higher than one with a name; 0.5 knows nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import rankdata

from bench.accuracy.wild import drawn
from bench.accuracy.wild_problems import Pool, own_lists, scaled
from bench.accuracy.wild_scenarios import SOFT, mixed, out_of_list
from bench.common import command_line, print_table, record
from transclip_fast import TransCLIP

DRAWS = 4  # from each pool


def area_under_roc(scores: np.ndarray, outside: np.ndarray) -> float:
    """Return the chance that a row outside (N,) scores (N,) higher than one that is not."""
    n_outside = outside.sum()
    ranks = rankdata(scores)[outside].sum() - n_outside * (n_outside + 1) / 2
    return float(ranks / (n_outside * (len(scores) - n_outside)))


def measure(pool: Pool) -> dict[str, float]:
    """Return the area of zero-shot's confidence and of the outlier score."""
    model = TransCLIP(device="cpu", logit_scale=pool.logit_scale)
    model.fit(pool.features, text_features=pool.prototypes)
    outside = pool.labels < 0
    return {
        "zero_shot": area_under_roc(-model.zero_shot_confidences_, outside),
        "outlier_score": area_under_roc(model.outlier_score_, outside),
    }


def pools() -> list[Pool]:
    """Return golden pools with real and made text, and with softer text."""
    return [*mixed(), *own_lists(), *scaled(own_lists(), SOFT)]


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Measure, record and print; the exit code."""
    command_line(__spec__, __doc__).parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for pool in pools():
        key = zlib.crc32(pool.name.encode())
        found = []
        for seed in range(DRAWS):
            rng = np.random.default_rng([key, seed])
            draw = out_of_list(pool.labels, len(pool.prototypes), rng)
            found.append(measure(drawn(pool, draw)))
        areas = {name: [round(x[name], 4) for x in found] for name in found[0]}
        rows.append({"pool": pool.name, "logit_scale": pool.logit_scale, "area": areas})
        record("outliers", rows[-1])
        say(pool.name)
    lines = [[row["pool"], *(f"{np.mean(x):.3f}" for x in row["area"].values())] for row in rows]
    print_table(["pool", "zero-shot", "outlier score"], lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
