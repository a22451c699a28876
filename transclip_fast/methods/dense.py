"""Dense (N, K) arrays: the solver's operations on them, and work in blocks of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from transclip_fast.data.feature_rows import Rows
from transclip_fast.ops.blocks import block_rows, blocks
from transclip_fast.ops.torch_backend import TorchOps
from transclip_fast.parallel import parallel_map
from transclip_fast.types import Affinity, Assignments, LinearScore, Scores

Returned = TypeVar("Returned")


def no_edges(n_rows: int, device: torch.device) -> Affinity:
    """The affinity of a method without a graph."""
    none = torch.zeros(0, dtype=torch.int64, device=device)
    offsets = torch.zeros(n_rows + 1, dtype=torch.int64, device=device)
    return Affinity(offsets, none, none.float())


class Dense:
    """
    The products of the features (N, d) of one run with K classes.

    `affinity` is that of `sweep`.
    """

    def __init__(self, features: Rows, n_classes: int, affinity: Affinity | None = None) -> None:
        self._features, self._n_classes = features, n_classes
        self._ops = TorchOps(affinity or no_edges(len(features), features.device))

    def scores(
        self, weights: torch.Tensor, offset: torch.Tensor | None = None, out: Scores | None = None
    ) -> Scores:
        """
        x.w_k + c_k of all rows, from (K, d) and (K,) of any float type, up to a constant a row.

        What all classes share is left out, so that float32 is more exact.
        """
        offset = weights.new_zeros(len(weights)) if offset is None else offset
        out = self.new_scores() if out is None else out
        return self.products(weights - weights.mean(0), offset - offset.mean(), out)

    def products(self, weights: torch.Tensor, offset: torch.Tensor, out: Scores) -> Scores:
        """x.w_k + c_k of all rows, in `out`, which is returned."""
        score = LinearScore(weights.float(), offset.float())
        return self._ops.score(self._features, score, out=out)

    def new_scores(self) -> Scores:
        """Room for scores."""
        n_rows, device = len(self._features), self._features.device
        max_message = torch.zeros(n_rows, dtype=torch.float32, device=device)
        return Scores.empty(max_message, self._n_classes, None)

    def new_assignments(self) -> Assignments:
        """Room for assignments."""
        device = self._features.device
        return Assignments.empty(len(self._features), self._n_classes, None, device)

    def start(self, weights: torch.Tensor) -> tuple[Assignments, torch.Tensor]:
        """z = softmax of x.w_k, and the log-sum-exp (N,) of each row."""
        z = self.new_assignments()
        return z, self._ops.start(self._features, weights.float(), None, out=z)[0]

    def sweep(self, base: Scores, z: Assignments, out: Assignments) -> Assignments:
        """softmax of base + A z, in `out`."""
        return self._ops.sweep(base, z, out=out)

    def class_sums(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Z^T X (K, d) and Z^T 1 (K,) float64 of weights (N, K), which may be of any sign."""
        return self._ops.class_sums(as_assignments(values), self._features)

    def negative_energy(self, z: Assignments, base: Scores) -> float:
        """sum_ij A_ij z_i.z_j + sum_ik z_ik base_ik - sum_ik z_ik log z_ik."""
        pairwise, entropy = self._ops.energies(z)
        return float(pairwise - entropy + self._ops.expectation(z, base.values))


def as_assignments(values: torch.Tensor) -> Assignments:
    """Assignments of every class."""
    return Assignments(values, None, values.shape[1], values.new_zeros(len(values)))


def in_blocks(values: torch.Tensor, function: Callable[[slice], Returned]) -> list[Returned]:
    """The results of `function` for each block of rows of (N, K), in threads on a CPU."""
    rows = blocks(len(values), block_rows(values.device, values.shape[1]))
    return parallel_map(function, rows, values.device)


def softmax_(values: torch.Tensor) -> torch.Tensor:
    """Softmax of each row of (N, K), in place; returns the mean of all rows (K,) float64."""

    def part(rows: slice) -> torch.Tensor:
        p = torch.softmax(values[rows], 1, out=values[rows])
        return p.sum(0, dtype=torch.float64)

    return torch.stack(in_blocks(values, part)).sum(0) / len(values)


def mean_row(features: Rows) -> torch.Tensor:
    """Mean of all rows (d,) float64."""
    ones = torch.ones(len(features), 1, dtype=torch.float32, device=features.device)
    sums, counts = Dense(features, 1).class_sums(ones)
    return sums[0] / counts
