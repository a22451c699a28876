"""The centres of the lists of an approximate search, and the lists nearest to every row."""

from __future__ import annotations

import math

import torch

from transclip_fast.data.feature_rows import Rows, UnitRows
from transclip_fast.graph.candidates import float32_rounding, rerank_float64
from transclip_fast.graph.products import int8_products, largest
from transclip_fast.ops.blocks import blocks
from transclip_fast.ops.exchange import UNIT_ROWS, Exchange, Partition
from transclip_fast.parallel import parallel_map
from transclip_fast.ranks import ALONE, Ranks

LISTS_PER_SQRT_ROWS = 2.0  # products of a few large lists are faster than of many small ones
SAMPLE_ROWS_PER_LIST, KMEANS_STEPS = 40, 4
BLOCK_ROWS = UNIT_ROWS  # so that blocks of a rank's rows are blocks of all rows
SAMPLE_SEED = 0


def default_n_lists(n_rows: int) -> int:
    """The usual number of lists for N rows, about 2 sqrt(N)."""
    return min(n_rows, math.ceil(LISTS_PER_SQRT_ROWS * math.sqrt(n_rows)))


def random_rows(rows: Rows, size: int) -> torch.Tensor:
    """A random sample of the rows (min(size, N), d), in random order, on the CPU."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SAMPLE_SEED))[:size]
    ordered = order.sort()  # a file is read in order
    return rows[ordered.values][ordered.indices.argsort()]


def kmeans_centres(rows: Rows, ranks: Ranks = ALONE) -> torch.Tensor:
    """
    Centres (L, d): random rows, moved by a few steps of spherical k-means on a sample.

    Ranks compare a part of the sample each, and get the same bits.
    """
    n_lists = default_n_lists(len(rows))
    sample = random_rows(rows, SAMPLE_ROWS_PER_LIST * n_lists)
    centres = sample[:n_lists]
    exchange = Exchange(Partition(len(sample), ranks))
    part = sample[exchange.partition.rows]
    for _ in range(KMEANS_STEPS):
        nearest = exchange.join(nearest_centres(part, centres, 1)[:, 0])
        sums = torch.zeros(centres.shape, dtype=torch.float64)
        for block in blocks(len(sample), BLOCK_ROWS):
            sums.index_add_(0, nearest[block].long(), sample[block].double())
        means = torch.nn.functional.normalize(sums, dim=1).float()
        # A centre without rows does not move.
        centres = means.where((sums != 0).any(1, keepdim=True), centres)
    return exchange.of_first(centres)


def nearest_centres(rows: UnitRows, centres: torch.Tensor, size: int) -> torch.Tensor:
    """
    The `size` nearest centres (N, size) int32 of each row, the nearest one first.

    Where two are nearly as near, float64 decides: the answer does not depend on the kernels of a
    BLAS library.
    """
    size = min(size, len(centres))
    rounding = float32_rounding(centres.shape[1])
    nearest = torch.empty(len(rows), size, dtype=torch.int32)
    int8 = int8_products(len(rows) * len(centres), centres.shape[1], centres.device)
    coded = None if int8 is None else int8.Int8Rows.of(centres, centres.mean(0))

    def search(block: slice) -> None:
        some = rows[block]
        if coded is None:
            values, ids = largest(some @ centres.T, size + 1)
        else:
            values, ids = int8.Int8Rows.of(some, coded.centre).largest(coded, size + 1)
        gaps = -values.diff(dim=1)
        unclear = (~(gaps[:, [0, -1]] > rounding)).any(1) if gaps.shape[1] else gaps.any(1)
        doubtful = unclear.nonzero()[:, 0]
        ids[doubtful] = rerank_float64(some[doubtful], centres, ids[doubtful], ids.shape[1])[0]
        nearest[block] = ids[:, :size].int()

    parallel_map(search, blocks(len(rows), BLOCK_ROWS))
    return nearest
