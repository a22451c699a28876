"""The graph that a fit is given, and whether it is of the same rows."""

from __future__ import annotations

import warnings

import torch

from transclip_fast.data.feature_rows import Rows, evenly_spaced_rows
from transclip_fast.errors import InputError, user_level
from transclip_fast.graph.build import build_graph
from transclip_fast.graph.neighbor_graph import GraphSource, NeighborGraph
from transclip_fast.ops.ranked import RankedRows

COMPARED_LISTS = 64  # of a given graph, with the rows
NEARER = 0.75  # share of neighbours that are nearer than those of other rows; half by chance
SIMILARITY_TOLERANCE = 0.02  # rows of half precision, or rounded to 8 bits, differ by less


def given_graph(graph: GraphSource, features: Rows, n_neighbors: int) -> NeighborGraph:
    """
    The graph of the `features` that a fit is given, or its own.

    Of a process alone a given one is checked, and warns of another order of the rows; of several
    processes `check` follows.
    """
    if graph is None:
        return build_graph(features, n_neighbors)
    if not (callable(graph) or isinstance(graph, NeighborGraph)):
        raise InputError(f"graph: expected a NeighborGraph, got {type(graph).__name__}")
    found = graph if isinstance(graph, NeighborGraph) else graph(features)
    if not isinstance(found, NeighborGraph):
        raise InputError(
            f"graph: the function returned {type(found).__name__}, expected a NeighborGraph"
        )
    if isinstance(features, RankedRows):
        return found
    found = found.check(len(features), n_neighbors)
    _warn_of_other_rows(found, features)
    return found


def _warn_of_other_rows(graph: NeighborGraph, features: Rows) -> None:
    """
    Warn if most similarities of some lists are not the inner products of these rows.

    Similarities may be scaled: not where the neighbours are more similar than those of other rows.
    """
    ids = evenly_spaced_rows(len(graph), COMPARED_LISTS)
    neighbors = torch.from_numpy(graph.neighbors[ids.numpy()])
    similarities = torch.from_numpy(graph.similarities[ids.numpy()])
    rows = features[ids.to(features.device)].double()
    theirs = features[neighbors.clamp_min(0).flatten().to(features.device)].double()
    theirs = theirs.view(*neighbors.shape, -1)
    products = torch.einsum("nd,nkd->nk", rows, theirs).cpu()
    of_others = torch.einsum("nd,nkd->nk", rows, theirs.roll(len(ids) // 2, 0)).cpu()
    there = neighbors >= 0
    wrong = ((products - similarities).abs() > SIMILARITY_TOLERANCE) & there
    nearer = (products > of_others)[there].double().mean()
    if 2 * int(wrong.sum()) > int(there.sum()) and nearer < NEARER:
        row, place = (int(i) for i in wrong.nonzero()[0])
        warnings.warn(
            f"graph: says that rows {int(ids[row])} and {int(neighbors[row, place])} have the "
            f"similarity {similarities[row, place]:.3g}, and they have {products[row, place]:.3g}; "
            "as most others differ, too, it seems to be of other rows, or of another order: build "
            "it again",
            stacklevel=user_level(),
        )
