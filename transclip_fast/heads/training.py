"""The training loop of the heads that are trained on features alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from transclip_fast.heads.task import Task

BATCH_ROWS = 256


def train(
    task: Task,
    logits: Callable[[torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    place: int = 0,
    trainings: int = 1,
) -> None:
    """
    Minimise the cross-entropy of the shots, in shuffled batches of 256 under a cosine schedule.

    `logits` takes rows (n, d) and returns logits (n, K) with gradients to the parameters of the
    optimizer. `place` is the position of this training among several, for the progress.
    """
    features, labels = task.shots.features, task.shots.labels
    draw = torch.Generator().manual_seed(task.seed)
    batches = -(-len(labels) // BATCH_ROWS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=draw)
        for rows in torch.split(order, BATCH_ROWS):
            optimizer.zero_grad()
            F.cross_entropy(logits(features[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        task.progress(place * epochs + epoch + 1, trainings * epochs)


def first_weights(draw: torch.Generator, inputs: int, *shape: int) -> torch.Tensor:
    """Random weights like those of torch's linear layers: uniform up to 1 / sqrt(inputs)."""
    return (2 * torch.rand(shape, generator=draw) - 1) / math.sqrt(inputs)


def trainable(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies that take gradients."""
    return [tensor.clone().requires_grad_() for tensor in tensors]
