"""Class sums of a block of rows."""

from __future__ import annotations

import torch

from transclip_fast.ops.blocks import blocks
from transclip_fast.parallel import parallel_map
from transclip_fast.types import Assignments

SUM_CLASSES = 256  # classes that one thread sums


def add_class_sums(
    z: Assignments, features: torch.Tensor, sums: torch.Tensor, counts: torch.Tensor
) -> None:
    """Add a block of rows to the sums (K, d) and counts (K,)."""

    def part(classes: slice) -> None:
        values = z.dense(classes)
        sums[classes].add_(values.T @ features)
        counts[classes].add_(values.sum(0, dtype=torch.float64))

    parallel_map(part, blocks(z.n_classes, SUM_CLASSES), features.device)
