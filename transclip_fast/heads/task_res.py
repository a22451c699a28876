"""TaskRes: a trained residual on every text prototype."""

from __future__ import annotations

import torch

from transclip_fast.data.feature_rows import unit
from transclip_fast.heads.base import PrototypeHead
from transclip_fast.heads.task import HeadTask
from transclip_fast.heads.training import train, trainable

ALPHA = 0.5
RATE = 1e-3
EPOCHS = 200
FEW_SHOTS, FEW_SHOTS_EPOCHS = 4, 100  # up to so many shots a class


def fit(task: HeadTask) -> PrototypeHead:
    """
    Prototypes unit(T + alpha X), X (K, d) trained from zero.

    Source: Yu et al. 2023, Task Residual for Tuning Vision-Language Models, and the authors'
    repository (geekyutao/TaskRes): alpha = 0.5, Adam, 100 epochs up to 4 shots and 200
    beyond. Its learning rate of 2e-3 is for text embeddings as they leave the encoder; on unit rows
    half of it does as well with 4 and 16 shots, and loses nothing with one.
    """
    residual = trainable(torch.zeros_like(task.text))

    def prototypes() -> torch.Tensor:
        return unit(task.text + ALPHA * residual)

    def logits(rows: torch.Tensor) -> torch.Tensor:
        return task.logit_scale * rows @ prototypes().T

    epochs = FEW_SHOTS_EPOCHS if task.n_shots <= FEW_SHOTS else EPOCHS
    train(task, logits, torch.optim.Adam([residual], lr=RATE), epochs=epochs)
    return PrototypeHead(
        text=prototypes().detach(), logit_scale=task.logit_scale, parameters={"alpha": ALPHA}
    )
