"""PT-MAP: prototypes by optimal transport between rows and classes of equal size."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from transclip_fast.data.checks import as_tensor
from transclip_fast.data.labelled_rows import LabelledRows
from transclip_fast.errors import InputError
from transclip_fast.methods.base import Answer, Grid, Method, Setting, Values
from transclip_fast.methods.dense import Dense, in_blocks, softmax_
from transclip_fast.methods.task import Task, class_means, moments_of

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

    It assumes equally many rows of every class, and loses much where that is wrong. With
    `class_prior` the column sums are N times that.

    Only the potentials u and v change in a scaling, the array does not. One (N, K) array, read
    twice in each of at most 1,000 scalings a step: a million rows and 1,000 classes take 4 GB, and
    100,000 rows are the most that is practical.

    Parameters
    ----------
    class_prior : array_like (K,), optional
        Share of the rows of each class, greater than 0, scaled to a sum of 1.
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
    balanced = True
    matrices = 1
    grid: ClassVar[Grid] = {
        "rate": Setting(0.2, (0.2, 0.4)),
        "max_iter": Setting(10, whole=True),
        "max_scalings": Setting(1000, least=1, whole=True),
    }

    def __init__(self, /, *, class_prior: Any = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.class_prior = None if class_prior is None else _shares(class_prior)

    @property
    def assumes_balanced(self) -> bool:
        return self.class_prior is None

    def solve(self, task: Task, s: Values) -> Answer:
        dim, n_classes = task.features.shape[1], task.n_classes
        mass = self._masses(len(task.features), n_classes).to(task.device)
        labelled = LabelledRows(_powers(task.labelled.features), task.labelled.labels)
        moments = moments_of(labelled, n_classes)
        prototypes = class_means(moments)
        dense = Dense(task.features.mapped(_powers, dim), n_classes)
        scores = dense.new_scores()
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
        return Answer(scores.values, s.max_iter)

    def _masses(self, n_rows: int, n_classes: int) -> torch.Tensor:
        """Rows of each class (K,) float64."""
        if self.class_prior is None:
            if n_rows < n_classes:
                raise InputError(
                    f"{self.name} gives each class as many rows, and there are {n_rows} rows for "
                    f"{n_classes} classes"
                )
            return torch.full((n_classes,), n_rows // n_classes, dtype=torch.float64)
        if len(self.class_prior) != n_classes:
            raise InputError(
                f"class_prior: {len(self.class_prior)} shares for {n_classes} classes; give one a "
                "class"
            )
        return n_rows * self.class_prior


def _shares(class_prior: Any) -> torch.Tensor:
    """The checked shares (K,) float64 of the classes."""
    shares = as_tensor(class_prior, "class_prior").double()
    if shares.ndim != 1 or not len(shares):
        raise InputError(f"class_prior: expected shares (K,), got shape {tuple(shares.shape)}")
    for k, share in enumerate(shares.tolist()):
        if not 0 < share < math.inf:
            raise InputError(
                f"class_prior: class {k} has share {share:g}, and needs one greater than 0; leave "
                "out the texts and shots of a class that does not occur"
            )
    return shares.cpu() / shares.sum()


def _powers(rows: torch.Tensor) -> torch.Tensor:
    return (rows.relu() + 1e-6).sqrt()


def to_plan(values: torch.Tensor, mass: torch.Tensor, most: int) -> None:
    """
    Scores (N, K) to the plan u exp(values) v with row sums 1, then column sums `mass`, in place.

    `mass` (K,) is greater than 0. At most so many scalings, until no row's sum changes by more than
    one in a million.
    """

    softmax_(values)  # the factor of a row joins u

    def row_sums(v: torch.Tensor) -> torch.Tensor:
        return torch.cat(in_blocks(values, lambda rows: values[rows] @ v))

    def column_sums(u: torch.Tensor) -> torch.Tensor:
        parts = in_blocks(values, lambda rows: (u[rows] @ values[rows]).double())
        return torch.stack(parts).sum(0)

    received = before = row_sums(values.new_ones(values.shape[1]))
    for _ in range(most):
        u = 1 / received.clamp_min(SMALLEST)
        v = (mass / column_sums(u).clamp_min(SMALLEST)).clamp_min(SMALLEST).float()
        received = row_sums(v)
        sums = u * received
        if (sums - before).abs().max() < TOLERANCE:
            break
        before = sums

    def to_rows(rows: slice) -> None:
        values[rows] *= u[rows, None] * v

    in_blocks(values, to_rows)
