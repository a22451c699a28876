"""
Approximate search on a GPU by cuVS's NN-descent.

Written to cuVS's documentation (26.10); no GPU has run it.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from transclip_fast.data.feature_rows import Rows
from transclip_fast.errors import InputError
from transclip_fast.graph.candidates import Candidates, without_self

GRAPH_DEGREE = 64  # neighbours that NN-descent keeps of each row, and twice as many on the way


def cuvs_installed() -> bool:
    """Whether `import cuvs` would find cuVS."""
    return find_spec("cuvs") is not None


def check_cuvs(device: torch.device, held: bool) -> None:
    """InputError unless a GPU holds the rows, and cuVS is installed."""
    if not (device.type == "cuda" and held):
        raise InputError("search 'cuvs' needs rows that a GPU holds, with device='cuda'")
    if not cuvs_installed():
        raise InputError("search 'cuvs': cuVS is not installed: pip install cuvs-cu13")


def search_cuvs(rows: Rows, found: Candidates) -> None:
    """
    Fill the entries of every row.

    The rows are held on a GPU. Raises InputError if cuVS cannot be imported.
    """
    try:
        from cuvs.common import Resources
        from cuvs.neighbors import all_neighbors, nn_descent
    except ImportError as error:
        raise InputError(
            f"search 'cuvs': cuVS cannot be imported ({error}): pip install cuvs-cu13"
        ) from None

    size = found.size + 1  # with the row itself
    degree = max(GRAPH_DEGREE, size)
    # Distances of unit rows order them as products do, and none is negative.
    metric = "sqeuclidean"
    descent = nn_descent.IndexParams(
        metric=metric, graph_degree=degree, intermediate_graph_degree=2 * degree
    )
    parameters = all_neighbors.AllNeighborsParams(
        algo="nn_descent", metric=metric, nn_descent_params=descent
    )
    ids = torch.full((len(rows), size), -1, device=rows.device)
    distances = torch.full((len(rows), size), torch.inf, device=rows.device)
    resources = Resources()
    arrays = {"indices": ids, "distances": distances, "resources": resources}
    all_neighbors.build(rows[:], size, parameters, **arrays)
    resources.sync()
    ids.masked_fill_((ids < 0) | (ids >= len(rows)), -1)
    own = torch.arange(len(rows), device=rows.device)
    found.ids, found.values = without_self(ids, 1 - distances / 2, own)
