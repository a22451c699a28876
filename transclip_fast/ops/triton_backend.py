"""
The operations on sparse assignments on a GPU: a launcher of `transclip_fast.kernels` for each.

Nothing here waits for the GPU, except to read the number of a graph's hub segments once a run.
Scores are fused with their product, in float32 as three products in 16 bits. With a prior or
messages, more candidates, and at the start, products come a chunk at a time. Sums have a fixed
order, so two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from transclip_fast.data.feature_rows import UnitRows
from transclip_fast.kernels import class_sums, energies, select, sweep, top_rows
from transclip_fast.kernels import score as fused
from transclip_fast.kernels.products import HalfWeights, product
from transclip_fast.kernels.segments import SegmentedAffinity
from transclip_fast.ops.blocks import blocks, read_rows
from transclip_fast.ops.torch_backend import TorchOps
from transclip_fast.types import Affinity, Assignments, LinearScore, Scores


class TritonOps(TorchOps):
    """The operations on sparse assignments on a GPU; features are float32 or float16."""

    def __init__(self, affinity: Affinity, nodes: torch.Tensor | None = None) -> None:
        super().__init__(affinity, nodes)
        self._graph = SegmentedAffinity.of(affinity)

    @staticmethod
    def start(
        features: UnitRows,
        weights: torch.Tensor | None,
        log_prior: torch.Tensor | None,
        *,
        out: Assignments,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        n_rows, n_classes = len(features), out.n_classes
        normaliser, tail = out.values.new_empty(n_rows), out.values.new_empty(n_rows)
        log_threshold = torch.full_like(normaliser, out.floor).log_()
        lists = Scores(out.values, out.classes, n_classes, tail, log_threshold)
        top = top_rows.empty_keys(n_classes, features.device)
        for rows, x in _prior_scores(features, weights, log_prior):
            terms = select.ScoreTerms()
            select.select(x, terms, rows.start, out=lists, normaliser=normaliser)
            top_rows.top_rows(x, normaliser, rows.start, out=top)
        out.exponentiate()
        return normaliser, *top_rows.decode(top, n_rows)

    def score(self, features: UnitRows, score: LinearScore, *, out: Scores) -> Scores:
        weights = HalfWeights.of(score.weights, features.dtype)
        linear = score.log_prior is None and score.messages is None
        if linear and out.values.shape[1] <= fused.MAX_CANDIDATES:
            nodes = self._nodes
            if nodes is None:
                nodes = torch.arange(len(features), device=features.device)
            for rows in blocks(len(features), read_rows(features.device)):
                fused.score(features[rows], weights, score.offset, nodes[rows], out=out)
            return out
        terms = select.ScoreTerms(score.offset, score.log_prior, score.prior_weight, score.messages)
        normaliser = torch.empty_like(out.tail)
        for rows, products in _products(features, weights):
            select.select(
                products, terms, rows.start, out=out, normaliser=normaliser, nodes=self._nodes
            )
        return out

    def sweep(
        self, base: Scores, z: Assignments, *, out: Assignments, bounded: bool = True
    ) -> Assignments:
        sweep.sweep(base, self._graph, z, out=out, bounded=bounded)
        return out

    def class_sums(self, z: Assignments, features: UnitRows) -> tuple[torch.Tensor, torch.Tensor]:
        size = min(read_rows(features.device), class_sums.MAX_ENTRIES // z.values.shape[1])
        parts = (
            class_sums.class_sums(z.take(self._nodes_of(rows)), features[rows])
            for rows in blocks(len(features), size)
        )
        sums, counts = next(parts)
        for more_sums, more_counts in parts:
            sums += more_sums
            counts += more_counts
        return sums, counts

    def row_energies(self, z: Assignments) -> torch.Tensor:
        return energies.energies(self._graph, z).double()


def _products(features: UnitRows, weights: HalfWeights) -> Iterator[tuple[slice, torch.Tensor]]:
    """F P^T in chunks of rows (n, K) that stay in the cache; files are read many at a time."""
    n_rows, n_classes = len(features), weights.parts.shape[1]
    chunk = select.chunk_rows(n_classes, n_rows)
    buffer = weights.scale.new_empty(chunk, n_classes)
    for read in blocks(n_rows, read_rows(features.device)):
        block = features[read]
        for part in blocks(len(block), chunk):
            rows = slice(read.start + part.start, read.start + part.stop)
            yield rows, product(block[part], weights, buffer)


def _prior_scores(
    features: UnitRows, weights: torch.Tensor | None, log_prior: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """log y_hat in chunks of rows (n, K), up to a constant a row: see `TorchOps.start`."""
    if weights is not None:
        yield from _products(features, HalfWeights.of(weights, features.dtype))
    elif log_prior is not None:
        n_rows, n_classes = log_prior.shape
        for rows in blocks(n_rows, select.chunk_rows(n_classes, n_rows)):
            yield rows, log_prior[rows]
    else:
        raise TypeError("a prior has weights or log probabilities")
