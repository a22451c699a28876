"""StatA (Zanella et al., CVPR 2025) in dense torch: a rival for batches of few classes.

TransCLIP with a diagonal variance for each class, in which mean and variance of a class are drawn
to its text ("statistical anchors") the more, the fewer rows have the class. Written from a
description of the rule. One difference from the published code is on purpose: the anchors' variance
is a mean over all rows; there, beyond 2,500 rows, it depends on how they are cut into chunks.
"""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from bench.rivals.baseline import VARIANCE_FLOOR, affinity_matrix

ANCHOR_ROWS = 1.0  # alpha: an anchor weighs as much as so many rows


@torch.no_grad()
def solve(
    features: torch.Tensor,
    prototypes: torch.Tensor,
    graph: tuple[torch.Tensor, torch.Tensor],
    *,
    logit_scale: float = 100.0,
    max_iter: int = 10,
    inner_iter: int = 5,
    likelihood_weight: float = 1 / 50,
) -> torch.Tensor:
    """Return assignments (N, K) of unit rows (N, d) to unit prototypes (K, d), in their type.

    `graph` is what `baseline.nearest` returns.
    """
    affinity = affinity_matrix(*graph)
    logits = logit_scale * features @ prototypes.T
    log_prior = torch.log_softmax(logits, dim=1)
    squares = features.square()
    z = log_prior.exp()
    means = prototypes
    anchor_variance = _anchor_variance(squares, features, z, prototypes)
    variances = anchor_variance.expand_as(means)
    for step in range(max_iter + 1):
        score = log_prior + likelihood_weight * _log_gaussian(squares, features, means, variances)
        for _ in range(inner_iter):
            z = torch.softmax(score + affinity @ z, dim=1)
        if step < max_iter:
            means, variances = _mixture(squares, features, z, prototypes, anchor_variance)
    return z


def _anchor_variance(
    squares: torch.Tensor, features: torch.Tensor, z: torch.Tensor, prototypes: torch.Tensor
) -> torch.Tensor:
    """Return the mean over rows of sum_k z_k (x - t_k)^2, (d,)."""
    cross = (prototypes * (z.T @ features)).sum(0)
    total = squares.sum(0) - 2 * cross + z.sum(0) @ prototypes.square()
    return (total / len(features)).clamp(min=VARIANCE_FLOOR / features.shape[1])


def _log_gaussian(
    squares: torch.Tensor, features: torch.Tensor, means: torch.Tensor, variances: torch.Tensor
) -> torch.Tensor:
    """Return the log-density (N, K) of each row in each class, less a constant."""
    offset = -0.5 * (means.square() / variances + variances.log()).sum(1)
    return offset + features @ (means / variances).T - 0.5 * squares @ variances.reciprocal().T


def _mixture(
    squares: torch.Tensor,
    features: torch.Tensor,
    z: torch.Tensor,
    prototypes: torch.Tensor,
    anchor_variance: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return means and variances (K, d): those of z blended with the anchors'."""
    n_classes = len(prototypes)
    rows = torch.bincount(z.argmax(1), minlength=n_classes).to(z)[:, None]  # (K, 1)
    weight = rows / (ANCHOR_ROWS + rows)
    mass = z.sum(0)[:, None].clamp(min=torch.finfo(z.dtype).tiny)
    averages = z.T @ features / mass
    means = normalize(weight * normalize(averages, dim=1) + (1 - weight) * prototypes, dim=1)
    own = z.T @ squares / mass - 2 * means * averages + means.square()
    anchors = anchor_variance + (prototypes - means).square()
    variances = weight * own + (1 - weight) * anchors
    return means, variances.clamp(min=VARIANCE_FLOOR / features.shape[1])
