"""
Scores from int8 products: these shortlist the candidate classes, and the few that matter are
rescored in float32.

On a CPU with AVX512-VNNI int8 products take a quarter of the time. The standard deviation of their
error is known for each row; a class whose error, at four standard deviations, could move z by more
than 1e-4 is rescored. With many such classes, or large errors, float32 throughout is faster.
"""

from __future__ import annotations

import numpy as np
import torch

from transclip_fast.data.feature_rows import UnitRows, evenly_spaced_rows
from transclip_fast.device import multiplies_bytes
from transclip_fast.ops import numba_topk as topk
from transclip_fast.parallel import ThreadBuffer

COST_ROWS = 64  # rows on which the cost is estimated
# Measured costs, in float32 products of one class: of rescoring a class, and of the other work on a
# row.
RESCORED_COST, ROW_COST = 6, 64


class Int8Scores:
    """
    F P^T + c from int8 products, and from float32 products for the classes that matter.

    The mean of a block is subtracted from its rows, because real features share a large mean; each
    row then has a scale of its own. `weights` P (K, d) are centred over the classes: a common part
    would give all scores of a row a common error.
    """

    def __init__(self, weights: torch.Tensor, offset: torch.Tensor) -> None:
        self._weights, self._offset = weights, offset
        self._codes, self._steps, norms = _to_int8(weights, torch.zeros_like(weights[0]))
        self._largest = float(norms.max()), float(self._steps.max())
        self._buffer = ThreadBuffer(torch.int32)

    def is_faster(self, features: UnitRows, log_threshold: np.ndarray) -> bool:
        """
        Whether int8 products are faster than float32 ones, estimated on some rows of (N, d).

        A class is a candidate of a row if its log-softmax is at least `log_threshold` (N,).
        """
        places = evenly_spaced_rows(len(features), COST_ROWS)
        rows = features[places]
        errors = self.errors(rows)
        log_p = torch.addmm(self._offset, rows, self._weights.T).log_softmax(1).numpy()
        rescored = (log_p >= (log_threshold[places] - np.log(errors))[:, None]).sum(1).mean()
        cost = ROW_COST + RESCORED_COST * rescored
        return bool(errors.max() < topk.LARGEST_SCORE_ERROR and cost < len(self._offset))

    def errors(self, rows: torch.Tensor) -> np.ndarray:
        """Errors in nats (n,), at four standard errors, of the int8 scores of rows (n, d)."""
        _, steps, norms = _to_int8(rows, rows.mean(0))
        errors: np.ndarray = topk.score_errors(steps, norms, *self._largest)
        return errors

    def select(self, features: torch.Tensor, first: int, *lists: np.ndarray) -> None:
        """Candidates of a block of rows (n, d): see `numba_topk.select`."""
        products = self._buffer.block(len(features), len(self._offset))
        centre = features.mean(0)
        codes, steps, norms = _to_int8(features, centre)
        torch._int_mm(codes, self._codes.T, out=products)
        centre_scores = torch.addmv(self._offset, self._weights, centre).numpy()
        terms = steps, self._steps, centre_scores, topk.score_errors(steps, norms, *self._largest)
        operands = features.numpy(), self._weights.numpy(), self._offset.numpy()
        topk.select_int8(products.numpy(), *terms, *operands, first, *lists)


def int8_scores(weights: torch.Tensor, offset: torch.Tensor) -> Int8Scores | None:
    """The scores of these weights; None if int8 cannot be faster: few classes, or no VNNI."""
    if len(weights) > ROW_COST and multiplies_bytes(weights.shape[1]):
        return Int8Scores(weights, offset)
    return None


def _to_int8(
    rows: torch.Tensor, centre: torch.Tensor
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Rows (n, d) less the centre as multiples (n, d) int8 of steps (n,), and their norms (n,)."""
    codes = torch.empty(rows.shape, dtype=torch.int8)
    steps, norms = np.empty((2, len(rows)), np.float32)
    topk.to_int8(rows.numpy(), centre.numpy(), codes.numpy(), steps, norms)
    return codes, steps, norms
