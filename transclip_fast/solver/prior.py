"""The prediction y_hat to which the KL term ties the assignments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from transclip_fast.data.checks import as_tensor
from transclip_fast.data.feature_rows import Rows, UnitRows, evenly_spaced_rows
from transclip_fast.data.priors import as_log_probabilities, as_logits
from transclip_fast.device import exact_float32
from transclip_fast.errors import InputError
from transclip_fast.ops.block_scores import linear_log_prior

PREDICT_ROWS = 16384  # of a block
COMPARED_TABLE_ROWS = 64  # of a table, by processes that share its rows


@dataclass(frozen=True)
class LinearPrior:
    """
    log y_hat = log_softmax(tau F V^T) for prototypes V: text embeddings, or another method's.

    `weights` (K, d) float32 is tau V less its mean over the classes, which cancels in the softmax
    and would only cost digits.
    """

    weights: torch.Tensor
    log_probabilities: None = None  # linear in F, so it joins the score's GEMM instead

    @classmethod
    def from_prototypes(cls, prototypes: torch.Tensor, logit_scale: float) -> LinearPrior:
        weights = prototypes.double() * logit_scale
        return cls((weights - weights.mean(0)).float())

    @property
    def n_classes(self) -> int:
        return len(self.weights)

    def to(self, device: torch.device) -> LinearPrior:
        return LinearPrior(self.weights.to(device))

    def at(self, rows: torch.Tensor) -> torch.Tensor:
        """log y_hat (n, K) of rows (n, d)."""
        return linear_log_prior(rows.to(self.weights.device), self.weights)

    def predict(self, features: UnitRows) -> tuple[np.ndarray, np.ndarray]:
        """Most likely class (N,) int64 of each row and its probability (N,) float32."""
        return most_likely(linear_log_prior(rows, self.weights) for rows in _blocks(features))


@dataclass(frozen=True)
class GivenPrior:
    """
    log y_hat (N, K) float32 of another method, row by row; -inf excludes a class.

    `sample` (n, K) are some rows of the whole table where a process holds a part, for comparison.
    """

    log_probabilities: torch.Tensor
    weights: None = None
    sample: torch.Tensor | None = None

    @property
    def n_classes(self) -> int:
        return self.log_probabilities.shape[1]

    def to(self, device: torch.device) -> GivenPrior:
        return replace(self, log_probabilities=self.log_probabilities.to(device))

    def predict(self, features: UnitRows) -> tuple[np.ndarray, np.ndarray]:
        """Most likely class (N,) int64 of each row and its probability (N,) float32."""
        return most_likely(_blocks(self.log_probabilities))


Prior = LinearPrior | GivenPrior


def log_prior_of(prior: Prior, ids: torch.Tensor, features: Rows) -> torch.Tensor:
    """log y_hat (n, K) of the rows `ids` (n,) of the features."""
    if isinstance(prior, LinearPrior):
        return prior.at(features[ids].float())
    return features.pick(prior.log_probabilities, ids)


def given_prior(
    prior: Any, prior_logits: Any, *, rows: int, own: slice | None = None
) -> GivenPrior:
    """
    Check probabilities (N, K), or else logits (N, K), of another method for that many rows.

    With `own`, those rows only, unless they are wrong.
    """
    if prior is not None and prior_logits is not None:
        raise InputError("give one of prior and prior_logits, not both")
    array, name, check = prior, "prior", as_log_probabilities
    if prior is None:
        array, name, check = prior_logits, "prior_logits", as_logits
    if own is None:
        return GivenPrior(check(array, name, rows=rows))
    array = array.tocsr() if hasattr(array, "tocsr") else as_tensor(array, name)
    read = own if own.start < own.stop else slice(0, 1)
    try:
        if array.shape[0] != rows:
            raise InputError(f"{name}: has {array.shape[0]} rows, expected {rows}, one per query")
        part = check(array[read], name, rows=read.stop - read.start)
        some = evenly_spaced_rows(rows, COMPARED_TABLE_ROWS)
        sample = check(array[some.numpy()], name, rows=len(some))
    except InputError:
        check(array, name, rows=rows)  # names the row by its number among all
        raise
    return GivenPrior(part[: own.stop - own.start], sample=sample)


def _blocks(rows: UnitRows) -> Iterator[torch.Tensor]:
    for start in range(0, max(len(rows), 1), PREDICT_ROWS):
        yield rows[start : start + PREDICT_ROWS]


def most_likely(blocks: Iterable[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """The class (N,) int64 of the largest of each row's log probabilities, and exp of that."""
    with exact_float32():
        best = [block.max(1) for block in blocks]
    labels = torch.cat([block.indices for block in best])
    return labels.cpu().numpy(), torch.cat([block.values for block in best]).exp().cpu().numpy()
