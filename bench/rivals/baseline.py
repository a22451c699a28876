"""The strong baseline: zero-shot TransCLIP in dense torch, the rival of every speed claim.

What a good engineer writes in an afternoon: blockwise exact neighbours, one GEMM for the score of
an outer step, one for the means, a closed-form variance, and one sparse product a sweep. Runs on
the device of its tensors. Memory is O(N K).
"""

from __future__ import annotations

import warnings

import torch
from torch.nn.functional import normalize

VARIANCE_FLOOR = 1e-6  # divided by d


@torch.no_grad()
def nearest(
    features: torch.Tensor, n_neighbors: int = 3, block: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return neighbours (N, k) int64 and their cosines (N, k) by exact search.

    `block` rows are compared with all others at a time, which takes block x N numbers.
    """
    n = len(features)
    neighbors = torch.empty(n, n_neighbors, dtype=torch.int64, device=features.device)
    similarities = features.new_empty(n, n_neighbors)
    for start in range(0, n, block):
        rows = slice(start, min(start + block, n))
        cosine = features[rows] @ features.T  # (block, N)
        cosine.diagonal(offset=start).fill_(-torch.inf)  # a row is not its own neighbour
        similarities[rows], neighbors[rows] = cosine.topk(n_neighbors, dim=1)
    return neighbors, similarities


def affinity_matrix(neighbors: torch.Tensor, similarities: torch.Tensor) -> torch.Tensor:
    """Return A = (W + W^T) / (2k) as a CSR matrix (N, N)."""
    n, k = neighbors.shape
    sources = torch.arange(n, device=neighbors.device).repeat_interleave(k)
    forward = torch.stack([sources, neighbors.flatten()])
    edges = torch.cat([forward, forward.flip(0)], dim=1)
    weights = similarities.flatten().repeat(2) / (2 * k)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled")
        return torch.sparse_coo_tensor(edges, weights, (n, n)).coalesce().to_sparse_csr()


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
    compiled: bool = False,
) -> torch.Tensor:
    """Return assignments (N, K) float32 of unit rows (N, d) to unit prototypes (K, d).

    `graph` is what `nearest` returns. With `compiled`, torch.compile fuses each step but the sparse
    product, which it does not compile.
    """
    n, d = features.shape
    affinity = affinity_matrix(*graph)
    logits = logit_scale * prototypes
    z = torch.softmax(features @ logits.T, dim=1)
    confidence, rows = z.topk(min(8, n), dim=0)  # (8, K)
    means = normalize(torch.einsum("rk,rkd->kd", confidence, features[rows]), dim=1)
    variance = features.new_full((d,), 1 / d)
    second_moment = features.double().square().mean(0)

    score, sweep, mixture = _score, _sweep, _mixture
    if compiled:
        score, sweep, mixture = (
            torch.compile(score, dynamic=False),
            torch.compile(sweep, dynamic=False),
            torch.compile(mixture, dynamic=False),
        )
    for step in range(max_iter + 1):
        base = score(features, means, variance, logits, likelihood_weight)
        for _ in range(inner_iter):
            z = sweep(base, affinity @ z)
        if step < max_iter:
            means, variance = mixture(features, z, means, second_moment)
    return z


def _score(
    features: torch.Tensor,
    means: torch.Tensor,
    variance: torch.Tensor,
    logits: torch.Tensor,
    weight: float,
) -> torch.Tensor:
    """Squared distances over the variance and the prior (N, K), less what all classes share."""
    slope = weight * means / variance + logits
    offset = -0.5 * weight * (means.square() / variance).sum(1)
    return torch.addmm(offset, features, slope.T)


def _sweep(base: torch.Tensor, messages: torch.Tensor) -> torch.Tensor:
    """z (N, K)."""
    return torch.softmax(base + messages, dim=1)


def _mixture(
    features: torch.Tensor, z: torch.Tensor, means: torch.Tensor, second_moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return means (K, d) and variance (d,) of z."""
    n, d = features.shape
    counts, sums = z.sum(0), z.T @ features
    means = torch.where(counts[:, None] > 0, normalize(sums, dim=1), means)
    exact = means.double()
    cross, square = (exact * sums).sum(0), counts.double() @ exact.square()
    variance = (second_moment + (square - 2 * cross) / n).float()
    return means, variance.clamp_(min=VARIANCE_FLOOR / d)
