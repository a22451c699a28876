"""The training loop of the heads that are trained on features alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from transclip_fast.heads.base import AnyHead, percent_right
from transclip_fast.heads.task import HeadTask

BATCH_ROWS = 256


def train(
    task: HeadTask,
    logits: Callable[[torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    penalty: Callable[[], torch.Tensor] | None = None,
    place: int = 0,
    trainings: int = 1,
) -> None:
    """
    Minimise the cross-entropy of the shots, in shuffled batches of 256 under a cosine schedule.

    `logits` takes rows (n, d) and returns logits (n, K) with gradients to the parameters of the
    optimizer; the result of `penalty`, if given, is added to each cross-entropy. `place` is the
    position of this training among several, for the progress.
    """
    features, labels = task.shots.features, task.shots.labels
    draw = torch.Generator().manual_seed(task.seed)
    batches = -(-len(labels) // BATCH_ROWS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=draw)
        for rows in torch.split(order, BATCH_ROWS):
            optimizer.zero_grad()
            loss = F.cross_entropy(logits(features[rows]), labels[rows])
            if penalty is not None:
                loss = loss + penalty()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        task.progress(place * epochs + epoch + 1, trainings * epochs)


def best_validated(heads: Sequence[AnyHead], task: HeadTask) -> AnyHead:
    """The first head of the best validation accuracy; the first of all without such rows."""
    held_out = task.validation
    if held_out is None:
        return heads[0]
    return max(heads, key=lambda h: percent_right(h.logits(held_out.features), held_out.labels))


def first_weights(draw: torch.Generator, inputs: int, *shape: int) -> torch.Tensor:
    """Random weights like those of torch's linear layers: uniform up to 1 / sqrt(inputs)."""
    return (2 * torch.rand(shape, generator=draw, dtype=torch.float32) - 1) / math.sqrt(inputs)


def trainable(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that takes gradients."""
    return tensor.clone().requires_grad_()


def detached(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Trained weights by name, without gradients."""
    return {name: weight.detach() for name, weight in weights.items()}
