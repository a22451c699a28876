"""Features to neighbour lists: the choice of a method, its recall, and the final lists."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from transclip_fast.callbacks import Checkpoint, Count, NoCheckpoint
from transclip_fast.data.checks import as_unit_rows
from transclip_fast.data.feature_rows import Rows
from transclip_fast.device import exact_float32
from transclip_fast.errors import InputError
from transclip_fast.graph.exact import nearest, search_exact
from transclip_fast.graph.rerank import (
    RERANK_ROWS,
    SPARE_CANDIDATES,
    BestLists,
    products_float64,
    rerank_float64,
)
from transclip_fast.graph.search import anchored_centres, kmeans_centres, search_lists
from transclip_fast.parallel import parallel_map, single_threaded_torch
from transclip_fast.types import NeighborGraph

METHODS = ("auto", "exact", "ivf", "anchored")
EXACT_ROWS = 20_000  # up to which "auto" searches exactly
RECALL_SAMPLE_ROWS, RECALL_SEED = 1000, 1
CONFIDENCE_STANDARD_ERRORS = 1.645  # one-sided 95 %
FLOAT64_ROUNDING = 1e-9  # a generous bound, for two sums of one product of unit rows


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
        Unit rows of any float type; rows of another norm are normalised, with a warning. A
        `numpy.memmap` is read block by block and never held in memory.
    n_neighbors : int, default 3
    method : {"auto", "exact", "ivf", "anchored"}, default "auto"
        "exact" compares all pairs of rows. "ivf" and "anchored" group the rows into lists and
        compare each row with the lists nearest to it; the centres of the lists come from k-means,
        or start from `anchors`. "auto" is exact up to 20,000 rows, then anchored if there are
        anchors, else ivf.
    recall : float, default 0.99
        For "ivf" and "anchored": more lists are probed until recall, measured on 1,000 exactly
        searched rows, is at least this with 95 % confidence.
    anchors : array_like (K, d), optional
        Class prototypes or means.
    device : torch.device or str, default "cpu"
        Where to search; ignored if `features` are `Rows`, which have a device.
    progress : callable, optional
        Called with (rows done, rows in all) after every block. Each round of probes of an
        approximate search counts all rows again.
    checkpoint : Checkpoint, optional
        Saves the state of the search, from which a later call resumes.

    Returns
    -------
    NeighborGraph
        `neighbors` (N, n_neighbors) int64, best first, -1 where fewer rows were found, and
        `similarities` (N, n_neighbors) float32. `info` has `method`, `recall` and, for an
        approximate method, `recall_target`, `recall_rows` (sample size), `weight_error` (mean
        shortfall of the similarities), `probes` and `lists`.

    Raises
    ------
    InputError
        Features or anchors that are not finite non-zero rows, `n_neighbors` below 1, `recall`
        outside 0 .. 1, an unknown method, or "anchored" without anchors.

    Examples
    --------
    >>> import numpy as np
    >>> from transclip_fast import build_graph
    >>> angles = np.deg2rad([0, 10, 30, 90])
    >>> features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    >>> graph = build_graph(features, n_neighbors=2)
    >>> graph.neighbors
    array([[1, 2],
           [0, 2],
           [1, 0],
           [2, 1]])
    >>> graph.similarities.round(2)
    array([[0.98, 0.87],
           [0.98, 0.94],
           [0.94, 0.87],
           [0.5 , 0.17]], dtype=float32)
    >>> graph.info
    {'method': 'exact', 'recall': 1.0}
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
    train_centres = partial(kmeans_centres, rows)
    if method == "anchored":
        if anchors is None:
            raise InputError("anchored: needs anchors, class prototypes or means (K, d)")
        starts = as_unit_rows(anchors, "anchors", columns=rows.shape[1]).to(rows.device)
        train_centres = partial(anchored_centres, rows, starts)
    best = BestLists(len(rows), min(n_neighbors, len(rows)) + SPARE_CANDIDATES, rows.device)
    progress, checkpoint = progress or (lambda done, total: None), checkpoint or NoCheckpoint()
    info: dict[str, Any] = {"method": method, "recall": 1.0}
    with exact_float32(), single_threaded_torch():
        if method == "exact":
            search_exact(rows, best, n_neighbors, progress, checkpoint)
        else:
            sample = RecallSample.draw(rows, n_neighbors)
            probes, lists = search_lists(
                rows,
                best,
                train_centres,
                lambda: sample.confirms(recall, rows, best.ids),
                progress,
                checkpoint,
            )
            reached, error = sample.measure(rows, best.ids)
            info |= {
                "recall": reached,
                "recall_target": recall,
                "recall_rows": len(sample.ids),
                "weight_error": error,
                "probes": probes,
                "lists": lists,
            }
        return NeighborGraph(*_final_lists(rows, best, n_neighbors), info)


@dataclass(frozen=True)
class RecallSample:
    """Random rows with their exact neighbours, on which the recall of a search is measured."""

    ids: torch.Tensor  # (S,) int64
    rows: torch.Tensor  # (S, d)
    similarities: torch.Tensor  # (S, k) float64 of the nearest other rows; k is cut to N - 1

    @classmethod
    def draw(cls, rows: Rows, k: int) -> RecallSample:
        """At most 1,000 random rows, searched exactly."""
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(RECALL_SEED))
        ids = order[:RECALL_SAMPLE_ROWS].sort().values.to(rows.device)
        own = rows[ids]
        return cls(ids, own, nearest(own, rows, k, own=ids)[1])

    def measure(self, rows: Rows, candidates: torch.Tensor) -> tuple[float, float]:
        """
        Recall and weight error of candidates (N, C) of all rows, -1 for none.

        Recall is the share of the k exact neighbours that are found; a row as similar as the k-th
        counts as one. Weight error is the mean shortfall of the found similarities.
        """
        k = self.similarities.shape[1]
        if k == 0:
            return 1.0, 0.0
        ids, found = rerank_float64(self.rows, rows, candidates[self.ids], k)
        hits = (ids >= 0) & (found >= self.similarities[:, -1:] - FLOAT64_ROUNDING)
        return float(hits.double().mean()), float((self.similarities - found).mean())

    def confirms(self, recall: float, rows: Rows, candidates: torch.Tensor) -> bool:
        """Whether the candidates (N, C) have this recall with 95 % confidence."""
        found, _ = self.measure(rows, candidates)
        error = math.sqrt(found * (1 - found) / max(1, self.similarities.numel()))
        return found - CONFIDENCE_STANDARD_ERRORS * error >= recall


def _final_lists(rows: Rows, best: BestLists, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours (N, k) int64 and similarities (N, k) float32, -1 and 0 for none."""
    neighbors = best.ids[:, :k].clone()
    similarities = best.values.new_empty(neighbors.shape)

    def rerank(ids: torch.Tensor) -> None:
        neighbors[ids] = rerank_float64(rows[ids], rows, best.ids[ids], neighbors.shape[1])[0]

    def weigh(block: slice) -> None:
        similarities[block] = products_float64(rows[block], rows, neighbors[block]).float()

    ambiguous = best.ambiguous_rows(k, rows.shape[1])
    parallel_map(rerank, torch.split(ambiguous, RERANK_ROWS), rows.device)
    parallel_map(weigh, rows.blocks(), rows.device)
    similarities[neighbors < 0] = 0
    missing = (0, k - neighbors.shape[1])  # if N < k
    neighbors, similarities = pad(neighbors, missing, value=-1), pad(similarities, missing)
    return neighbors.cpu().numpy(), similarities.cpu().numpy()
