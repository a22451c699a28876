"""What each part of the method is worth: accuracy with one part changed at a time.

On golden data (`TRANSCLIP_GOLDEN`), as `bench.graph_labels` loads it: WHU-RS19 with its texts, Pets
and DTD with validation means as prototypes. Every variant is the same solver with another
parameter, or with a graph without edges. The paper's own formulas (arXiv:2406.01837, section 3)
weigh the mixture by 1, take plain means, and add the neighbours' z times max(0, cosine), where the
published code, our default, weighs by 1/50, keeps means on the sphere and averages both directions
of an edge.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import record
from bench.graph_labels import FEATURES, load
from transclip_fast import TransCLIP
from transclip_fast.graph.build import build_graph
from transclip_fast.types import NeighborGraph

K = 3
PAPER = {"likelihood_weight": 1.0, "unit_means": False, "clamp_similarity": True}
Edges = Callable[[NeighborGraph], NeighborGraph]


def as_is(graph: NeighborGraph) -> NeighborGraph:
    """The graph itself."""
    return graph


def no_edges(graph: NeighborGraph) -> NeighborGraph:
    """As many rows, and no neighbours."""
    missing = np.full_like(graph.neighbors, -1)
    return NeighborGraph(missing, np.zeros_like(graph.similarities), {"method": "none"})


def summed(graph: NeighborGraph) -> NeighborGraph:
    """Weights that the directed form, W / k, turns back into W."""
    return replace(graph, similarities=graph.similarities * graph.n_neighbors)


VARIANTS: dict[str, tuple[dict[str, Any], Edges]] = {
    "default": ({}, as_is),
    "lambda = 0, no KL": ({"kl_weight": 0.0}, as_is),
    "lambda = 0.5": ({"kl_weight": 0.5}, as_is),
    "no graph": ({}, no_edges),
    "no mixture": ({"likelihood_weight": 0.0}, as_is),
    "fixed means": ({"update_means": False}, as_is),
    "fixed variance": ({"update_variance": False}, as_is),
    "fixed means and variance": ({"update_means": False, "update_variance": False}, as_is),
    "isotropic variance": ({"covariance": "isotropic"}, as_is),
    "paper: mixture weighs 1": ({"likelihood_weight": 1.0}, as_is),
    "paper: plain means": ({"unit_means": False}, as_is),
    "paper: W z": ({"clamp_similarity": True, "graph_mode": "directed"}, summed),
    "paper: all three": ({**PAPER, "graph_mode": "directed"}, summed),
    "1 sweep a step": ({"inner_iter": 1}, as_is),
    "1 step": ({"max_iter": 1}, as_is),
    "5 steps": ({"max_iter": 5}, as_is),
    "20 steps": ({"max_iter": 20}, as_is),
}


def measure(
    features: np.ndarray, prototypes: np.ndarray, labels: np.ndarray
) -> dict[str, dict[str, float]]:
    """Accuracy in percent of zero-shot and every variant, and the share of labels changed."""
    graph = build_graph(features.astype(np.float32), K, method="exact")
    rows: dict[str, dict[str, float]] = {}
    expected = None
    for name, (parameters, edges) in VARIANTS.items():
        model = TransCLIP(device="cpu", **parameters)
        model.fit(features, text_features=prototypes, graph=edges(graph))
        if expected is None:
            expected = model.transduction_
            zero_shot = model.zero_shot_labels_
            rows["zero-shot"] = {
                "accuracy": 100 * float((zero_shot == labels).mean()),
                "changed": float((zero_shot != expected).mean()),
            }
        rows[name] = {
            "accuracy": 100 * float((model.transduction_ == labels).mean()),
            "changed": float((model.transduction_ != expected).mean()),
        }
    return rows


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: a line a variant, a column a data set, and the mean."""
    lines = [
        "| | " + " | ".join(found) + " | mean |",
        "|---|" + "---|" * (len(found) + 1),
    ]
    for variant in next(iter(found.values())):
        values = [rows[variant]["accuracy"] for rows in found.values()]
        cells = " | ".join(f"{value:.2f}" for value in [*values, float(np.mean(values))])
        lines.append(f"| {variant} | {cells} |")
    return "\n".join(lines)


def main(say: Callable[[str], None] = print) -> int:
    """Measure, record and print; the exit code."""
    folder = Path(os.environ["TRANSCLIP_GOLDEN"])
    found = {}
    for name in FEATURES:
        features, prototypes, labels, _ = load(folder / f"{name}.npz")
        found[name] = measure(features, prototypes, labels)
        record("ablations", {"features": name, "queries": len(features), "variants": found[name]})
    say(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
