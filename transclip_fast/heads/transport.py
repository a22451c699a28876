"""Entropic optimal transport between small uniform sets, many at a time."""

from __future__ import annotations

import torch

EPSILON = 0.1
ITERATIONS = 100
THRESHOLD = 1e-2


@torch.no_grad()
def transport(
    similarities: torch.Tensor,
    *,
    epsilon: float = EPSILON,
    iterations: int = ITERATIONS,
    threshold: float = THRESHOLD,
) -> torch.Tensor:
    """
    Plans (P, L, N) that carry the weight 1/L of each of L rows to the weight 1/N of N columns.

    T = diag(r) A diag(c) with A = exp(-(1 - S) / epsilon), where r = (1/L) / (A c) and
    c = (1/N) / (A^T r) follow each other from c = 1 on: Sinkhorn's iterations for the cost 1 - S.
    A problem is done when the mean change of its r is below the threshold, and then stays as it
    is, so that no plan depends on the problems beside it. (The authors' code goes on until the mean
    over all problems of a batch is.) Columns sum to 1/N exactly, rows to 1/L as far as r stands
    still. No gradient passes: the plan is a constant of the loss, as in the paper.

    Source: Cuturi 2013, Sinkhorn Distances; Chen et al. 2023, PLOT, algorithm 1; epsilon,
    iterations and threshold as in the authors' repository (CHENGY12/PLOT).

    Parameters
    ----------
    similarities : Tensor (P, L, N)
        S, cosines; float32 or float64, which the plans are, too.
    """
    kernel = torch.exp((similarities - 1) / epsilon)
    n_problems, rows, columns = kernel.shape
    r, c = kernel.new_ones(n_problems, rows, 1), kernel.new_ones(n_problems, columns, 1)
    going = torch.ones(n_problems, 1, 1, dtype=torch.bool, device=kernel.device)
    for _ in range(iterations):
        new_r = 1 / (rows * (kernel @ c))
        new_c = 1 / (columns * (kernel.mT @ new_r))
        moved = (new_r - r).abs().mean(1, keepdim=True)
        r, c = torch.where(going, new_r, r), torch.where(going, new_c, c)
        going &= moved >= threshold
        if not going.any():
            break
    return r * kernel * c.mT
