"""Base scores and log priors of blocks of rows: products with the features."""

from __future__ import annotations

import torch

from transclip_fast.data.feature_rows import UnitRows
from transclip_fast.ops.blocks import blocks, product_rows
from transclip_fast.parallel import parallel_map
from transclip_fast.types import LinearScore


def linear_log_prior(features: UnitRows, weights: torch.Tensor) -> torch.Tensor:
    """log_softmax of F V^T (N, K) float32; `weights` V (K, d) are prototypes times tau."""
    out = weights.new_empty(len(features), len(weights))

    def part(rows: slice) -> None:
        scores = prior_scores(features, weights, None, rows, out=out[rows])
        scores -= scores.logsumexp(1, keepdim=True)

    size = product_rows(out.device, len(out), len(weights))
    parallel_map(part, blocks(len(out), size), out.device)
    return out


def prior_scores(
    features: UnitRows,
    weights: torch.Tensor | None,
    log_prior: torch.Tensor | None,
    rows: slice,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """log y_hat of a block of rows, up to a constant a row, in `out` (n, K): see `start`."""
    if weights is not None:
        return torch.mm(features[rows], weights.T, out=out)
    if log_prior is None:
        raise TypeError("a prior has weights or log probabilities")
    return out.copy_(log_prior[rows])


def block_scores(
    features: UnitRows, score: LinearScore, rows: slice, *, out: torch.Tensor
) -> torch.Tensor:
    """Base scores of a block of rows, in `out` (n, K)."""
    torch.addmm(score.offset, features[rows], score.weights.T, out=out)
    if score.log_prior is not None:
        out.add_(score.log_prior[rows], alpha=score.prior_weight)
    if score.messages is not None:
        score.messages.add_to(out, rows)
    return out
