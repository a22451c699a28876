"""
The most similar other rows of each row, by inner product, without N x N.

A program owns BLOCK_ROWS rows and computes F F^T a tile at a time, in 16 bits with float32 sums.
Only products above a row's KEPT-th best so far enter its list; most tiles have none. A row is not
its own neighbour, and of equal products the lower id wins.

    s~_ij = fl16(f_i) . fl16(f_j),  kept: the KEPT largest of j != i,  rest_i: the smallest of them

`transclip_fast.graph.exact` ranks these candidates by exact products. For j not kept,

    s_ij <= rest_i + |f_i - fl16 f_i| |f_j| + |fl16 f_i| |f_j - fl16 f_j| + rounding of d sums,

so if the k-th best exact product is above that bound, the candidates hold the k nearest rows.

Shapes: F (N, d) float16 or float32; ids (N, KEPT) int64, similarities (N, KEPT) float32. Cost:
2 N^2 d operations on the matrix units; 2 N^2 d / B entries read from the cache for tiles of B x B.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FEWEST = 8  # that are kept of a row: more than k, so that most rows can be proven
BLOCK_ROWS, BLOCK_COLUMNS = 128, 128
# Dimensions of a step, warps, stages of its pipeline. AMD's 64 KB hold one stage.
LAUNCHES = {"cuda": (64, 8, 3), "hip": (32, 8, 1)}
LARGEST_NORM = 1.003  # of a row: rows within 2e-3 of 1 are used as they are
SUM_ROUNDING = 2.0**-22  # of each float32 addition of a matrix unit, which may truncate


@triton.jit
def neighbors_kernel(
    features_ptr, ids_ptr, similarities_ptr, first, stop, n_rows, d,
    KEPT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DIMS: tl.constexpr,
):  # fmt: skip
    """A block of the rows `first` to `stop` against all rows: their KEPT largest products."""
    row = first + tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    # Rows beyond the last one copy it.
    start_of_row = tl.minimum(row, n_rows - 1).to(tl.int64) * d
    x = tl.arange(0, BLOCK_DIMS)
    t = tl.arange(0, KEPT)
    best = tl.full((BLOCK_ROWS, KEPT), float("-inf"), tl.float32)
    best_ids = tl.full((BLOCK_ROWS, KEPT), -1, tl.int32)
    for start in range(0, n_rows, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        start_of_column = tl.minimum(column, n_rows - 1).to(tl.int64) * d
        products = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for step in range(0, d, BLOCK_DIMS):
            inside = step + x < d
            a = tl.load(
                features_ptr + start_of_row[:, None] + (step + x)[None, :],
                inside[None, :],
                other=0.0,
            )
            b = tl.load(
                features_ptr + start_of_column[None, :] + (step + x)[:, None],
                inside[:, None],
                other=0.0,
            )
            products = tl.dot(a, b, products, input_precision="ieee")
        allowed = (column < n_rows)[None, :] & (column[None, :] != row[:, None])
        products = tl.where(allowed, products, float("-inf"))
        top, smallest = tl.max(products, 1), tl.min(best, 1)
        while tl.max((top > smallest).to(tl.int32), 0) > 0:
            place = tl.min(tl.where(products == top[:, None], column[None, :], n_rows), 1)
            slot = tl.min(tl.where(best == smallest[:, None], t[None, :], KEPT), 1)
            enters = (t[None, :] == slot[:, None]) & (top > smallest)[:, None]
            best = tl.where(enters, top[:, None], best)
            best_ids = tl.where(enters, place[:, None], best_ids)
            products = tl.where(column[None, :] == place[:, None], float("-inf"), products)
            top, smallest = tl.max(products, 1), tl.min(best, 1)
    place = (row - first).to(tl.int64)[:, None] * KEPT + t[None, :]
    tl.store(ids_ptr + place, best_ids.to(tl.int64), (row < stop)[:, None])
    tl.store(similarities_ptr + place, best, (row < stop)[:, None])


def candidates(
    features: torch.Tensor, size: int = FEWEST, first: int = 0, stop: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Rows with the largest products with each of the n rows `first` to `stop`, in any order.

    KEPT is the next power of 2 from `size` up, at least FEWEST.

    Returns
    -------
    ids : Tensor (n, KEPT) int64
        -1 where N has fewer other rows.
    similarities : Tensor (n, KEPT) float32
        Their products, -inf where there is none.

    Raises
    ------
    ValueError
        Features that are not contiguous, or of 2^31 rows or more.
    """
    n_rows, d = features.shape
    stop = n_rows if stop is None else stop
    if not features.is_contiguous() or n_rows >= 2**31:
        raise ValueError("features must be contiguous, of fewer than 2^31 rows")
    kept = max(FEWEST, triton.next_power_of_2(size))
    ids = torch.empty(stop - first, kept, dtype=torch.int64, device=features.device)
    similarities = torch.empty(stop - first, kept, device=features.device)
    depth, warps, stages = LAUNCHES["hip" if torch.version.hip else "cuda"]
    neighbors_kernel[(triton.cdiv(stop - first, BLOCK_ROWS),)](
        features, ids, similarities, first, stop, n_rows, d,
        KEPT=kept, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS, BLOCK_DIMS=depth,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return ids, similarities


def certified(
    nearest: torch.Tensor,
    similarities: torch.Tensor,
    errors: torch.Tensor,
    worst: torch.Tensor,
    d: int,
) -> torch.Tensor:
    """
    Whether the candidates of each row are proven to hold its k nearest rows, (n,) bool.

    `nearest` (n,) is the exact product with the k-th nearest candidate, `similarities` (n, KEPT)
    are those of `candidates`, `errors` (n,) |f_i - fl16 f_i|, and `worst` () the largest of all N.
    """
    rest = similarities.amin(1)
    margin = LARGEST_NORM * (errors + worst) + LARGEST_NORM**2 * d * SUM_ROUNDING
    return (rest == -torch.inf) | (nearest > rest + margin)
