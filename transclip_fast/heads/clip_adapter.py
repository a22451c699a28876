"""CLIP-Adapter: features of images, texts or both are blended with those of trained bottlenecks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch

from transclip_fast.data.feature_rows import unit
from transclip_fast.heads.base import Head, PrototypeHead
from transclip_fast.heads.task import HeadTask
from transclip_fast.heads.training import (
    best_validated,
    detached,
    first_weights,
    train,
    trainable,
)

RATIOS = (0.2, 0.4, 0.6, 0.8)  # the first without validation rows
IMAGE, TEXT, BOTH = ("ratio",), ("text_ratio",), ("ratio", "text_ratio")  # forms, by their ratios
TEXT_TENSORS = {"text_down": "vd", "text_up": "dv"}
REDUCTION = 4  # d / width of the bottlenecks
EPOCHS, RATE = 200, 2e-3
AnyTextAdapter = TypeVar("AnyTextAdapter", bound="TextAdapter")


def bottleneck(rows: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """g(F) = relu(relu(F down^T) up^T), (n, d) as the rows."""
    return torch.relu(torch.relu(rows @ down.T) @ up.T)


@dataclass(frozen=True, kw_only=True)
class AdapterHead(Head):
    """logits = tau unit(r g(F) + (1 - r) F) T^T with the `bottleneck` g."""

    kind: ClassVar[str] = "adapter"
    stored_tensors: ClassVar = {"text": "Kd", "down": "wd", "up": "dw"}
    stored_settings: ClassVar = dict.fromkeys(IMAGE, float)

    down: torch.Tensor  # (d/4, d)
    up: torch.Tensor  # (d, d/4)
    ratio: float  # r

    def block_logits(self, rows: torch.Tensor) -> torch.Tensor:
        adapted = bottleneck(rows, self.down, self.up)
        blended = unit(self.ratio * adapted + (1 - self.ratio) * rows)
        return self.logit_scale * blended @ self.text.T

    def transfer(self, text: torch.Tensor) -> AdapterHead:
        return replace(self, text=text)


@dataclass(frozen=True, kw_only=True)
class TextAdapter(Head):
    """The part of a head that makes `text` from the texts T: unit(r g(T) + (1 - r) T)."""

    text_down: torch.Tensor  # (d/4, d)
    text_up: torch.Tensor  # (d, d/4)
    text_ratio: float  # r

    def transfer(self: AnyTextAdapter, text: torch.Tensor) -> AnyTextAdapter:
        adapted = bottleneck(text, self.text_down, self.text_up)
        return replace(self, text=unit(self.text_ratio * adapted + (1 - self.text_ratio) * text))


@dataclass(frozen=True, kw_only=True)
class TextAdapterHead(TextAdapter, PrototypeHead):
    """logits = tau F `text`^T."""

    kind: ClassVar[str] = "text-adapter"
    stored_tensors: ClassVar = {**PrototypeHead.stored_tensors, **TEXT_TENSORS}
    stored_settings: ClassVar = dict.fromkeys(TEXT, float)


@dataclass(frozen=True, kw_only=True)
class BothAdaptersHead(TextAdapter, AdapterHead):
    """Logits of `AdapterHead` with the `text` of `TextAdapter`."""

    kind: ClassVar[str] = "both-adapters"
    stored_tensors: ClassVar = {**AdapterHead.stored_tensors, **TEXT_TENSORS}
    stored_settings: ClassVar = dict.fromkeys(BOTH, float)


def fit(task: HeadTask, names: Sequence[str] = IMAGE) -> Head:
    """
    Train the bottleneck of each ratio; choose the ratios with the best validation accuracy.

    `names` is IMAGE, TEXT or BOTH. The first ratio is chosen while the second is 0.2, then the
    second.

    Source: Gao et al. 2024, CLIP-Adapter: Better Vision-Language Models with Feature Adapters,
    which has the three forms, and the authors' repository (gaopengcuhk/CLIP-Adapter), which has
    that of images with r = 0.2. It names no optimiser: AdamW is that of the same authors'
    Tip-Adapter-F, the 200 epochs are CoOp's with 16 shots. Unit rows lose nothing: g is homogeneous
    and the blend is normalised, so the norm of the features cancels.
    """
    steps = 0 if task.validation is None else len(RATIOS) - 1
    trainings = 1 + steps * len(names)
    places = iter(range(trainings))
    best = _trained(task, dict.fromkeys(names, RATIOS[0]), next(places), trainings)
    for name in names if steps else ():
        tried = [{**best.parameters, name: ratio} for ratio in RATIOS[1:]]
        heads = [_trained(task, ratios, next(places), trainings) for ratios in tried]
        best = best_validated([best, *heads], task)
    return best


def _trained(task: HeadTask, ratios: Mapping[str, float], place: int, trainings: int) -> Head:
    """The head of these ratios; `place` of so many trainings is for the progress."""
    draw = torch.Generator().manual_seed(task.seed)
    weights: dict[str, Any] = {}
    for name in ratios:
        side = name.removesuffix("ratio")  # "" or "text_"
        weights |= {f"{side}{layer}": w for layer, w in first_bottleneck(draw, task).items()}
    kind = {IMAGE: AdapterHead, TEXT: TextAdapterHead, BOTH: BothAdaptersHead}[tuple(ratios)]
    head: Head = kind(
        text=task.text, logit_scale=task.logit_scale, parameters={**ratios}, **weights, **ratios
    )

    def logits(rows: torch.Tensor) -> torch.Tensor:
        return head.transfer(task.text).block_logits(rows)

    optimizer = torch.optim.AdamW(weights.values(), lr=RATE)
    train(task, logits, optimizer, epochs=EPOCHS, place=place, trainings=trainings)
    return replace(head, **detached(weights)).transfer(task.text)


def first_bottleneck(draw: torch.Generator, task: HeadTask) -> dict[str, torch.Tensor]:
    """Random layers "down" and "up", which take gradients."""
    d = task.text.shape[1]
    width = max(1, d // REDUCTION)
    down, up = first_weights(draw, d, width, d), first_weights(draw, width, d, width)
    return {"down": trainable(down), "up": trainable(up)}
