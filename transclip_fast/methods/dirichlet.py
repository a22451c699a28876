"""Dirichlet densities of largest likelihood."""

from __future__ import annotations

import torch

from transclip_fast.ops.blocks import blocks
from transclip_fast.parallel import parallel_map

MAX_STEPS = 1000
CHECKED_STEPS = 10  # between two tests of convergence
TOLERANCE = 1e-11  # of the squared change of a class's parameters, relative
SMALLEST = 1e-11  # of a parameter whose curvature is not its limit at 0
CLASS_ROWS = 16  # classes of a block: its arrays stay in a core's cache


def fit_dirichlet(start: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """
    alpha (n, K) float64 with psi(alpha_j) - psi(sum alpha) = means, the mean logs (n, K) < 0.

    Each step minimises a quadratic upper bound of the negative log-likelihood.
    """

    def part(classes: slice) -> torch.Tensor:
        alpha, goal = start[classes].clone(), means[classes]
        active = torch.arange(len(alpha), device=alpha.device)
        a, g = alpha, goal
        for step in range(MAX_STEPS):
            after = _majorise(a, g)
            if step and step % CHECKED_STEPS == 0:
                change = (after - a).square().sum(1) / a.square().sum(1)
                alpha[active], going = after, change >= TOLERANCE
                active, after, g = active[going], after[going], g[going]
                if not len(active):
                    return alpha
            a = after
        alpha[active] = a
        return alpha

    return torch.cat(parallel_map(part, blocks(len(start), CLASS_ROWS), start.device))


def _majorise(alpha: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """One step from alpha (n, K)."""
    digamma = torch.digamma(alpha + 1)
    curvature = (2 * (digamma * alpha - torch.lgamma(alpha + 1)) / alpha.square()).abs()
    # Its limit at 0.
    curvature = curvature.where(alpha > SMALLEST, torch.pi**2 / 6)
    b = digamma - torch.digamma(alpha.sum(1, keepdim=True)) - curvature * alpha - means
    return (-b + (b.square() + 4 * curvature).sqrt()) / (2 * curvature)
