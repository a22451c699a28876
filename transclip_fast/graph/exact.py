"""
Exact search: all pairs of rows, each product used for both its rows unless there are few rows.

Products in float32, or int8 with a certificate, find the candidates; float64 decides among them,
and of equal products the lower ids win. If more rows are equal than a list has entries, any of
them may be found. On a GPU, 16-bit products find the candidates of each row and a bound proves
them; a row whose bound fails is searched again in float32 (`transclip_fast.kernels.neighbors`).
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from transclip_fast.callbacks import Checkpoint, Count
from transclip_fast.data.feature_rows import Rows
from transclip_fast.device import exact_float32, multiplies_bytes
from transclip_fast.graph.rerank import SPARE_CANDIDATES, BestLists, Finds, rerank_float64
from transclip_fast.ops.blocks import blocks
from transclip_fast.parallel import parallel_map, single_threaded_torch

if TYPE_CHECKING:
    from transclip_fast.graph.int8_products import Int8Products

TILE_ROWS = {"cpu": 1024, "cuda": 16384}  # of a square block of products
# Up to so many rows, computing each product twice costs less than merging lists, and the search
# takes too little time to be resumed.
FEW_ROWS, PANEL_ROWS = 8192, 512
GROUP_COLUMNS = 16  # of a panel, whose maximum is taken first
BATCH_BLOCKS = 32  # at most, between two merges: results do not depend on the number of cores
WAITING_FINDS_PER_ROW, WAITING_FINDS = 8, 1 << 20  # before a merge, which needs ~100 bytes a find
# int8 costs extra work for each block, and most of a second to load compiled code.
INT8_BLOCK_PRODUCTS, INT8_PRODUCTS = 1 << 17, 1 << 27  # at least, in a block and in all of them
GPU_STEP_ROWS = 1 << 16  # rows of a certified search between two checkpoints
GPU_CANDIDATES = 8  # of each row: KEPT of `transclip_fast.kernels.neighbors`
Pair = tuple[torch.Tensor, torch.Tensor]  # ids (R,) and (C,) int64 of the rows of a block


def search_exact(
    rows: Rows, best: BestLists, k: int, progress: Count, checkpoint: Checkpoint
) -> None:
    """Fill `best` so that the k nearest other rows of every row are among its entries."""
    if certifiable(rows, best.size):
        search_certified(rows, best, k, progress, checkpoint)
        return
    if len(rows) <= FEW_ROWS:
        search_few(rows, best)
        progress(len(rows), len(rows))
        return
    pairs = all_pairs(torch.arange(len(rows), device=rows.device))
    state, start = checkpoint.load(), 0
    if state is not None:
        best.restore(state)
        start = int(state["blocks"])
    for done in compare(rows, pairs[start:], best, int8_products(rows, pairs)):
        progress(len(rows) * (start + done) // len(pairs), len(rows))
        checkpoint.keep(partial(best.state, blocks=start + done))


def search_few(rows: Rows, best: BestLists) -> None:
    """Fill the empty lists `best`, each from all products of its row."""
    features = rows[:]
    n_rows, size = len(features), best.size
    n_groups = max(size, math.ceil(n_rows / GROUP_COLUMNS))

    def fill(panel: slice) -> None:
        products = features.new_empty(panel.stop - panel.start, GROUP_COLUMNS * n_groups)
        products[:, n_rows:] = -torch.inf
        torch.mm(features[panel], features.T, out=products[:, :n_rows])
        products.diagonal(offset=panel.start).fill_(-torch.inf)  # no row is its own neighbour
        # The largest products are in the groups of the largest maxima, which are found sooner.
        grouped = products.view(len(products), GROUP_COLUMNS, n_groups)
        groups = grouped.amax(1).topk(size, dim=1).indices
        among = grouped.gather(2, groups[:, None].expand(-1, GROUP_COLUMNS, -1)).flatten(1)
        values, places = among.topk(size, dim=1)
        columns = places // size * n_groups + groups.gather(1, places % size)
        best.values[panel], best.ids[panel] = values, columns.where(values > -torch.inf, -1)

    parallel_map(fill, blocks(n_rows, PANEL_ROWS), rows.device)


def all_pairs(ids: torch.Tensor) -> list[Pair]:
    """Blocks of the rows `ids` (n,) that together hold every pair of them once."""
    tiles = torch.split(ids, TILE_ROWS["cuda" if ids.is_cuda else "cpu"])
    # The diagonal comes first, since its finds rule out most other products.
    diagonal = [(tile, tile) for tile in tiles]
    return diagonal + [(tile, other) for i, tile in enumerate(tiles) for other in tiles[i + 1 :]]


def compare(
    rows: Rows, pairs: Iterable[Pair], best: BestLists, int8: Int8Products | None
) -> Iterator[int]:
    """
    Merge the products of blocks of pairs into `best`; yields the number of blocks done so far.

    A product counts for both its rows; a block with the same tensor twice leaves out each row's
    product with itself. `int8` takes over the large blocks.
    """

    def find(pair: Pair) -> list[Finds]:
        ids, others = pair
        if int8 is not None and len(ids) * len(others) >= INT8_BLOCK_PRODUCTS:
            return int8.find(ids, others, best)
        block = rows[ids]
        if ids is not others:
            return best.find(block @ rows[others].T, ids, others)
        products = block @ block.T
        products.fill_diagonal_(-torch.inf)  # by id: copies of a row are its neighbours
        return [best.top(products, ids, ids)]

    remaining, done, size = iter(pairs), 0, 1
    while batch := list(islice(remaining, size)):
        for finds in parallel_map(find, batch, best.values.device):
            best.add(finds)
        best.merge(min(WAITING_FINDS_PER_ROW * len(best.ids), WAITING_FINDS))
        done += len(batch)
        size = min(2 * size, BATCH_BLOCKS)  # the first blocks find the most
        yield done
    best.merge()


def int8_products(rows: Rows, pairs: Iterable[Pair]) -> Int8Products | None:
    """Int8 products of the rows if they make these blocks faster, else None."""
    n_rows, dim = rows.shape
    possible = rows.held and rows.device.type == "cpu" and multiplies_bytes(dim)
    if not possible or n_rows * n_rows // 2 < INT8_PRODUCTS:
        return None
    sizes = (len(ids) * len(others) for ids, others in pairs)
    if sum(size for size in sizes if size >= INT8_BLOCK_PRODUCTS) < INT8_PRODUCTS:
        return None
    module = _compiled_module("transclip_fast.graph.int8_products")
    return None if module is None else module.Int8Products(rows)


def nearest(
    rows: torch.Tensor, queries: Rows | torch.Tensor, k: int, *, own: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The k most similar queries (N, d) of each row (M, d), best first: their ids (M, k) int64, and
    similarities (M, k) float64; k is cut to the number of queries.

    `own` (M,) int64 is the query that each row itself is, which is not its own neighbour.
    """
    size = min(k + SPARE_CANDIDATES + 1, len(queries))  # with the row itself
    tile = TILE_ROWS["cuda" if rows.is_cuda else "cpu"]

    def top(start: int) -> tuple[torch.Tensor, torch.Tensor]:
        products = block @ queries[start : start + tile].T
        values, places = products.topk(min(size, products.shape[1]), dim=1)
        return values, places + start

    ids = torch.empty(len(rows), size, dtype=torch.int64, device=rows.device)
    with exact_float32(), single_threaded_torch():
        for first in range(0, len(rows), tile):
            block = rows[first : first + tile]
            parts = parallel_map(top, range(0, len(queries), tile), rows.device)
            values, candidates = (torch.cat(part, 1) for part in zip(*parts, strict=True))
            ids[first : first + tile] = candidates.gather(1, values.topk(size, dim=1).indices)
        if own is not None:
            ids[ids == own[:, None]] = -1
        return rerank_float64(rows, queries, ids, min(k, len(queries) - (own is not None)))


def certifiable(rows: Rows, size: int) -> bool:
    """Whether `search_certified` can fill lists of `size`: it needs held rows, a GPU and Triton."""
    fits = rows.device.type == "cuda" and rows.held and size <= GPU_CANDIDATES
    return fits and _compiled_module("transclip_fast.kernels.neighbors") is not None


def search_certified(
    rows: Rows, best: BestLists, k: int, progress: Count, checkpoint: Checkpoint
) -> int:
    """
    Fill `best` on a GPU; the k nearest other rows of every row are proven to be in it.

    Returns the number of rows whose candidates were not proven and that were searched again in
    float32.
    """
    from transclip_fast.kernels.neighbors import candidates, certified  # needs Triton

    (n_rows, dim), half = rows.shape, rows.half()[:]
    lost = (rows[block].double() - half[block].double() for block in rows.blocks())
    errors = torch.cat([torch.linalg.vector_norm(block, dim=1).float() for block in lost])
    state, start, again = checkpoint.load(), 0, 0
    if state is not None:
        best.restore(state)
        start, again = state["place"].tolist()

    def enter(ids: torch.Tensor, found: torch.Tensor, similarities: torch.Tensor) -> None:
        best.ids[ids, : found.shape[1]] = found
        values = similarities.float().masked_fill_(found < 0, -torch.inf)
        best.values[ids, : found.shape[1]] = values

    for first in range(start, n_rows, GPU_STEP_ROWS):
        ids = torch.arange(first, min(first + GPU_STEP_ROWS, n_rows), device=rows.device)
        found, products = candidates(half, first, first + len(ids))
        found, similarities = rerank_float64(rows[ids], rows, found, best.size)
        enter(ids, found, similarities)
        kth = similarities[:, min(k, n_rows - 1) - 1]
        unproven = ids[~certified(kth, products, errors[ids], errors.max(), dim)]
        if len(unproven):
            enter(unproven, *nearest(rows[unproven], rows, best.size, own=unproven))
        again += len(unproven)
        progress(first + len(ids), n_rows)
        checkpoint.keep(partial(best.state, place=[first + len(ids), again]))
    return again


def _compiled_module(name: str) -> Any:
    """A module that needs numba or Triton; None, with a warning, if it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        warnings.warn(f"searched in torch, slower: {error}", stacklevel=4)
        return None
