"""PT-MAP: prototypes by optimal transport between rows and classes of equal size."""

from __future__ import annotations

from typing import ClassVar

import torch

from transclip_fast.errors import InputError
from transclip_fast.methods.base import Grid, Method, Setting, Settings, Solution
from transclip_fast.methods.dense import Dense, in_blocks
from transclip_fast.methods.task import Labelled, Task
from transclip_fast.solver.mixture import Moments

SHARPNESS = 10.0  # of exp(-10 |f - p|^2)
SMALLEST = 1e-30  # of what a row or a class receives
TOLERANCE = 1e-6  # of a row's mass


class PTMAP(Method):
    """
    z is the transport plan from rows to classes, and prototypes move to its means.

    Rows are f = (max(x, 0) + 1e-6)^(1/2), of which half the coordinates of CLIP features vanish, as
    in the published code. A step: z = u_n exp(-10 |f_n - p_k|^2) v_k with row sums 1 and column
    sums N / K, rounded down, by Sinkhorn's scaling; p_k <- p_k + rate (mean of its labelled rows
    and of all rows weighted by z - p_k). Ten steps, and z once more, its rows scaled to sums of 1.

    It assumes equally many rows of every class, and loses much where that is wrong.

    Only the potentials u and v change in a scaling, the array does not. One (N, K) array, read
    twice in each of at most 1,000 scalings a step: a million rows and 1,000 classes take 4 GB, and
    100,000 rows are the most that is practical.

    Parameters
    ----------
    rate : float
    max_iter : int
        Steps.
    max_scalings : int
        Of a step.

    References
    ----------
    Hu, Gripon, Pateux. Leveraging the Feature Distribution in Transfer-based Few-Shot Learning.
    2021.
    """

    name = "pt-map"
    kinds = ("shots", "texts", "both", "probabilities")
    balanced = True
    matrices = 1
    grid: ClassVar[Grid] = {
        "rate": Setting(0.2, (0.2, 0.4)),
        "max_iter": Setting(10, whole=True),
        "max_scalings": Setting(1000, least=1, whole=True),
    }

    def solve(self, task: Task, s: Settings) -> Solution:
        (n_rows, dim), n_classes = task.features.shape, task.n_classes
        if n_rows < n_classes:
            raise InputError(
                f"{self.name} gives each class as many rows, and there are {n_rows} rows for "
                f"{n_classes} classes"
            )
        labelled = Labelled(_powers(task.labelled.rows), task.labelled.labels)
        moments = Moments.of(labelled.rows, labelled.labels, n_classes)
        prototypes = moments.sums / moments.counts[:, None]
        dense = Dense(task.features.mapped(_powers, dim), n_classes)
        scores, mass = dense.new_scores(), n_rows // n_classes
        for step in range(s.max_iter + 1):
            half = prototypes.square().sum(1) / 2
            dense.scores(2 * SHARPNESS * prototypes, -2 * SHARPNESS * half, out=scores)
            to_plan(scores.values, mass, s.max_scalings)
            task.progress(step + 1, s.max_iter + 1)
            if step < s.max_iter:
                sums, counts = dense.class_sums(scores.values)
                counts = (moments.counts + counts)[:, None]
                prototypes = prototypes + s.rate * ((moments.sums + sums) / counts - prototypes)

        def to_distributions(rows: slice) -> None:
            scores.values[rows] /= scores.values[rows].sum(1, keepdim=True)

        in_blocks(scores.values, to_distributions)
        return Solution(scores.values, s.max_iter)


def _powers(rows: torch.Tensor) -> torch.Tensor:
    return (rows.relu() + 1e-6).sqrt()


def to_plan(values: torch.Tensor, mass: float, most: int) -> None:
    """
    Scores (N, K) to the plan u exp(values) v with row sums 1, then column sums `mass`, in place.

    At most so many scalings, until no row's sum changes by more than one in a million.
    """

    def to_kernel(rows: slice) -> None:
        torch.softmax(values[rows], 1, out=values[rows])  # the factor of a row joins u

    in_blocks(values, to_kernel)
    v = values.new_ones(values.shape[1])
    received = torch.cat(in_blocks(values, lambda rows: values[rows] @ v))
    before = received
    for _ in range(most):
        u = 1 / received.clamp_min(SMALLEST)

        def sent(rows: slice, u: torch.Tensor = u) -> torch.Tensor:
            return (u[rows] @ values[rows]).double()

        totals = torch.stack(in_blocks(values, sent)).sum(0)
        v = (mass / totals.clamp_min(SMALLEST)).float()

        def received_of(rows: slice, v: torch.Tensor = v) -> torch.Tensor:
            return values[rows] @ v

        received = torch.cat(in_blocks(values, received_of))
        sums = u * received
        if (sums - before).abs().max() < TOLERANCE:
            break
        before = sums

    def to_rows(rows: slice) -> None:
        values[rows] *= u[rows, None] * v

    in_blocks(values, to_rows)
