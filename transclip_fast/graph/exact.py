"""Exact search: every row against every other, in blocks of rows."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable

import numpy as np
import torch

from transclip_fast.device import exact_float32
from transclip_fast.graph.lists import NeighborGraph
from transclip_fast.inputs import as_unit_rows

FAISS_ROWS = 4096
BLOCK_BYTES = 1 << 26  # of torch's (rows, N) float32 block of similarities


def build_graph(
    features: object,
    n_neighbors: int = 3,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> NeighborGraph:
    """
    The `n_neighbors` most similar other rows of each row, by inner product.

    FAISS searches where the features are on the CPU and it is installed, blockwise torch
    elsewhere; a missing FAISS is announced with a warning.

    Parameters
    ----------
    features : array_like (N, d)
        Unit rows, any float type.
    progress : callable, optional
        Called with (rows done, N) after every block.

    Returns
    -------
    NeighborGraph
        Lists of `n_neighbors` entries, -1 where N has fewer other rows.

    Raises
    ------
    InputError
        Features that are not finite non-zero rows.
    """
    rows = as_unit_rows(features, "features").to(device)
    n_rows = len(rows)
    neighbors = np.full((n_rows, n_neighbors), -1, dtype=np.int64)
    similarities = np.zeros((n_rows, n_neighbors), dtype=np.float32)
    use_faiss = _faiss_answers(rows.device)
    step = FAISS_ROWS if use_faiss else _torch_rows(n_rows)
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        ids, values = _search(rows[start:stop], rows, n_neighbors + 1, use_faiss)
        ids, values = _without_self(ids, values, np.arange(start, stop), n_neighbors)
        neighbors[start:stop, : ids.shape[1]] = ids
        similarities[start:stop, : ids.shape[1]] = values
        if progress is not None:
            progress(stop, n_rows)
    method = "exact (FAISS)" if use_faiss else "exact (torch)"
    return NeighborGraph(neighbors, similarities, {"method": method, "recall": 1.0})


def nearest(rows: torch.Tensor, queries: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """
    The k most similar queries of each row, best first: ids (M, k) int64, similarities (M, k).

    k is cut to the number of queries.
    """
    step = _torch_rows(len(queries))
    found = [
        _search(rows[start : start + step], queries, k, use_faiss=False)
        for start in range(0, len(rows), step)
    ]
    ids, values = zip(*found, strict=True)
    return np.concatenate(ids), np.concatenate(values)


def _torch_rows(n_queries: int) -> int:
    return max(64, BLOCK_BYTES // (4 * n_queries))


def _faiss_answers(device: torch.device) -> bool:
    if device.type != "cpu":
        return False
    if importlib.util.find_spec("faiss") is None:
        warnings.warn(
            "FAISS is not installed: the exact search runs in torch, slower; "
            "pip install 'transclip-fast[cpu]' brings it",
            stacklevel=3,
        )
        return False
    return True


def _search(
    rows: torch.Tensor, queries: torch.Tensor, k: int, use_faiss: bool
) -> tuple[np.ndarray, np.ndarray]:
    k = min(k, len(queries))
    if use_faiss:
        import faiss

        values, ids = faiss.knn(rows.numpy(), queries.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
        return ids, values
    with exact_float32():
        best = (rows @ queries.T).topk(k, dim=1)
    return best.indices.cpu().numpy(), best.values.cpu().numpy()


def _without_self(
    ids: np.ndarray, values: np.ndarray, own: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each list without the row's own id, wherever it stands; at most k entries."""
    # An exact duplicate can push the row itself out of its list: then the last entry goes.
    keep = np.argsort(ids == own[:, None], axis=1, kind="stable")[:, : min(k, ids.shape[1] - 1)]
    return np.take_along_axis(ids, keep, 1), np.take_along_axis(values, keep, 1)
