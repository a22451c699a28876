"""Directed neighbour lists to the affinity that carries messages between queries."""

from __future__ import annotations

import numpy as np
import torch

from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.ops.exchange import Exchange
from transclip_fast.types import Affinity, row_offsets

GRAPH_MODES = ("symmetric", "directed")


def affinity(
    graph: NeighborGraph,
    *,
    mode: str = "symmetric",
    clamp_similarity: bool = False,
    nodes: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    exchange: Exchange | None = None,
) -> Affinity:
    """
    A = (W + W^T) / 2k ("symmetric") or W / k ("directed"), W being the similarities (N, N).

    Parameters
    ----------
    clamp_similarity : bool
        W is max(0, similarity), as in the paper.
    nodes : Tensor (N,) int64, optional
        The row of A for each row of the graph; the same one by default.
    exchange : Exchange, optional
        Through which other processes send edges to these rows, of which the graph has the lists.
        The columns after those of own rows are then the halo, the neighbours that others own.
    """
    # Memory maps are read-only; torch warns of them.
    neighbors = torch.from_numpy(np.require(graph.neighbors, np.int64, "W")).to(device)
    similarities = torch.from_numpy(np.require(graph.similarities, np.float32, "W")).to(device)
    present = neighbors >= 0
    rows = torch.arange(len(graph), device=device)[:, None].expand_as(neighbors)[present]
    columns, weights = neighbors[present], similarities[present]  # (E,)
    if clamp_similarity:
        weights = weights.clamp_min(0)
    if exchange is not None:
        rows = rows + exchange.partition.rows.start
    if mode == "symmetric":
        back = columns, rows, weights
        if exchange is not None:
            back = exchange.edges(*back)
        rows, columns = torch.cat([rows, back[0]]), torch.cat([columns, back[1]])
        weights = torch.cat([weights, back[2]]) / (2 * graph.n_neighbors)
    else:
        weights = weights / graph.n_neighbors
    if exchange is not None:
        rows, columns = rows - exchange.partition.rows.start, exchange.set_halo(columns, nodes)
        if nodes is not None:
            others = torch.arange(len(exchange.halo.ids), device=nodes.device) + len(nodes)
            nodes = torch.cat([nodes, others])
    if nodes is not None:
        rows, columns = nodes[rows], nodes[columns]
    order = rows.argsort(stable=True)
    offsets = row_offsets(rows, len(graph))
    return Affinity(offsets, columns[order].contiguous(), weights[order].contiguous())
