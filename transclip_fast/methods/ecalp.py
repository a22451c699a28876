"""ECALP: label propagation from texts and shots, with edges that weigh dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from transclip_fast.data.feature_rows import Rows, unit
from transclip_fast.data.labelled_rows import LabelledRows
from transclip_fast.methods.base import Answer, Grid, Method, Setting, Values
from transclip_fast.methods.label_graph import (
    as_distributions,
    nearest_labelled,
    normalised,
    spread_bytes,
    spread_labels,
)
from transclip_fast.methods.task import Arrays, Task

DAMPING = 1e-6  # joins the square roots of the degrees
SMALLEST_VARIANCE = 1e-12  # of a dimension of the shots


class ECALP(Method):
    """
    Three sweeps Z <- M Z with Y clamped at texts and shots, over a graph of its own.

    As ZLaP's, but a row i has edges to its nearest of all rows j, itself among them, by
    cos(v x_i, x_j), with v the variance over the classes of each dimension of the texts; to its
    nearest texts by cosine; and to its nearest shots s by cos(x_i / u, s), with u the variance of
    each dimension of the shots. All weights are max(0, cosine)^gamma.

    The published code labels rows as they arrive, one at a time, and builds the graph anew for
    each; here all rows are there from the start. It takes v instead of 1 / u if there happen to be
    as many shots as rows. Without texts, which is not in the paper, v is of the class means.

    The graph is searched exactly, N^2 products: 100,000 rows are practical. One (N, K) array, that
    of the answer, and the columns of 256 classes twice.

    Parameters
    ----------
    n_neighbors, n_texts, n_shots : int
        Nearest rows, the row itself among them, texts and shots of a row.
    gamma : float
    sweeps : int

    References
    ----------
    Li et al. Efficient and Context-Aware Label Propagation for Zero-/Few-Shot Training-Free
    Adaptation of Vision-Language Model. ICLR 2025.
    """

    name = "ecalp"
    kinds = ("both", "texts", "shots")
    matrices = 1
    needs_graph = False
    grid: ClassVar[Grid] = {
        "n_neighbors": Setting(8, least=1, most=1000, whole=True),
        "n_texts": Setting(3, least=1, whole=True),
        "n_shots": Setting(8, least=1, whole=True),
        "gamma": Setting(10.0),
        "sweeps": Setting(3, least=1, whole=True),
    }

    def other_bytes(self, arrays: Arrays, run: Mapping[str, Any]) -> int:
        edges = sum(
            min(run[f"n_{name}"], arrays.n_labelled(name))
            for name in ("texts", "shots")
            if self.anchors in (name, "both")
        )
        graph = spread_bytes(len(arrays.features), arrays.n_classes, edges)
        return super().other_bytes(arrays, run) + graph

    def solve(self, task: Task, s: Values) -> Answer:
        labelled, rows, n_rows = task.labelled, task.rows, len(task.rows)
        texts = None if self.anchors == "shots" else task.texts
        shots = None if self.anchors == "texts" else task.shots
        metric = (task.means if texts is None else texts.double()).var(0).float()
        lists = [nearest_labelled(_weighted(rows, metric), rows, s.n_neighbors)]
        if texts is not None:
            ids, cosines = nearest_labelled(rows, texts, s.n_texts)
            lists.append((n_rows + ids, cosines))
        if shots is not None:
            metric = 1 / _variances(shots).clamp_min(SMALLEST_VARIANCE)
            ids, cosines = nearest_labelled(_weighted(rows, metric), shots.features, s.n_shots)
            lists.append((n_rows + len(labelled) - len(shots) + ids, cosines))
        edges = [(found, s.gamma) for found in lists]
        matrix = normalised(edges, n_rows + len(labelled), DAMPING)
        z = spread_labels(
            matrix, labelled.labels, task.n_classes, alpha=1.0, sweeps=s.sweeps, clamped=True
        )
        task.progress(1, 1)
        closest = labelled.labels[lists[1][0][:, 0] - n_rows]
        return Answer(as_distributions(z, closest), s.sweeps)


def _weighted(rows: Rows, metric: torch.Tensor) -> Rows:
    """The rows with each dimension times its weight, scaled to unit norm."""
    return rows.mapped(lambda x: unit(x * metric), rows.shape[1])


def _variances(shots: LabelledRows) -> torch.Tensor:
    """Variance of each dimension over the shots (d,); 1 for a single shot."""
    rows = shots.features.double()
    variances = rows.var(0) if len(rows) > 1 else torch.ones_like(rows[0])
    return variances.float()
