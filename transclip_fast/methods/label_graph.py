"""Labels spread over a graph whose nodes are the rows and the labelled rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch

from transclip_fast.data.feature_rows import Rows, UnitRows
from transclip_fast.errors import user_level
from transclip_fast.graph.exact import nearest
from transclip_fast.methods.base import EDGE_BYTES
from transclip_fast.methods.dense import as_assignments, in_blocks
from transclip_fast.ops.torch_backend import TorchOps
from transclip_fast.types import Affinity, row_offsets

BLOCK_CLASSES = 256  # that are spread at a time: columns do not depend on each other


Lists = tuple[torch.Tensor, torch.Tensor]  # nodes of each row (N, k), -1 for none; similarities


def spread_bytes(n_rows: int, n_classes: int, edges: int) -> int:
    """The most bytes of `normalised` and `spread_labels` beside the answer, for edges of a row."""
    return n_rows * (EDGE_BYTES * edges + 8 * min(n_classes, BLOCK_CLASSES))


def nearest_labelled(features: Rows, labelled: UnitRows, k: int) -> Lists:
    """The k most similar labelled rows (M, d) of each row: ids (N, k), similarities float64."""
    found = [nearest(features[block], labelled, k) for block in features.blocks()]
    ids, similarities = zip(*found, strict=True)
    return torch.cat(ids), torch.cat(similarities)


def normalised(
    lists: Iterable[tuple[Lists, float]], n_nodes: int, damping: float = 0.0
) -> Affinity:
    """
    D^(-1/2) (G + G^T) D^(-1/2), D its row sums; `damping` joins D^(1/2).

    G has edges of each row to the nodes of its lists, of weight max(0, similarity)^gamma with the
    gamma beside the list.
    """
    edges = []
    for (nodes, similarities), gamma in lists:
        present = (nodes >= 0) & (similarities > 0)
        rows = torch.arange(len(nodes), device=nodes.device)[:, None].expand_as(nodes)
        edges.append((rows[present], nodes[present], similarities[present].double() ** gamma))
    starts, ends, weights = map(torch.cat, zip(*edges, strict=True))
    rows, columns = torch.cat([starts, ends]), torch.cat([ends, starts])
    weights = torch.cat([weights, weights])
    rows, order = rows.sort(stable=True)
    columns, weights = columns[order], weights[order]
    offsets = row_offsets(rows, n_nodes)
    degrees = torch.segment_reduce(weights, "sum", lengths=offsets.diff(), initial=0.0)
    roots = degrees.sqrt() + damping
    roots[degrees == 0] = 1.0
    return Affinity(offsets, columns, (weights / roots[rows] / roots[columns]).float())


def spread_labels(
    matrix: Affinity,
    labels: torch.Tensor,
    n_classes: int,
    *,
    alpha: float,
    sweeps: int,
    clamped: bool,
) -> torch.Tensor:
    """
    Z <- alpha M Z + Y, so many sweeps from Z = Y; rows of the features come first in M.

    Parameters
    ----------
    matrix : Affinity
        M (N + L, N + L).
    labels : Tensor (L,) int64
        Class of each labelled node: Y is one-hot there, and 0 elsewhere.
    clamped : bool
        Labelled nodes stay at Y.

    Returns
    -------
    Tensor (N, K) float32
        Z of the rows of the features.
    """
    n_nodes, device = len(matrix.offsets) - 1, labels.device
    n_rows = n_nodes - len(labels)
    nodes = torch.arange(n_rows, n_nodes, device=device)
    result = torch.empty(n_rows, n_classes, dtype=torch.float32, device=device)
    ops = TorchOps(matrix)
    for first in range(0, n_classes, BLOCK_CLASSES):
        width = min(BLOCK_CLASSES, n_classes - first)
        own = (labels >= first) & (labels < first + width)
        places = nodes[own], labels[own] - first
        z = torch.zeros(n_nodes, width, dtype=torch.float32, device=device)
        z[places] = 1.0
        spare = torch.empty_like(z)
        for _ in range(sweeps):
            ops.messages(as_assignments(z), out=spare)
            spare *= alpha
            if clamped:
                spare[n_rows:] = 0.0
            spare[places] += 1.0
            z, spare = spare, z
        result[:, first : first + width] = z[:n_rows]
    return result


def as_distributions(z: torch.Tensor, nearest_labels: torch.Tensor) -> torch.Tensor:
    """
    Rows of z >= 0 (N, K) scaled to sums of 1, in place.

    A row that nothing reached gets the class of its most similar labelled row (N,), with a warning.
    """

    def part(rows: slice) -> int:
        block = z[rows]
        totals = block.sum(1, keepdim=True)
        lost = (totals == 0)[:, 0]
        block /= totals.clamp_min(torch.finfo(block.dtype).tiny)
        block[lost, nearest_labels[rows][lost]] = 1.0
        return int(lost.sum())

    if lost := sum(in_blocks(z, part)):
        warnings.warn(
            f"X: no label reached {lost:,} rows over the graph; they have the class of their most "
            "similar labelled row",
            stacklevel=user_level(),
        )
    return z
