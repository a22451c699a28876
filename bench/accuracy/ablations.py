"""What each part of the method is worth: accuracy with one part changed at a time.

On golden data (`TRANSCLIP_GOLDEN`). Every variant is the same solver with another parameter, or
with a graph without edges. The paper's own formulas (arXiv:2406.01837, section 3) weigh the mixture
by 1, take plain means, and add the neighbours' z times max(0, cosine); the published code, our
default, weighs the mixture by 1/50, keeps means on the sphere and averages both directions of an
edge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from bench.accuracy.golden import effects, problems
from bench.common import record
from bench.tables import table
from transclip_fast import TransCLIP
from transclip_fast.graph.build import build_graph
from transclip_fast.graph.neighbor_graph import NeighborGraph

K = 3
PAPER = {"likelihood_weight": 1.0, "unit_means": False, "clamp_similarity": True}
Edges = Callable[[NeighborGraph], NeighborGraph]


def as_is(graph: NeighborGraph) -> NeighborGraph:
    """Return the graph itself."""
    return graph


def no_edges(graph: NeighborGraph) -> NeighborGraph:
    """Return as many rows without neighbours."""
    missing = np.full_like(graph.neighbors, -1)
    return NeighborGraph(missing, np.zeros_like(graph.similarities), {"method": "none"})


def summed(graph: NeighborGraph) -> NeighborGraph:
    """Return k times the weights: the directed graph divides by k, so that the sum of W remains."""
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
    """Return accuracy in percent and share of changed labels of zero-shot and every variant."""
    graph = build_graph(features.astype(np.float32), K, search="exact")
    found: dict[str, np.ndarray] = {}
    for name, (parameters, edges) in VARIANTS.items():
        model = TransCLIP(device="cpu", **parameters)
        model.fit(features, text_features=prototypes, graph=edges(graph))
        found.setdefault("zero-shot", model.zero_shot_labels_)
        found[name] = model.transduction_
    return effects(found, labels)


def summary(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return a Markdown table: a line a variant, a column a data set, and the mean."""
    rows = []
    for variant in next(iter(found.values())):
        values = [effect[variant]["accuracy"] for effect in found.values()]
        rows.append([variant, *(f"{value:.2f}" for value in [*values, float(np.mean(values))])])
    return table(["", *found, "mean"], rows)


def main(say: Callable[[str], None] = print) -> int:
    """Measure, record and print; the exit code."""
    found = {}
    for name, features, prototypes, labels, _ in problems():
        found[name] = measure(features, prototypes, labels)
        record("ablations", {"features": name, "queries": len(features), "variants": found[name]})
    say(summary(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
