"""
The solver's operations in torch, on any device.

Each goes through the rows in blocks that stay in the cache: no temporary is ever N x K, and sums
over rows are taken in float64 across blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from transclip_fast.assignments import Assignments
from transclip_fast.graph.affinity import Affinity

# One block of one (rows, K) float32 operand: a core's L2 cache, or enough to fill a GPU.
BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}
GEMM_ROWS = 4096
SUM_ROWS = 256  # float64 sums of more rows than the cache holds are several times slower
START_ROWS = 8


def blocks(n_rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows."""
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def block_rows(tensor: torch.Tensor) -> int:
    """Rows of a (N, K) tensor that make one block."""
    size = BLOCK_BYTES.get(tensor.device.type, BLOCK_BYTES["cuda"])
    return max(1, size // (4 * tensor.shape[1]))


def log_prior(features: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    log_softmax of F V^T, and the log-sum-exp that it took off.

    Parameters
    ----------
    features : Tensor (N, d) float32
    weights : Tensor (K, d) float32
        Prototypes times the logit scale.

    Returns
    -------
    log_probabilities : Tensor (N, K) float32
    normaliser : Tensor (N,) float32
    """
    out = features.new_empty(len(features), len(weights))
    normaliser = features.new_empty(len(features))
    for rows in blocks(len(features), GEMM_ROWS):
        torch.mm(features[rows], weights.T, out=out[rows])
        torch.logsumexp(out[rows], 1, out=normaliser[rows])
        out[rows] -= normaliser[rows, None]
    return out, normaliser


def score(
    features: torch.Tensor,
    weights: torch.Tensor,
    offset: torch.Tensor,
    log_prior: torch.Tensor | None = None,
    prior_weight: float = 1.0,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Base score F P^T + c (+ prior_weight * log y_hat), in one GEMM.

    Parameters
    ----------
    features : Tensor (N, d) float32
    weights, offset : Tensor (K, d), (K,) float32
        P and c.
    log_prior : Tensor (N, K) float32, optional
        log y_hat of a prior that is not linear in the features; -inf excludes a class.

    Returns
    -------
    Tensor (N, K) float32
    """
    if out is None:
        out = features.new_empty(len(features), len(weights))
    for rows in blocks(len(features), GEMM_ROWS):
        torch.addmm(offset, features[rows], weights.T, out=out[rows])
        if log_prior is not None:
            out[rows].add_(log_prior[rows], alpha=prior_weight)
    return out


def sweep(
    base: torch.Tensor, affinity: Affinity, z: Assignments, *, out: Assignments
) -> Assignments:
    """
    z <- softmax_k(base + A z), every row from the z given (Jacobi).

    Parameters
    ----------
    base : Tensor (N, K) float32
    out : Assignments
        Receives the result; must not be `z`.
    """
    for rows in blocks(len(z), block_rows(z.values)):
        messages = _messages(affinity, z, rows)
        messages += base[rows]
        torch.softmax(messages, 1, out=out.values[rows])
    return out


def class_sums(z: Assignments, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Z^T F and the mass n_k of each class.

    Returns
    -------
    sums : Tensor (K, d) float64
    counts : Tensor (K,) float64
    """
    sums = features.new_zeros(z.n_classes, features.shape[1], dtype=torch.float64)
    counts = features.new_zeros(z.n_classes, dtype=torch.float64)
    # The variance is what is left when the squares of the means are taken off: sums of centred
    # rows keep its digits, where float32 sums of thousands of similar rows lose them.
    centre = features[:GEMM_ROWS].mean(0)
    centred = torch.empty_like(features[:GEMM_ROWS])
    for rows in blocks(len(z), GEMM_ROWS):
        block = torch.sub(features[rows], centre, out=centred[: rows.stop - rows.start])
        sums += z.values[rows].T @ block
        for part in torch.split(z.values[rows], SUM_ROWS):
            counts += part.sum(0, dtype=torch.float64)
    return sums.addr_(counts, centre.double()), counts


def sum_of_squares(features: torch.Tensor) -> torch.Tensor:
    """sum_i f_id^2, (d,) float64."""
    total = features.new_zeros(features.shape[1], dtype=torch.float64)
    for rows in blocks(len(features), GEMM_ROWS):
        total += features[rows].double().square_().sum(0)
    return total


def start_rows(log_probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The 8 most confident rows of each class (all rows when N < 8).

    Parameters
    ----------
    log_probabilities : Tensor (N, K) float32

    Returns
    -------
    values : Tensor (8, K) float32
        Their log-probabilities, largest first.
    rows : Tensor (8, K) int64
    """
    values = log_probabilities[:0]  # (0, K)
    rows = torch.empty_like(values, dtype=torch.int64)
    for block in blocks(len(log_probabilities), GEMM_ROWS):
        size = block.stop - block.start
        ids = torch.arange(block.start, block.stop, device=values.device)
        values = torch.cat([values, log_probabilities[block]])
        rows = torch.cat([rows, ids[:, None].expand(size, values.shape[1])])
        best = _top_rows(values, min(START_ROWS, len(values)))
        values, rows = values.gather(0, best), rows.gather(0, best)
    return values, rows


def _top_rows(values: torch.Tensor, n: int) -> torch.Tensor:
    """Positions (n, K) of the largest values of each column, equal ones from the top."""
    best = values.topk(n, dim=0)
    tied = (values >= best.values[-1]).sum(0) > n  # topk breaks ties as it likes
    if tied.any():
        ordered = values[:, tied].sort(dim=0, descending=True, stable=True)
        best.indices[:, tied] = ordered.indices[:n]
    return best.indices


def energies(
    z: Assignments, affinity: Affinity, log_prior: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    sum_ij A_ij z_i.z_j, sum_ik z_ik log z_ik and sum_ik z_ik log y_hat_ik, float64 scalars.

    The last is 0 where `log_prior` (N, K) is not given.
    """
    pairwise, entropy, prior = z.values.new_zeros(3, dtype=torch.float64)
    smallest = torch.finfo(z.values.dtype).tiny
    for rows in blocks(len(z), block_rows(z.values)):
        values = z.values[rows]
        pairwise += (values * _messages(affinity, z, rows)).sum(dtype=torch.float64)
        entropy += (values * values.clamp_min(smallest).log_()).sum(dtype=torch.float64)
        if log_prior is not None:
            term = torch.where(values > 0, values * log_prior[rows], 0)
            prior += term.sum(dtype=torch.float64)
    return pairwise, entropy, prior


def _messages(affinity: Affinity, z: Assignments, rows: slice) -> torch.Tensor:
    """(A z) of a block of rows, (rows, K): a weighted sum of the neighbours' rows of z."""
    first, last = affinity.offsets[rows.start], affinity.offsets[rows.stop]
    entries = slice(int(first), int(last))
    return F.embedding_bag(
        affinity.columns[entries],
        z.values,
        affinity.offsets[rows] - first,
        per_sample_weights=affinity.weights[entries],
        mode="sum",
    )
