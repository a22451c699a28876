"""CLIP-Adapter: a bottleneck on the image features, blended with what went in."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from transclip_fast.heads.task import Head, Task, best, percent_right, unit
from transclip_fast.heads.training import train, trainable

RATIO = 0.2
RATIOS = (0.2, 0.4, 0.6, 0.8)
REDUCTION = 4
EPOCHS, RATE = 200, 2e-3


@dataclass(frozen=True, kw_only=True)
class AdapterHead(Head):
    """
    logits = tau unit(r g(F) + (1 - r) F) T^T with g(F) = relu(relu(F down^T) up^T).

    Parameters
    ----------
    down : Tensor (d/4, d) float32
    up : Tensor (d, d/4) float32
    ratio : float
        r.
    """

    down: torch.Tensor
    up: torch.Tensor
    ratio: float

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
    Train both layers; the ratio r is searched on the validation set where there is one.

    Source: Gao et al. 2021, CLIP-Adapter: Better Vision-Language Models with Feature Adapters, with
    the image branch only, as in the authors' repository (gaopengcuhk/CLIP-Adapter), which has
    r = 0.2. It names no optimiser: AdamW is that of the same authors' Tip-Adapter-F, the 200 epochs
    are CoOp's with 16 shots. Unit rows lose nothing: g is homogeneous and the blend is normalised,
    so the norm of the features cancels.
    """
    ratios = (RATIO,) if task.validation is None else RATIOS
    heads = [_fit(task, ratio, place, len(ratios)) for place, ratio in enumerate(ratios)]

    def score(head: AdapterHead) -> float:
        validation = task.validation
        if validation is None:
            return 0.0
        return percent_right(head.logits(validation.features), validation.labels)

    chosen: AdapterHead = best(heads, score)
    return chosen


def _fit(task: Task, ratio: float, place: int, of: int) -> AdapterHead:
    d = task.text.shape[1]
    width = max(1, d // REDUCTION)
    draw = torch.Generator().manual_seed(task.seed)
    # torch's own start of a linear layer: uniform up to 1 / sqrt(inputs).
    down, up = trainable(
        [
            (2 * torch.rand(outputs, inputs, generator=draw) - 1) / math.sqrt(inputs)
            for outputs, inputs in ((width, d), (d, width))
        ]
    )
    head = AdapterHead(
        text=task.text,
        logit_scale=task.logit_scale,
        parameters={"ratio": ratio},
        down=down,
        up=up,
        ratio=ratio,
    )
    optimizer = torch.optim.AdamW([down, up], lr=RATE)
    train(task, head.block_logits, optimizer, epochs=EPOCHS, done=place, of=of)
    return replace(head, down=down.detach(), up=up.detach())
