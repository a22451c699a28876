"""
The published code's two errors in the few-shot graph, repeated on purpose for comparison.

A shot loses its most similar query, as if that were the shot itself; and neighbour lists are
stacked W = [support; query], while the assignments they weigh are [z; Y] = [query; support].
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from transclip_fast.estimator import TransCLIP
from transclip_fast.graph.build import build_graph
from transclip_fast.graph.exact import nearest_of_all
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.solver.loop import solve
from transclip_fast.solver.problem import Problem, Settings
from transclip_fast.solver.support import Support, support_messages


def fit_published_rows(model: TransCLIP, X: Any, text_features: Any, **arrays: Any) -> TransCLIP:
    """Fit the model as `TransCLIP.fit` does, with the published code's graph; gamma is given."""
    if model.graph_mode != "symmetric":
        raise ValueError("the published code has graph_mode='symmetric' only")
    problem = Problem.check(X, text_features, logit_scale=model.logit_scale, **arrays)
    settings = Settings.resolve(model, problem)
    inputs = problem.load(settings)
    own = build_graph(inputs.features, model.n_neighbors, device=settings.device)
    graph, support, gamma = own, inputs.support, None
    if support is not None and problem.support is not None:
        shots = problem.support.to(settings.device)
        lists = nearest_of_all(shots.features, inputs.features, model.n_neighbors + 1)
        clamp = model.clamp_similarity
        graph, support = shifted(own, support, shots.labels, lists, clamp_similarity=clamp)
        (gamma,) = problem.gammas(model)
    inputs = replace(inputs, support=support)
    return model._keep(solve(inputs, graph, settings, gamma), inputs, settings, own)


def shifted(
    graph: NeighborGraph,
    support: Support,
    labels: torch.Tensor,
    lists: tuple[torch.Tensor, torch.Tensor],
    *,
    clamp_similarity: bool = False,
) -> tuple[NeighborGraph, Support]:
    """
    Graph and support with both errors.

    `lists` are the most similar queries (M, k + 1) of the shots, with labels (M,), and how similar.
    """
    (n_queries, k), device = graph.neighbors.shape, labels.device
    ids, weights = (array[:, 1:].cpu().numpy() for array in lists)
    fewer = ((0, 0), (0, k - ids.shape[1]))
    ids = np.concatenate([np.pad(ids, fewer, constant_values=-1), graph.neighbors])
    weights = np.concatenate([np.pad(weights, fewer), graph.similarities])
    if clamp_similarity:
        weights = weights.clip(0)
    # Query i receives row i of W^T [z; Y] + W z. In both terms the first N lists of W meet z, list
    # r that of query r: to the graph, the shots' lists are those of the first M queries, and the
    # list of query q is that of query q + M. The other M lists, as a rule those of the last M
    # queries, meet Y in the first term alone: the rows they name receive a one-hot label.
    mixed = NeighborGraph(ids[:n_queries], weights[:n_queries], graph.info)
    messages = support_messages(
        torch.from_numpy(ids[n_queries:]).to(device),
        torch.from_numpy(weights[n_queries:]).to(device) / (2 * k),
        labels,
        (n_queries, len(support.moments.counts)),
    )
    return mixed, replace(support, messages=messages)
