"""
Approximate search: rows are grouped into lists and compared with the lists nearest to them.

A list holds the rows whose nearest centre is the same. All rows that probe a list are multiplied
with it at once, and each product counts for both its rows. Rounds of probes are added until the
neighbours are good enough; no round repeats what an earlier one did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from transclip_fast.callbacks import Checkpoint, Count, SavedState
from transclip_fast.data.feature_rows import Rows
from transclip_fast.graph.exact import Pair, all_pairs, compare, int8_products
from transclip_fast.graph.rerank import BestLists
from transclip_fast.parallel import parallel_map

LISTS_PER_SQRT_ROWS = 2.0  # products of a few large lists are faster than of many small ones
KMEANS_SAMPLE_ROWS_PER_LIST, KMEANS_STEPS = 40, 4
ANCHORS_SAMPLE_ROWS_PER_LIST, ANCHORS_STEPS = 16, 2  # the anchors are near the centres
MAX_LISTS_RATIO, MAX_LENGTH_RATIO = 4, 4  # to the usual number of lists, and rows in a list
KMEANS_BLOCK_ROWS = 1024
SAMPLE_SEED = 0
RANKED_CENTRES = 16  # of each row, ranked before the first round
BLOCK_PRODUCTS = 1 << 22  # of rows with the members of a list they probe, 16 MB in float32


def default_n_lists(n_rows: int) -> int:
    """The usual number of lists for N rows, about 2 sqrt(N)."""
    return min(n_rows, math.ceil(LISTS_PER_SQRT_ROWS * math.sqrt(n_rows)))


def kmeans_centres(rows: Rows) -> torch.Tensor:
    """Centres (L, d): random rows, moved by a few steps of spherical k-means on a sample."""
    n_lists = default_n_lists(len(rows))
    sample = _random_rows(rows, KMEANS_SAMPLE_ROWS_PER_LIST * n_lists)
    return _spherical_kmeans(sample[:n_lists], sample, KMEANS_STEPS)


def anchored_centres(rows: Rows, anchors: torch.Tensor) -> torch.Tensor:
    """
    Centres (L, d) that start from anchors (K, d), class prototypes or means.

    Two k-means steps move them to the rows, because text features lie in another cone. Anchors
    without rows in a sample are dropped; lists several times too long are split by k-means.
    """
    n_lists = default_n_lists(len(rows))
    max_lists = MAX_LISTS_RATIO * n_lists
    size = ANCHORS_SAMPLE_ROWS_PER_LIST * max(n_lists, min(len(anchors), max_lists))
    sample = _random_rows(rows, size)
    centres, lists = _kmeans_step(anchors, sample)
    counts = torch.bincount(lists, minlength=len(anchors))
    usual_length = len(sample) / n_lists
    long = counts > MAX_LENGTH_RATIO * usual_length
    kept = (counts * ~long).argsort(descending=True, stable=True)[:max_lists]
    kept = kept[(counts > 0)[kept] & ~long[kept]]
    centres, crowded = centres[kept], sample[long[lists]]
    if len(crowded):
        starts = crowded[: math.ceil(len(crowded) / usual_length)]
        centres = torch.cat([centres, _spherical_kmeans(starts, crowded, ANCHORS_STEPS)])
    return _spherical_kmeans(centres, sample, ANCHORS_STEPS - 1)


def _random_rows(rows: Rows, size: int) -> torch.Tensor:
    """A random sample of the rows (min(size, N), d), in random order."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SAMPLE_SEED))[:size]
    ordered = order.sort()  # a file is read in order
    return rows[ordered.values][ordered.indices.argsort().to(rows.device)]


def _spherical_kmeans(centres: torch.Tensor, sample: torch.Tensor, steps: int) -> torch.Tensor:
    """Centres (L, d) after some steps of k-means."""
    for _ in range(steps):
        centres, _ = _kmeans_step(centres, sample)
    return centres


def _kmeans_step(centres: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean directions (L, d) of the lists, and the list (S,) of each row of the sample.

    A centre without rows does not move.
    """

    def nearest(block: torch.Tensor) -> torch.Tensor:
        return (block @ centres.T).argmax(1)

    blocks = torch.split(sample, KMEANS_BLOCK_ROWS)
    lists = torch.cat(parallel_map(nearest, blocks, sample.device))
    sums = torch.zeros_like(centres).index_add_(0, lists, sample)
    means = torch.nn.functional.normalize(sums, dim=1)
    return means.where((sums != 0).any(1, keepdim=True), centres), lists


def search_lists(
    rows: Rows,
    best: BestLists,
    train_centres: Callable[[], torch.Tensor],
    good_enough: Callable[[], bool],
    progress: Count,
    checkpoint: Checkpoint,
) -> tuple[int, int]:
    """
    Fill `best` with candidates from the lists nearest to each row, until it is `good_enough`.

    `train_centres` returns the centres (L, d), unless the checkpoint has them. Returns the number
    of lists with which each row was compared, and L.
    """
    state = checkpoint.load()
    if state is None:
        probes, rounds, blocks = 0, 0, 0
        centres = train_centres()
        ranked = _rank_centres(rows, centres, RANKED_CENTRES)
    else:
        best.restore(state)
        probes, rounds, blocks = state["place"].tolist()
        centres, ranked = (
            torch.from_numpy(state[name]).to(rows.device) for name in ("centres", "ranked")
        )

    def current_state() -> SavedState:
        place = [probes, rounds, blocks]
        return best.state(place=place, centres=centres.cpu(), ranked=ranked.cpu())

    n_rows, n_lists, int8 = len(rows), len(centres), None
    while True:
        next_probes = min(_next_probes(probes), n_lists)
        if next_probes > ranked.shape[1]:
            ranked = _rank_centres(rows, centres, 4 * ranked.shape[1])
        pairs = _probing_pairs(ranked, probes, next_probes, n_lists)
        int8 = int8 or int8_products(rows, pairs)
        start = blocks
        for done in compare(rows, pairs[start:], best, int8):
            blocks = start + done
            progress(rounds * n_rows + n_rows * blocks // len(pairs), (rounds + 1) * n_rows)
            checkpoint.keep(current_state)
        probes, rounds, blocks = next_probes, rounds + 1, 0
        if probes == n_lists or good_enough():
            return probes, n_lists


def _next_probes(probes: int) -> int:
    """Probes after the next round: 1, 5, 6, 7, 8, 10, ..."""
    # The first round has each row's own list alone: its finds rule out most other products.
    return {0: 1, 1: 5}.get(probes, probes + probes // 4)


def _rank_centres(rows: Rows, centres: torch.Tensor, size: int) -> torch.Tensor:
    """The nearest centres (N, size) int32 of each row, best first."""
    size = min(size, len(centres))

    def rank(block: slice) -> torch.Tensor:
        return (rows[block] @ centres.T).topk(size, 1).indices.int()

    return torch.cat(parallel_map(rank, rows.blocks(), rows.device))


def _probing_pairs(ranked: torch.Tensor, first: int, stop: int, n_lists: int) -> list[Pair]:
    """Blocks that compare every row with the lists `ranked[:, first:stop]`."""
    members = _group(ranked[:, 0], n_lists)
    if stop == 1:
        return [pair for ids in members for pair in all_pairs(ids)]
    probing = _group(ranked[:, first:stop].flatten(), n_lists)
    return [
        (some, ids)
        for ids, entries in zip(members, probing, strict=True)
        if len(ids)
        for some in torch.split(entries // (stop - first), max(1, BLOCK_PRODUCTS // len(ids)))
    ]


def _group(numbers: torch.Tensor, n_groups: int) -> Sequence[torch.Tensor]:
    """The positions (int64) of each number below `n_groups`."""
    counts = torch.bincount(numbers, minlength=n_groups)
    return torch.split(numbers.argsort(stable=True), counts.tolist())
