"""StatA: TransCLIP with a variance for each class, tied to its text."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from transclip_fast.data.feature_rows import unit
from transclip_fast.graph.affinity import affinity
from transclip_fast.methods.base import Answer, Grid, Method, Setting, Values
from transclip_fast.methods.dense import Dense
from transclip_fast.methods.task import Task
from transclip_fast.solver.mixture import MASS_FLOOR, VARIANCE_FLOOR
from transclip_fast.solver.prior import LinearPrior

MIXTURE_WEIGHT = 1 / 50  # of the Gaussians in the score


class StatA(Method):
    """
    TransCLIP's objective with a diagonal variance a class and "statistical anchors".

    Mean and variance of a class are drawn to its text t_k, the more the fewer rows it has: with
    b_k = n_k / (alpha + n_k), n_k rows of which k is the best class,
    mu_k = unit(b_k unit(m_k) + (1 - b_k) t_k) of the mean m_k, and
    sigma_k^2 = b_k S_k + (1 - b_k) (sigma_0^2 + (t_k - mu_k)^2) of the spread S_k about mu_k.
    sigma_0^2 = mean_n sum_k z_nk (x_n - t_k)^2 under zero-shot. Ten steps of five sweeps.

    The published code divides the sum of sigma_0^2 by N once for every 2,500 rows, so that beyond
    these the first rows hardly count; here all count the same.

    A score has 2d columns, (x, x^2). Three (N, K) arrays: a million rows and 1,000 classes take
    12 GB.

    Parameters
    ----------
    alpha : float
        Rows that an anchor weighs as much as.
    n_neighbors, max_iter, inner_iter : int
        As those of TransCLIP.

    References
    ----------
    Zanella et al. Realistic Test-Time Adaptation of Vision-Language Models. CVPR 2025.
    """

    name = "stata"
    kinds = ("texts",)
    matrices = 3
    grid: ClassVar[Grid] = {
        "alpha": Setting(1.0),
        "n_neighbors": Setting(3, least=1, most=1000, whole=True),
        "max_iter": Setting(10, whole=True),
        "inner_iter": Setting(5, least=1, whole=True),
    }

    def solve(self, task: Task, s: Values) -> Answer:
        (n_rows, dim), texts = task.features.shape, task.class_texts.double()
        scale = math.sqrt(dim)  # squares of about the size of the features
        features = task.features.mapped(lambda x: torch.cat([x, scale * x * x], -1), 2 * dim)
        weights = affinity(task.graph(s.n_neighbors), device=task.device)
        dense = Dense(features, task.n_classes, weights)
        prior = LinearPrior.from_prototypes(task.class_texts, task.logit_scale).weights.double()
        z, _ = Dense(task.features, task.n_classes).start(prior)
        base, spare = dense.new_scores(), z.empty_like()

        def moments() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            """z^T 1 (K, 1), z^T X and z^T X^2 (K, d) float64."""
            sums, counts = dense.class_sums(z.values)
            return counts[:, None], sums[:, :dim], sums[:, dim:] / scale

        counts, sums, squares = moments()
        anchor = (squares - 2 * texts * sums + counts * texts.square()).sum(0) / n_rows
        floor = VARIANCE_FLOOR / dim
        means, variances = texts, anchor.clamp_min(floor).expand_as(texts)
        for step in range(s.max_iter + 1):
            linear, quadratic = means / variances, -0.5 / variances
            offset = -0.5 * (means * linear + variances.log()).sum(1)
            gaussian = MIXTURE_WEIGHT * torch.cat([linear, quadratic / scale], 1)
            gaussian[:, :dim] += prior
            dense.scores(gaussian, MIXTURE_WEIGHT * offset, out=base)
            for _ in range(s.inner_iter):
                dense.sweep(base, z, spare)
                z, spare = spare, z
            task.progress(step + 1, s.max_iter + 1)
            if step == s.max_iter:
                break
            rows = torch.bincount(z.best()[0], minlength=task.n_classes)[:, None].float()
            weight = rows / (s.alpha + rows).clamp_min(MASS_FLOOR)
            counts, sums, squares = moments()
            averages = sums / counts.clamp_min(MASS_FLOOR)
            means = unit(weight * unit(averages) + (1 - weight) * texts)
            own = squares / counts.clamp_min(MASS_FLOOR) - 2 * means * averages + means.square()
            anchors = anchor + (texts - means).square()
            variances = (weight * own + (1 - weight) * anchors).clamp_min(floor)
        return Answer(z.values, s.max_iter)
