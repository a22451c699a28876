"""Directed neighbour lists to the affinity that carries messages between queries."""

from __future__ import annotations

import numpy as np
import torch

from transclip_fast.types import Affinity, NeighborGraph

GRAPH_MODES = ("symmetric", "directed")


def affinity(
    graph: NeighborGraph,
    *,
    mode: str = "symmetric",
    clamp_similarity: bool = False,
    nodes: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Affinity:
    """
    A = (W + W^T) / 2k of a directed graph W ("symmetric"), or W / k ("directed").

    Parameters
    ----------
    clamp_similarity : bool
        Weights are max(0, similarity), as the paper writes them.
    nodes : Tensor (N,) int64, optional
        Other numbers for the rows of the graph.
    """
    rows, columns, weights = edges(graph, clamp_similarity=clamp_similarity, device=device)
    if nodes is not None:
        rows, columns = nodes[rows], nodes[columns]
    if mode == "symmetric":
        rows, columns = torch.cat([rows, columns]), torch.cat([columns, rows])
        weights = torch.cat([weights, weights]) / (2 * graph.n_neighbors)
    else:
        weights = weights / graph.n_neighbors
    order = rows.argsort(stable=True)
    offsets = torch.zeros(len(graph) + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(torch.bincount(rows, minlength=len(graph)), 0, out=offsets[1:])
    return Affinity(offsets, columns[order].contiguous(), weights[order].contiguous())


def edges(
    graph: NeighborGraph, *, clamp_similarity: bool, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The entries of W: rows (E,) int64, columns (E,) int64, weights (E,) float32."""
    # The lists of a memory map are read-only, of which torch warns.
    columns = torch.from_numpy(np.require(graph.neighbors, np.int64, "W")).to(device)
    weights = torch.from_numpy(np.require(graph.similarities, np.float32, "W")).to(device)
    rows = torch.arange(len(columns), device=device)[:, None].expand_as(columns)
    present = columns >= 0
    weights = weights[present]
    return rows[present], columns[present], weights.clamp_min(0) if clamp_similarity else weights
