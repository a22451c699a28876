"""Class sums of a block of rows, and the mass that sparse rows dropped."""

from __future__ import annotations

import torch

from transclip_fast.ops.blocks import blocks
from transclip_fast.parallel import parallel_map
from transclip_fast.types import Assignments

SUM_CLASSES = 256  # classes that one thread sums


def add_class_sums(
    z: Assignments, features: torch.Tensor, sums: torch.Tensor, counts: torch.Tensor
) -> None:
    """Add a block of rows to the sums (K + 1, d) and counts (K + 1,), dropped mass to the last."""

    def part(classes: slice) -> None:
        values = z.dense(classes)
        sums[classes].add_(values.T @ features)
        counts[classes].add_(values.sum(0, dtype=torch.float64))

    parallel_map(part, blocks(z.n_classes, SUM_CLASSES), features.device)
    if z.classes is not None:
        dropped = 1 - z.values.sum(1)
        sums[-1] += dropped @ features
        counts[-1] += dropped.sum(dtype=torch.float64)


def share_dropped(
    z: Assignments, sums: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Share the last row of `sums` (K + 1, d) and `counts` (K + 1,), sum_i m_i f_i and sum_i m_i of
    the mass m_i that rows dropped, among the K classes as the kept mass is shared.

    Without it the kept mass and the sum of all squares belong to different sets of rows, and the
    variance is wrong by tens of percent. Dense rows drop nothing.
    """
    if z.classes is None:
        return sums[:-1], counts[:-1]
    share = counts[:-1] / counts[:-1].sum()
    return sums[:-1].addr_(share, sums[-1]), counts[:-1] + share * counts[-1]
