"""The soft assignments z of the queries to the classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Assignments:
    """
    z (N, K): row i gives `values[i, k]` of its mass to class k; rows sum to 1.

    The full form keeps every class of every row, in class order. Only `ops` relies on the form.
    """

    values: torch.Tensor  # (N, K) float32

    def __len__(self) -> int:
        return len(self.values)

    @property
    def n_classes(self) -> int:
        return self.values.shape[1]

    def labels(self) -> torch.Tensor:
        """Class with the largest mass of each row, (N,) int64."""
        return self.values.argmax(1)

    def empty_like(self) -> Assignments:
        """Room for another z of the same form."""
        return Assignments(torch.empty_like(self.values))

    def dense(self) -> torch.Tensor:
        """z as an (N, K) float32 tensor."""
        return self.values
