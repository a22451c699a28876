"""Is the text prediction better if images and texts are centred by their means first?

On golden data (`TRANSCLIP_GOLDEN`). CLIP's images and texts lie in two cones apart, the modality
gap; centring takes both means away before the products. The mean text cancels in the softmax over
classes, so that what centring does is take from each class its mean logit over the images: classes
that all images seem to be like lose. "Unit rows" makes the centred rows unit rows again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.accuracy.golden import accuracy
from bench.accuracy.wild import in_columns, problems
from bench.accuracy.wild_problems import Pool, among_lvis, own_lists, single_prompts, whurs19
from bench.accuracy.wild_scenarios import BATCH, Scenario, half, long_tail, of_classes, sample
from bench.common import command_line, print_table, record, unit_rows
from transclip_fast import TransCLIP
from transclip_fast.graph.build import build_graph

K = 3


def with_text() -> list[Pool]:
    """Return the pools with the text of an average prompt."""
    return [*whurs19(), *among_lvis()]


SCENARIOS = {
    "all classes, average prompt": Scenario(sample(), with_text, 1),
    "all classes, single prompts": Scenario(sample(), single_prompts, 1),
    "all classes, validation means as text": Scenario(sample(), own_lists, 1),
    "long tail": Scenario(long_tail, with_text, 4),
    "half the classes": Scenario(half, with_text, 4),
    "1 to 4 classes, 64 rows": Scenario(of_classes(1, 4, BATCH), with_text, 4),
}


def plain(features: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    """Return cosines (N, K)."""
    found: np.ndarray = features @ prototypes.T
    return found


def centred(features: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    """Return products (N, K) of rows less their mean."""
    return plain(features - features.mean(0), prototypes - prototypes.mean(0))


def centred_unit(features: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    """Return cosines (N, K) of rows less their mean."""
    rows, texts = features - features.mean(0), prototypes - prototypes.mean(0)
    return plain(unit_rows(rows), unit_rows(texts))


PRIORS = {"as it is": plain, "centred": centred, "centred, unit rows": centred_unit}


def measure(pool: Pool) -> dict[str, Any]:
    """Return the accuracies in percent of the prediction of every prior, and of TransCLIP on it."""
    rows, texts = pool.features.astype(np.float64), pool.prototypes.astype(np.float64)
    graph = build_graph(pool.features, min(K, len(rows) - 1), search="exact")
    found: dict[str, float] = {}
    for name, prior in PRIORS.items():
        logits = pool.logit_scale * prior(rows, texts)
        found[f"{name}: zero-shot"] = accuracy(logits.argmax(1), pool.labels)
        model = TransCLIP(device="cpu", n_neighbors=graph.n_neighbors)
        model.fit(pool.features, prior_logits=logits.astype(np.float32), graph=graph)
        found[f"{name}: TransCLIP"] = accuracy(model.transduction_, pool.labels)
    return {"pool": pool.name, "accuracy": found}


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Measure, record and print; the exit code."""
    command_line(__spec__, __doc__).parse_args(arguments)
    lines = []
    for name, scenario in SCENARIOS.items():
        row = in_columns([measure(pool) for pool in problems(name, scenario)])
        record("centred_prior", {"scenario": name, **row})
        lines.append([name, *(f"{np.mean(x):.2f}" for x in row["accuracy"].values())])
        say(name)
    print_table(["scenario", *row["accuracy"]], lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
