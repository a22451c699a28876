"""CLIP-Adapter: image features are blended with the output of a trained bottleneck."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from transclip_fast.heads.base import Head, percent_right, unit
from transclip_fast.heads.task import Task
from transclip_fast.heads.training import first_weights, train, trainable

RATIO = 0.2  # without validation rows
RATIOS = (0.2, 0.4, 0.6, 0.8)
REDUCTION = 4  # d / width of the bottleneck
EPOCHS, RATE = 200, 2e-3


@dataclass(frozen=True, kw_only=True)
class AdapterHead(Head):
    """logits = tau unit(r g(F) + (1 - r) F) T^T with g(F) = relu(relu(F down^T) up^T)."""

    kind: ClassVar[str] = "adapter"
    stored_tensors: ClassVar = {"text": "Kd", "down": "wd", "up": "dw"}
    stored_settings: ClassVar = {"ratio": float}

    down: torch.Tensor  # (d/4, d)
    up: torch.Tensor  # (d, d/4)
    ratio: float  # r

    def block_logits(self, rows: torch.Tensor) -> torch.Tensor:
        adapted = torch.relu(torch.relu(rows @ self.down.T) @ self.up.T)
        blended = unit(self.ratio * adapted + (1 - self.ratio) * rows)
        return self.logit_scale * blended @ self.text.T

    def restrict(self, classes: torch.Tensor) -> AdapterHead:
        return replace(self, text=self.text[classes])

    def transfer(self, text: torch.Tensor) -> AdapterHead:
        return replace(self, text=text)


def fit(task: Task) -> AdapterHead:
    """
    Train both layers; choose the ratio r with the best validation accuracy.

    Source: Gao et al. 2021, CLIP-Adapter: Better Vision-Language Models with Feature Adapters, with
    the image branch only, as in the authors' repository (gaopengcuhk/CLIP-Adapter), which has
    r = 0.2. It names no optimiser: AdamW is that of the same authors' Tip-Adapter-F, the 200 epochs
    are CoOp's with 16 shots. Unit rows lose nothing: g is homogeneous and the blend is normalised,
    so the norm of the features cancels.
    """
    held_out = task.validation
    if held_out is None:
        return _fit(task, RATIO, 0, 1)
    heads = [_fit(task, ratio, place, len(RATIOS)) for place, ratio in enumerate(RATIOS)]
    # The first of equally good ones.
    return max(heads, key=lambda h: percent_right(h.logits(held_out.features), held_out.labels))


def _fit(task: Task, ratio: float, place: int, trainings: int) -> AdapterHead:
    """The head of one ratio; `place` of so many trainings is for the progress."""
    d = task.text.shape[1]
    width = max(1, d // REDUCTION)
    draw = torch.Generator().manual_seed(task.seed)
    down, up = trainable([first_weights(draw, d, width, d), first_weights(draw, width, d, width)])
    head = AdapterHead(
        text=task.text,
        logit_scale=task.logit_scale,
        parameters={"ratio": ratio},
        down=down,
        up=up,
        ratio=ratio,
    )
    optimizer = torch.optim.AdamW([down, up], lr=RATE)
    train(task, head.block_logits, optimizer, epochs=EPOCHS, place=place, trainings=trainings)
    return replace(head, down=down.detach(), up=up.detach())
