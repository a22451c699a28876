"""ZLaP: labels of texts, spread over the graph of the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from transclip_fast.data.checks import as_tensor
from transclip_fast.methods.base import Answer, Grid, Method, Setting, Values
from transclip_fast.methods.label_graph import (
    as_distributions,
    nearest_labelled,
    normalised,
    spread_bytes,
    spread_labels,
)
from transclip_fast.methods.task import Arrays, Task

TOLERANCE = 1e-7  # what is left of a label after the last sweep


class ZLaP(Method):
    """
    Label propagation: Z = (I - alpha M)^(-1) Y over rows and labelled nodes.

    The nodes are the N rows and the K texts. Each row has edges to its nearest rows, of weight
    max(0, cosine), and to its nearest texts, of weight max(0, cosine)^gamma; G are these edges,
    M = D^(-1/2) (G + G^T) D^(-1/2) with D the row sums of G + G^T, and Y has a 1 for each text at
    its class. The answer is the largest entry of a row of Z.

    Z <- alpha M Z + Y leaves an error of alpha^t after t sweeps, one pass for all classes, where
    the published code runs up to 50 steps of conjugate gradients for each class. It counts a row
    among its own neighbours and then leaves it out: its 5 neighbours are 4 here. Shots as labelled
    nodes, anchors "shots" and "both", are not in the paper; edges to them weigh as those to texts.

    One (N, K) array, that of the answer, and the columns of 256 classes twice: 10 million rows and
    1,000 classes take 60 GB.

    Parameters
    ----------
    n_neighbors : int
        Nearest rows of a row.
    n_labels : int
        Nearest labelled nodes of a row, at most as many as there are.
    gamma : float
        Of the edges to labelled nodes.
    alpha : float
        Below 1.

    References
    ----------
    Stojnic, Kalantidis, Tolias. Label Propagation for Zero-shot Classification with
    Vision-Language Models. CVPR 2024.
    """

    name = "zlap"
    kinds = ("texts", "shots", "both")
    matrices = 1
    grid: ClassVar[Grid] = {
        "n_neighbors": Setting(4, least=1, most=1000, whole=True),
        "n_labels": Setting(5, least=1, whole=True),
        "gamma": Setting(5.0),
        "alpha": Setting(0.3, most=0.99),
    }

    def other_bytes(self, arrays: Arrays, run: Mapping[str, Any]) -> int:
        edges = min(run["n_labels"], arrays.n_labelled(self.anchors))
        graph = spread_bytes(len(arrays.features), arrays.n_classes, edges)
        return super().other_bytes(arrays, run) + graph

    def solve(self, task: Task, s: Values) -> Answer:
        graph, labelled = task.graph(s.n_neighbors), task.labelled
        neighbors, cosines = (
            as_tensor(x, "graph").to(task.device) for x in (graph.neighbors, graph.similarities)
        )
        ids, similarities = nearest_labelled(task.features, labelled.features, s.n_labels)
        n_rows = len(task.features)
        lists = [((neighbors, cosines), 1.0), ((ids + n_rows, similarities), s.gamma)]
        matrix = normalised(lists, n_rows + len(labelled))
        sweeps = max(1, math.ceil(math.log(TOLERANCE) / math.log(s.alpha))) if s.alpha else 1
        z = spread_labels(
            matrix, labelled.labels, task.n_classes, alpha=s.alpha, sweeps=sweeps, clamped=False
        )
        task.progress(1, 1)
        return Answer(as_distributions(z, labelled.labels[ids[:, 0]]), sweeps)
