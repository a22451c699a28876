"""
Exact search: every row against every other, each product computed once for both its rows.

Candidates come from float32 products; which of them are nearest is decided in float64, equal ones
by the lower id. Among more equal rows than there are spare candidates any may be found, others of
rows in a file than of rows in memory.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from transclip_fast.callbacks import Checkpoint, Count, State
from transclip_fast.data.feature_rows import Rows
from transclip_fast.device import exact_float32
from transclip_fast.graph.best import SPARE, BestLists, decide
from transclip_fast.graph.compare import Pair, byte_products, compare
from transclip_fast.parallel import parallel_map, single_threaded_torch

TILE = {"cpu": 1024, "cuda": 16384}  # rows of a square block of products


def search_exact(rows: Rows, best: BestLists, progress: Count, checkpoint: Checkpoint) -> None:
    """Bring the neighbours of every row into `best`."""
    pairs = all_pairs(torch.arange(len(rows), device=rows.device))
    state, start = checkpoint.load(), 0
    if state is not None:
        best.restore(state)
        start = int(state["blocks"])
    for done in compare(rows, pairs[start:], best, byte_products(rows, pairs)):
        progress(len(rows) * (start + done) // len(pairs), len(rows))
        checkpoint.keep(partial(_state, best, start + done))


def _state(best: BestLists, blocks: int) -> State:
    return {"blocks": np.array(blocks), **best.state()}


def all_pairs(ids: torch.Tensor) -> list[Pair]:
    """Blocks of the rows `ids` (n,) that together hold every pair of them once."""
    tiles = torch.split(ids, TILE["cuda" if ids.is_cuda else "cpu"])
    # With themselves first: what is found there rules out most of the others.
    own = [(tile, tile) for tile in tiles]
    return own + [(tile, other) for i, tile in enumerate(tiles) for other in tiles[i + 1 :]]


def nearest(
    rows: torch.Tensor, queries: Rows | torch.Tensor, k: int, *, own: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The k most similar queries of each row, best first: ids (M, k) int64, similarities (M, k).

    k is cut to the number of queries; the similarities are float64.

    Parameters
    ----------
    rows : Tensor (M, d)
    queries : (N, d)
    own : Tensor (M,) int64, optional
        The query that each row is; it is not its own neighbour.
    """
    size = min(k + SPARE + 1, len(queries))  # with the row itself
    tile = TILE["cuda" if rows.is_cuda else "cpu"]

    def found(start: int) -> tuple[torch.Tensor, torch.Tensor]:
        products = block @ queries[start : start + tile].T
        values, places = products.topk(min(size, products.shape[1]), dim=1)
        return values, places + start

    ids = torch.empty(len(rows), size, dtype=torch.int64, device=rows.device)
    with exact_float32(), single_threaded_torch():
        for first in range(0, len(rows), tile):
            block = rows[first : first + tile]
            parts = parallel_map(found, range(0, len(queries), tile), rows.device)
            values, candidates = (torch.cat(part, 1) for part in zip(*parts, strict=True))
            ids[first : first + tile] = candidates.gather(1, values.topk(size, dim=1).indices)
        if own is not None:
            ids[ids == own[:, None]] = -1
        return decide(rows, queries, ids, min(k, len(queries) - (own is not None)))
