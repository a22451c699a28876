"""
Exact search: every row against every other, in blocks of rows.

Candidates come from float32 products; which of them are nearest is decided in float64, equal ones
by the lower id. Only among more equal rows than there are spare candidates the library chooses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch

from transclip_fast.device import exact_float32
from transclip_fast.errors import InputError
from transclip_fast.graph.lists import NeighborGraph
from transclip_fast.inputs import as_unit_rows

FAISS_ROWS = 4096
BLOCK_BYTES = 1 << 26  # of torch's (rows, N) float32 block of similarities
RANK_ROWS = 512
SPARE = 4  # candidates beyond those asked for, which float32 may have misplaced


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
        Features that are not finite non-zero rows, or `n_neighbors` below 1.
    """
    if n_neighbors < 1:
        raise InputError(f"n_neighbors must be a whole number >= 1, got {n_neighbors!r}")
    rows = as_unit_rows(features, "features").to(device)
    n_rows = len(rows)
    neighbors = np.full((n_rows, n_neighbors), -1, dtype=np.int64)
    similarities = np.zeros((n_rows, n_neighbors), dtype=np.float32)
    use_faiss = _faiss_answers(rows.device)
    step = FAISS_ROWS if use_faiss else _torch_rows(n_rows)
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        found = _candidates(rows[start:stop], rows, n_neighbors + 1 + SPARE, use_faiss)
        own = torch.arange(start, stop, device=rows.device)
        ids, values = _best(rows[start:stop], rows, found, min(n_neighbors, n_rows - 1), own)
        neighbors[start:stop, : ids.shape[1]] = ids.cpu().numpy()
        similarities[start:stop, : ids.shape[1]] = values.cpu().numpy()
        if progress is not None:
            progress(stop, n_rows)
    method = "exact (FAISS)" if use_faiss else "exact (torch)"
    return NeighborGraph(neighbors, similarities, {"method": method, "recall": 1.0})


def nearest(rows: torch.Tensor, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The k most similar queries of each row, best first: ids (M, k) int64, similarities (M, k).

    k is cut to the number of queries; the similarities are float64.
    """
    k = min(k, len(queries))
    blocks = torch.split(rows, _torch_rows(len(queries)))
    found = [
        _best(block, queries, _candidates(block, queries, k + SPARE, use_faiss=False), k)
        for block in blocks
    ]
    ids, values = zip(*found, strict=True)
    return torch.cat(ids), torch.cat(values)


def _torch_rows(n_queries: int) -> int:
    return max(64, BLOCK_BYTES // (4 * n_queries))


def _faiss_answers(device: torch.device) -> bool:
    if device.type != "cpu":
        return False
    try:
        import faiss  # noqa: F401
    except ImportError as error:
        warnings.warn(
            f"the exact search runs in torch, slower: FAISS cannot be imported ({error}); "
            'pip install ".[cpu]" brings it',
            stacklevel=3,
        )
        return False
    return True


def _candidates(rows: torch.Tensor, queries: torch.Tensor, k: int, use_faiss: bool) -> torch.Tensor:
    """Ids (B, k) of the queries with the largest float32 products, in any order."""
    k = min(k, len(queries))
    if use_faiss:
        import faiss

        _, ids = faiss.knn(rows.numpy(), queries.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(ids)
    with exact_float32():
        return (rows @ queries.T).topk(k, dim=1, sorted=False).indices


def _best(
    rows: torch.Tensor,
    queries: torch.Tensor,
    candidates: torch.Tensor,
    k: int,
    own: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best candidates (B, k) of each row, and their similarities in float64."""
    ids = candidates.sort(dim=1).values
    similarity = torch.empty(ids.shape, dtype=torch.float64, device=ids.device)
    for start in range(0, len(rows), RANK_ROWS):
        block = slice(start, start + RANK_ROWS)
        found = queries[ids[block]].double()  # (B, C, d)
        similarity[block] = (found @ rows[block].double()[:, :, None])[:, :, 0]
    if own is not None:
        similarity[ids == own[:, None]] = -torch.inf
    order = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]
    return ids.gather(1, order), similarity.gather(1, order)
