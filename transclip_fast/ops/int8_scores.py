"""Scores from products in 8 bits, for `ops.numba`: where they pay, and what they select."""

from __future__ import annotations

import threading

import numpy as np
import torch

from transclip_fast.data.feature_rows import UnitRows, evenly_spaced_rows
from transclip_fast.device import multiplies_bytes
from transclip_fast.ops import numba_topk as candidates
from transclip_fast.ops.blocks import gemm_rows
from transclip_fast.parallel import CPU

SAMPLE = 64  # rows that say whether it pays
# Classes of a product in float32 that cost as much as one that is scored again, and as what each
# row takes besides.
CLASSES, ROW_CLASSES = 6, 64


class Scan:
    """
    F P^T + c, in 8 bits, and in float32 for the few classes of a row that matter.

    Rows are taken less the mean of their block, and each has a scale of its own: real features
    share a large mean, and are not equally long without it.

    Parameters
    ----------
    weights, offset : Tensor (K, d), (K,) float32
        P and c.
    """

    def __init__(self, weights: torch.Tensor, offset: torch.Tensor) -> None:
        self._weights, self._offset = weights, offset
        self._codes, self._steps, norms = _to_bytes(weights, torch.zeros_like(weights[0]))
        self._largest = float(norms.max()), float(self._steps.max())
        self._buffers = threading.local()

    def pays(self, features: UnitRows, least: np.ndarray) -> bool:
        """
        Whether it is faster than a product in float32, judged by some of the rows.

        Parameters
        ----------
        features : Tensor or Rows (N, d)
        least : ndarray (N,) float32
            Where the candidates of each row begin, relative to its log-sum-exp.
        """
        places = evenly_spaced_rows(len(features), SAMPLE)
        rows = features[places]
        _, steps, norms = _to_bytes(rows, rows.mean(0))
        errors = candidates.errors(steps, norms, *self._largest)
        log_p = torch.addmm(self._offset, rows, self._weights.T).log_softmax(1).numpy()
        again = (log_p >= (least[places] - np.log(errors))[:, None]).sum(1).mean()
        cost = ROW_CLASSES + CLASSES * again
        return bool(errors.max() < candidates.MOST_ERROR and cost < len(self._offset))

    def select(self, features: torch.Tensor, first: int, *lists: np.ndarray) -> None:
        """Candidates of a block of rows (n, d): see `candidates.select`."""
        if not hasattr(self._buffers, "products"):
            size = gemm_rows(CPU, len(self._offset)), len(self._offset)
            self._buffers.products = torch.empty(size, dtype=torch.int32)
        products = self._buffers.products[: len(features)]
        centre = features.mean(0)
        codes, steps, norms = _to_bytes(features, centre)
        torch._int_mm(codes, self._codes.T, out=products)
        candidates.select_scanned(
            products.numpy(),
            steps,
            self._steps,
            torch.addmv(self._offset, self._weights, centre).numpy(),
            candidates.errors(steps, norms, *self._largest),
            features.numpy(),
            self._weights.numpy(),
            self._offset.numpy(),
            first,
            *lists,
        )


def scannable(weights: torch.Tensor) -> bool:
    """Whether scores of so many classes, in so many dimensions, could gain by products of bytes."""
    return len(weights) > ROW_CLASSES and multiplies_bytes(weights.shape[1])


def _to_bytes(
    rows: torch.Tensor, centre: torch.Tensor
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Rows (n, d) less the centre as multiples (n, d) int8 of steps (n,), and their norms (n,)."""
    codes = torch.empty(rows.shape, dtype=torch.int8)
    steps, norms = np.empty((2, len(rows)), np.float32)
    candidates.to_bytes(rows.numpy(), centre.numpy(), codes.numpy(), steps, norms)
    return codes, steps, norms
