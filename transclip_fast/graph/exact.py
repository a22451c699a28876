"""
Exact search: every row against all others.

Products in float32, or int8 with a certificate, find the candidates; float64 decides among them,
and of equal products the lower ids win. If more rows are equal than there are candidates, any of
them may be found. On a GPU, 16-bit products find the candidates of each row and a bound proves
them; a row whose bound fails is searched again in float32 (`transclip_fast.kernels.neighbors`).
"""

from __future__ import annotations

from functools import partial

import torch

from transclip_fast.data.feature_rows import Rows
from transclip_fast.device import exact_float32
from transclip_fast.graph.candidates import (
    SPARE_CANDIDATES,
    Candidates,
    best,
    rerank_float64,
    without_self,
)
from transclip_fast.graph.job import Job
from transclip_fast.graph.products import compiled_module, int8_products, largest
from transclip_fast.ops.blocks import blocks, equal_rows
from transclip_fast.ops.exchange import Exchange
from transclip_fast.ops.ranked import RankedRows
from transclip_fast.parallel import parallel_map, single_threaded_torch

PANEL_ROWS = {"cpu": 512, "cuda": 8192}  # rows that are searched at a time,
TILE_ROWS = {"cpu": 8192, "cuda": 16384}  # and that they are compared with
MERGED_TILES = 32  # that threads may search at a time
STEP_ROWS = 1 << 14  # between two checkpoints
GPU_STEP_ROWS = 1 << 16  # rows of a certified search between two checkpoints
GPU_CANDIDATES = 16  # most of each row: with 32 registers spill on sm_100


def search_exact(rows: Rows, found: Candidates, k: int, job: Job) -> None:
    """Fill `found` so that the k nearest other rows of each own row are among its entries."""
    if certifiable(rows, found.size):
        search_certified(rows, found, k, job)
        return
    int8 = int8_products(len(rows) ** 2, rows.shape[1], rows.device) if rows.held else None
    search = partial(_search_panel, rows) if int8 is None else int8.Int8Search(rows).panel
    panel_rows = PANEL_ROWS[rows.device.type]
    if rows.device.type == "cpu":
        panel_rows = equal_rows(job.own.stop - job.own.start, panel_rows)
    job.search_panels(search, found, panel_rows, STEP_ROWS, job.checkpoint.load())


def _search_panel(rows: Rows, panel: slice, found: Candidates) -> None:
    """Fill `found` for a panel of rows, from all their products."""
    block, own = rows[panel], torch.arange(panel.start, panel.stop, device=rows.device)
    size = found.size + 1  # with the row itself
    first, *others = blocks(len(rows), TILE_ROWS[block.device.type])
    values, ids = largest(block @ rows[first].T, size)
    for tile in others:
        more_values, more = largest(block @ rows[tile].T, size)
        values, ids = torch.cat([values, more_values], 1), torch.cat([ids, more + tile.start], 1)
        values, order = values.topk(min(size, values.shape[1]), dim=1)
        ids = ids.gather(1, order)
    # By id: copies of a row are its neighbours.
    ids, values = without_self(ids, values, own)
    found.ids[:, : ids.shape[1]], found.values[:, : ids.shape[1]] = ids, values


def nearest(
    rows: torch.Tensor,
    queries: Rows | torch.Tensor,
    k: int,
    *,
    own: torch.Tensor | None = None,
    exchange: Exchange | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The k most similar queries (N, d) of each row (M, d), best first: their ids (M, k) int64, and
    similarities (M, k) float64; k is cut to the number of queries.

    `own` (M,) int64 is the query that each row itself is, which is not its own neighbour. With
    `exchange`, several processes that have the same rows and queries share the work.
    """
    size = min(k + SPARE_CANDIDATES + 1, len(queries))  # with the row itself
    ids = torch.full((len(rows), size), -1, device=rows.device)
    values = torch.full((len(rows), size), -torch.inf, device=rows.device)
    tiles = list(blocks(len(queries), TILE_ROWS[rows.device.type]))
    if exchange is not None:
        tiles = exchange.ranks.part(tiles)

    int8 = int8_products(len(rows) * len(queries), rows.shape[1], rows.device)
    coded = None if int8 is None else int8.Int8Rows.of(rows, rows.mean(0))

    def top(task: tuple[slice, Candidates]) -> None:
        tile, found = task
        others = queries[tile]  # read once for all panels
        if coded is not None:
            others = int8.Int8Rows.of(others, coded.centre)
        for part in blocks(len(rows), PANEL_ROWS[rows.device.type]):
            if coded is None:
                products, places = largest(rows[part] @ others.T, size)
            else:
                products, places = coded.part(part).largest(others, size)
            width = products.shape[1]
            found.values[part, :width], found.ids[part, :width] = products, places + tile.start

    with exact_float32(), single_threaded_torch():
        for some in blocks(len(tiles), MERGED_TILES):
            # Made before the products are: between those, these would keep freed memory in pieces.
            found = [Candidates.empty(len(rows), size, rows.device) for _ in tiles[some]]
            parallel_map(top, zip(tiles[some], found, strict=True), rows.device)
            found.append(Candidates(ids, values))
            columns = [x.values for x in found], [x.ids for x in found]
            values, ids = best([torch.cat(parts, 1) for parts in columns], size)
        if exchange is not None:
            values, ids = best([torch.cat(exchange.gather(x), 1) for x in (values, ids)], size)
        if own is not None:
            ids[ids == own[:, None]] = -1
        return rerank_float64(rows, queries, ids, min(k, len(queries) - (own is not None)))


def nearest_of_all(rows: torch.Tensor, features: Rows, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `nearest`, of features that processes may share, each of which has the same rows."""
    if not isinstance(features, RankedRows):
        return nearest(rows, features, k)
    own = features.local()
    ids = torch.full((len(rows), k), -1, dtype=torch.int64, device=rows.device)
    values = torch.full_like(ids, -torch.inf, dtype=torch.float64)
    if len(own):
        found, similarities = nearest(rows, own, k)
        ids[:, : found.shape[1]] = found + features.own.start
        values[:, : found.shape[1]] = similarities
    gathered = [torch.cat(features.exchange.gather(x), 1) for x in (values, ids)]
    values, ids = best(gathered, min(k, len(features)))
    return ids, values


def certifiable(rows: Rows, size: int) -> bool:
    """Whether `search_certified` finds `size` candidates: it needs held rows, a GPU and Triton."""
    fits = rows.device.type == "cuda" and rows.held and size <= GPU_CANDIDATES
    return fits and compiled_module("transclip_fast.kernels.neighbors") is not None


def search_certified(rows: Rows, found: Candidates, k: int, job: Job) -> int:
    """
    Fill `found` on a GPU; the k nearest other rows of each own row are proven to be in it.

    Returns the number of rows whose candidates were not proven and that were searched again in
    float32; of those that the checkpoint did not have.
    """
    from transclip_fast.kernels.neighbors import candidates, certified  # needs Triton

    (n_rows, dim), half = rows.shape, rows.half()[:]
    lost = (rows[block].double() - half[block].double() for block in rows.blocks())
    errors = torch.cat([torch.linalg.vector_norm(block, dim=1).float() for block in lost])
    again: list[int] = []

    def enter(
        part: Candidates, places: torch.Tensor, ids: torch.Tensor, similarities: torch.Tensor
    ) -> None:
        part.ids[places, : ids.shape[1]] = ids
        values = similarities.float().masked_fill_(ids < 0, -torch.inf)
        part.values[places, : ids.shape[1]] = values

    def search(panel: slice, part: Candidates) -> None:
        ids = torch.arange(panel.start, panel.stop, device=rows.device)
        nearest_ids, products = candidates(half, part.size, panel.start, panel.stop)
        nearest_ids, similarities = rerank_float64(rows[ids], rows, nearest_ids, part.size)
        enter(part, ids - panel.start, nearest_ids, similarities)
        kth = similarities[:, min(k, n_rows - 1) - 1]
        unproven = ids[~certified(kth, products, errors[ids], errors.max(), dim)]
        if len(unproven):
            more = nearest(rows[unproven], rows, part.size, own=unproven)
            enter(part, unproven - panel.start, *more)
        again.append(len(unproven))

    job.search_panels(search, found, GPU_STEP_ROWS, GPU_STEP_ROWS, job.checkpoint.load())
    return sum(again)
