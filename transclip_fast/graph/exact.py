"""
Exact search: every row against every other, each product computed once for both its rows.

Candidates come from float32 products; which of them are nearest is decided in float64, equal ones
by the lower id. Among more equal rows than there are spare candidates any may be found.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from transclip_fast.device import exact_float32
from transclip_fast.graph.best import SPARE, BestLists, decide
from transclip_fast.graph.checkpoint import Checkpoint, Progress, State
from transclip_fast.graph.compare import Pair, compare
from transclip_fast.rows import Rows
from transclip_fast.threads import quiet

TILE = {"cpu": 1024, "cuda": 16384}  # rows of a square block of products


def search_exact(rows: Rows, best: BestLists, progress: Progress, checkpoint: Checkpoint) -> None:
    """Bring the neighbours of every row into `best`."""
    pairs = all_pairs(torch.arange(len(rows), device=rows.device))
    state, start = checkpoint.load(), 0
    if state is not None:
        best.restore(state)
        start = int(state["blocks"])
    for done in compare(rows, pairs[start:], best):
        progress(len(rows) * (start + done) // len(pairs), len(rows))
        checkpoint.keep(partial(_state, best, start + done))


def _state(best: BestLists, blocks: int) -> State:
    return {"blocks": np.array(blocks), **best.state()}


def all_pairs(ids: torch.Tensor) -> list[Pair]:
    """Blocks of the rows `ids` (n,) that together hold every pair of them once."""
    tiles = torch.split(ids, _tile(ids))
    # With themselves first: what is found there rules out most of the others.
    own = [(tile, tile) for tile in tiles]
    return own + [(tile, other) for i, tile in enumerate(tiles) for other in tiles[i + 1 :]]


def _tile(ids: torch.Tensor) -> int:
    return TILE["cuda" if ids.is_cuda else "cpu"]


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
    others = len(queries) - (own is not None)
    best = BestLists(len(rows), min(k + SPARE, others) + 1, rows.device)  # and the row itself
    ids, columns = (torch.arange(n, device=rows.device) for n in (len(rows), len(queries)))
    tile = _tile(ids)
    pairs = [(some, part) for part in torch.split(columns, tile) for some in torch.split(ids, tile)]
    with exact_float32(), quiet():
        for _ in compare(rows, pairs, best, queries):
            pass
        candidates = best.ids if own is None else best.ids.where(best.ids != own[:, None], -1)
        return decide(rows, queries, candidates, min(k, others))
