"""The training loop that the trained heads share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from transclip_fast.heads.task import Task

BATCH = 256


def train(
    task: Task,
    logits: Callable[[torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    done: int = 0,
    of: int = 1,
) -> None:
    """
    Minimise the cross-entropy of the shots, in shuffled batches of 256 under a cosine schedule.

    Parameters
    ----------
    task : Task
    logits : callable
        Rows (n, d) to logits (n, K), with gradients.
    optimizer : Optimizer
        Of what is trained.
    epochs : int
    done, of : int
        Which of several trainings this is, for the progress.
    """
    features, labels = task.shots.features, task.shots.labels
    draw = torch.Generator().manual_seed(task.seed)
    batches = -(-len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=draw)
        for rows in torch.split(order, BATCH):
            optimizer.zero_grad()
            F.cross_entropy(logits(features[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        task.progress(done * epochs + epoch + 1, of * epochs)


def trainable(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies that take gradients."""
    return [tensor.clone().requires_grad_() for tensor in tensors]
