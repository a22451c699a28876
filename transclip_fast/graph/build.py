"""Features to neighbour lists: one call for every method."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from transclip_fast.callbacks import Checkpoint, Count, NoCheckpoint
from transclip_fast.data.checks import as_unit_rows
from transclip_fast.data.feature_rows import Rows
from transclip_fast.device import exact_float32
from transclip_fast.errors import InputError
from transclip_fast.graph import certified
from transclip_fast.graph.anchored import anchored_centres
from transclip_fast.graph.best import DECIDE_ROWS, SPARE, BestLists, decide, products
from transclip_fast.graph.exact import search_exact
from transclip_fast.graph.ivf import kmeans_centres
from transclip_fast.graph.probing import ListSearch
from transclip_fast.graph.recall import Sample
from transclip_fast.parallel import parallel_map, single_threaded_torch
from transclip_fast.types import NeighborGraph

METHODS = ("auto", "exact", "ivf", "anchored")
EXACT_ROWS = 20_000  # up to which "auto" searches exactly


def build_graph(
    features: object,
    n_neighbors: int = 3,
    *,
    method: str = "auto",
    recall: float = 0.99,
    anchors: object = None,
    device: torch.device | str = "cpu",
    progress: Count | None = None,
    checkpoint: Checkpoint | None = None,
) -> NeighborGraph:
    """
    The `n_neighbors` most similar other rows of each row, by inner product.

    Parameters
    ----------
    features : array_like or Rows (N, d)
        Unit rows, any float type. What is in a file, as a `numpy.memmap` is, stays there.
    method : str
        "exact" compares all pairs of rows. "ivf" and "anchored" put the rows into lists and
        compare each with the lists nearest to it: the centres are trained by k-means, or start
        from `anchors`. "auto" is exact up to 20,000 rows, then anchored where there are anchors.
    recall : float
        What "ivf" and "anchored" must reach: as many lists are probed as it takes until 1000
        random rows, searched exactly, make it 95 % sure.
    anchors : array_like (K, d), optional
        Class prototypes or means.
    progress : callable, optional
        Called with (rows done, rows in all) after every block. Each round of probes of an
        approximate search counts all rows again.
    checkpoint : Checkpoint, optional
        Keeps what a killed search needs to go on.

    Returns
    -------
    NeighborGraph
        Lists of `n_neighbors` entries, -1 where fewer rows were found. `info` has `method`,
        `recall` and, of an approximate method, `recall_target`, `recall_rows` (the sample),
        `weight_error` (mean by which its similarities fall short), `probes` and `lists`.

    Raises
    ------
    InputError
        Features or anchors that are not finite non-zero rows, `n_neighbors` below 1, `recall`
        outside 0 .. 1, "anchored" without anchors.
    """
    if n_neighbors < 1:
        raise InputError(f"n_neighbors must be a whole number >= 1, got {n_neighbors!r}")
    if not 0 <= recall <= 1:
        raise InputError(f"recall must be between 0 and 1, got {recall!r}")
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    rows = features if isinstance(features, Rows) else Rows(features, "features", device)
    if method == "auto":
        approximate = "ivf" if anchors is None else "anchored"
        method = "exact" if len(rows) <= EXACT_ROWS else approximate
    train = partial(kmeans_centres, rows)
    if method == "anchored":
        if anchors is None:
            raise InputError("anchored: needs anchors, class prototypes or means (K, d)")
        starts = as_unit_rows(anchors, "anchors", columns=rows.shape[1]).to(rows.device)
        train = partial(anchored_centres, rows, starts)
    best = BestLists(len(rows), min(n_neighbors, len(rows)) + SPARE, rows.device)
    progress, checkpoint = progress or _ignore, checkpoint or NoCheckpoint()
    info: dict[str, Any] = {"method": method, "recall": 1.0}
    with exact_float32(), single_threaded_torch():
        if method == "exact" and certified.usable(rows, best.size):
            certified.search_certified(rows, best, n_neighbors, progress, checkpoint)
        elif method == "exact":
            search_exact(rows, best, progress, checkpoint)
        else:
            sample = Sample.draw(rows, n_neighbors)
            search = ListSearch(rows, best, train, checkpoint)
            search.run(lambda: sample.meets(rows, best, recall), progress)
            reached, error = sample.measure(rows, best)
            info |= {
                "recall": reached,
                "recall_target": recall,
                "recall_rows": len(sample.ids),
                "weight_error": error,
                "probes": search.probes,
                "lists": search.n_lists,
            }
        return NeighborGraph(*_decided(rows, best, n_neighbors), info)


def _decided(rows: Rows, best: BestLists, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours (N, k) int64 and their similarities (N, k) float32, -1 and 0 where none."""
    neighbors = best.ids[:, :k].clone()
    similarities = best.values.new_empty(neighbors.shape)

    def order(ids: torch.Tensor) -> None:
        neighbors[ids] = decide(rows[ids], rows, best.ids[ids], neighbors.shape[1])[0]

    def weigh(block: slice) -> None:
        similarities[block] = products(rows[block], rows, neighbors[block]).float()

    parallel_map(order, torch.split(best.doubtful(k, rows.shape[1]), DECIDE_ROWS), rows.device)
    parallel_map(weigh, rows.blocks(), rows.device)
    similarities[neighbors < 0] = 0
    missing = (0, k - neighbors.shape[1])  # more neighbours asked for than there are rows
    neighbors, similarities = (
        torch.nn.functional.pad(neighbors, missing, value=-1),
        torch.nn.functional.pad(similarities, missing),
    )
    return neighbors.cpu().numpy(), similarities.cpu().numpy()


def _ignore(done: int, total: int) -> None:
    pass
