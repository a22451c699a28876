"""
Exact search: every row against all others.

Products in float32, or int8 with a certificate, find the candidates; of a few thousand rows on a
CPU half of the float32 products do (`search_half`). float64 decides among the candidates, and of
equal products the lower ids win. If more rows are equal than there are candidates, any of them may
be found. On a GPU, 16-bit products find the candidates of each row and a bound proves them; a row
whose bound fails is searched again in float32 (`transclip_fast.kernels.neighbors`).
"""

from __future__ import annotations

from functools import partial
from itertools import combinations_with_replacement

import torch

from transclip_fast.data.feature_rows import Rows
from transclip_fast.device import exact_float32
from transclip_fast.graph.candidates import (
    SPARE_CANDIDATES,
    Candidates,
    best,
    float32_rounding,
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
# Of `search_half`: rows of a panel, at least (fewer columns are sorted several times slower);
# panels, at most (rows have room for candidates from each); rows, at most (they take seconds).
HALF_PANEL_ROWS, HALF_PANELS, HALF_ROWS = 512, 16, 1 << 15
GPU_STEP_ROWS = 1 << 16  # rows of a certified search between two checkpoints
GPU_CANDIDATES = 16  # most of each row: with 32 registers spill on sm_100


def search_exact(rows: Rows, found: Candidates, k: int, job: Job) -> None:
    """Fill `found` so that the k nearest other rows of each own row are among its entries."""
    if certifiable(rows, found.size):
        search_certified(rows, found, k, job)
        return
    int8 = int8_products(len(rows) ** 2, rows.shape[1], rows.device) if rows.held else None
    if int8 is None and job.exchange.ranks.size == 1 and is_halved(rows):
        search_half(rows, found, k, job)
        return
    search = partial(_search_panel, rows) if int8 is None else int8.Int8Search(rows).panel
    panel_rows = PANEL_ROWS[rows.device.type]
    if rows.device.type == "cpu":
        panel_rows = equal_rows(job.own.stop - job.own.start, panel_rows)
    job.search_panels(search, found, panel_rows, STEP_ROWS, job.checkpoint.load())


def is_halved(rows: Rows) -> bool:
    """Whether `search_half` is for these rows, if one process searches."""
    there = rows.device.type == "cpu" and rows.held
    return there and 2 * HALF_PANEL_ROWS <= len(rows) <= HALF_ROWS


def search_half(rows: Rows, found: Candidates, k: int, job: Job) -> None:
    """
    Fill `found` from half of all products: that of two rows makes each a candidate of the other.

    A pair of panels of rows has a place of its own in the candidates of either. Of rows with too
    many others as near as the k-th, such as copies, all products decide, as over several processes.
    """
    (n_rows, dim), size = rows.shape, found.size
    panels = list(blocks(n_rows, -(-n_rows // min(HALF_PANELS, n_rows // HALF_PANEL_ROWS))))
    values = torch.full((n_rows, len(panels), size), -torch.inf)
    ids = torch.full_like(values, -1, dtype=torch.int32)

    def enter(panel: slice, place: int, products: torch.Tensor) -> None:
        some, columns = largest(products, size)
        values[panel, place, : some.shape[1]] = some
        ids[panel, place, : some.shape[1]] = columns.int() + panels[place].start

    def search(pair: tuple[int, int]) -> None:
        i, j = pair
        products = rows[panels[i]] @ rows[panels[j]].T
        if i == j:
            products.fill_diagonal_(-torch.inf)  # by id: copies of a row are its neighbours
        else:
            enter(panels[j], i, products.T.contiguous())
        enter(panels[i], j, products)

    def search_again(unclear: torch.Tensor) -> None:
        part = Candidates.empty(len(unclear), size)
        _search_rows(rows, unclear, part)
        found.ids[unclear], found.values[unclear] = part.ids, part.values

    pairs = list(combinations_with_replacement(range(len(panels)), 2))
    for some in blocks(len(pairs), MERGED_TILES):
        parallel_map(search, pairs[some], rows.device)
        job.report(some.stop, len(pairs))
    found.values[:], places = values.flatten(1).topk(size, dim=1)
    found.ids[:] = ids.flatten(1).gather(1, places)
    found.ids[found.values == -torch.inf] = -1
    gaps = found.values[:, min(k, size) - 1] - found.values[:, -1]
    unclear = (gaps <= float32_rounding(dim)).nonzero()[:, 0]
    parallel_map(search_again, torch.split(unclear, PANEL_ROWS["cpu"]), rows.device)


def _search_panel(rows: Rows, panel: slice, found: Candidates) -> None:
    """Fill `found` for a panel of rows, from all their products."""
    _search_rows(rows, torch.arange(panel.start, panel.stop, device=rows.device), found)


def _search_rows(rows: Rows, own: torch.Tensor, found: Candidates) -> None:
    """Fill `found` for the rows `own` (n,), from all their products."""
    block, size = rows[own], found.size + 1  # with the row itself
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
