"""LaplacianShot: distances to prototypes, smoothed over the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from transclip_fast.graph.affinity import affinity
from transclip_fast.methods.base import Answer, Grid, Method, Setting, Values
from transclip_fast.methods.bd_cspn import rectified_prototypes
from transclip_fast.methods.dense import Dense
from transclip_fast.methods.task import Arrays, Task

RECTIFIED_ROWS, RECTIFIED_EPS = 8, 10.0  # of the prototypes, as BD-CSPN's defaults
MAX_SWEEPS = 20
FEWEST_SWEEPS = 3
TOLERANCE = 1e-6  # of the energy, relative


class LaplacianShot(Method):
    """
    Minimises sum_nk z_nk log z_nk + sum_nk z_nk |x_n - p_k|^2 - lambda/2 sum_ij w_ij z_i.z_j.

    The prototypes p are those of BD-CSPN, and w_ij is 1 if j is one of the `n_neighbors` nearest
    neighbours of i: z <- softmax(-|x - p|^2 + lambda W z), from z = softmax(-|x - p|^2), at most
    20 sweeps, until the energy changes by less than one in a million.

    The published code makes an (N, N) array of similarities. With anchors "probabilities" the graph
    is still that of the features, where EM-Dirichlet's comparison makes one of probabilities.

    One product and some sweeps. Three (N, K) arrays: a million rows and 1,000 classes take 12 GB.

    Parameters
    ----------
    n_neighbors : int
    smoothness : float
        lambda.

    References
    ----------
    Ziko et al. Laplacian Regularized Few-Shot Learning. ICML 2020.
    """

    name = "laplacianshot"
    matrices = 3
    grid: ClassVar[Grid] = {
        "n_neighbors": Setting(3, (3, 5, 10), least=1, most=1000, whole=True),
        "smoothness": Setting(0.7, (0.1, 0.3, 0.5, 0.7, 0.8, 1.0, 1.2, 1.5)),
    }

    def learned_rows(self, arrays: Arrays, run: Mapping[str, Any]) -> int:
        return super().learned_rows(arrays, run) + arrays.n_classes * RECTIFIED_ROWS

    def solve(self, task: Task, s: Values) -> Answer:
        prototypes = rectified_prototypes(task, RECTIFIED_ROWS, RECTIFIED_EPS)
        graph = task.graph(s.n_neighbors)
        # `affinity` divides by the number of neighbours.
        weight = np.float32(s.smoothness * s.n_neighbors)
        binary = replace(graph, similarities=np.full(graph.neighbors.shape, weight))
        weights = affinity(binary, mode="directed", device=task.device)
        dense = Dense(task.features, task.n_classes, weights)
        base = dense.scores(2 * prototypes, -prototypes.square().sum(1))
        unlinked = Dense(task.features, task.n_classes)
        z, spare = dense.new_assignments(), dense.new_assignments()
        unlinked.sweep(base, spare, z)
        energy = float("inf")
        for sweep in range(1, MAX_SWEEPS + 1):
            dense.sweep(base, z, spare)
            z, spare = spare, z
            task.progress(sweep, MAX_SWEEPS)
            before, energy = energy, dense.negative_energy(z, base)
            if sweep >= FEWEST_SWEEPS and abs(energy - before) <= TOLERANCE * abs(before):
                break
        return Answer(z.values, sweep)
