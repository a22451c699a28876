"""CLIP-Adapter with learned blends: a small network makes both ratios of each image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from transclip_fast.data.feature_rows import unit
from transclip_fast.heads import clip_adapter
from transclip_fast.heads.base import Head
from transclip_fast.heads.clip_adapter import TEXT_TENSORS, AdapterHead, bottleneck
from transclip_fast.heads.task import HeadTask
from transclip_fast.heads.training import detached, first_weights, train, trainable

SMALLEST_SQUARE = 1e-24  # of a norm that is divided by


@dataclass(frozen=True, kw_only=True)
class BlendedHead(Head):
    """
    logits = tau cos(a g(f) + (1 - a) f, b h(t) + (1 - b) t), g and h two times `bottleneck`.

    The ratios a and b of an image are those of `ratios`.
    """

    kind: ClassVar[str] = "blended-adapters"
    stored_tensors: ClassVar = {
        **AdapterHead.stored_tensors,
        **TEXT_TENSORS,
        "mean_text": "d",
        "blend_image": "ud",
        "blend_text": "ud",
        "blend_ratio": "u",
        "blend_text_ratio": "u",
    }

    down: torch.Tensor  # (d/4, d)
    up: torch.Tensor  # (d, d/4)
    text_down: torch.Tensor  # (d/4, d)
    text_up: torch.Tensor  # (d, d/4)
    mean_text: torch.Tensor  # (d,), of all classes also where the head is restricted to some
    blend_image: torch.Tensor  # (d/4, d)
    blend_text: torch.Tensor  # (d/4, d)
    blend_ratio: torch.Tensor  # (d/4,)
    blend_text_ratio: torch.Tensor  # (d/4,)

    def ratios(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ratios a and b, (n, 1) each: sigmoid(w^T relu(B f + C mean(T))), w of each ratio."""
        hidden = torch.relu(rows @ self.blend_image.T + self.mean_text @ self.blend_text.T)
        return (
            torch.sigmoid(hidden @ self.blend_ratio)[:, None],
            torch.sigmoid(hidden @ self.blend_text_ratio)[:, None],
        )

    def block_logits(self, rows: torch.Tensor) -> torch.Tensor:
        a, b = self.ratios(rows)
        images = unit(a * bottleneck(rows, self.down, self.up) + (1 - a) * rows)
        text, adapted = self.text, bottleneck(self.text, self.text_down, self.text_up)
        # Each image has prototypes (K, d) of its own: their products and norms come without them.
        products = b * (images @ adapted.T) + (1 - b) * (images @ text.T)
        parts = torch.stack([adapted.square(), 2 * adapted * text, text.square()]).sum(2)  # (3, K)
        squares = torch.cat([b.square(), b * (1 - b), (1 - b).square()], 1) @ parts  # (n, K)
        return self.logit_scale * products * squares.clamp_min(SMALLEST_SQUARE).rsqrt()

    def transfer(self, text: torch.Tensor) -> BlendedHead:
        return replace(self, text=text, mean_text=text.mean(0))


def fit(task: HeadTask) -> BlendedHead:
    """
    Train both bottlenecks and the network of the ratios, which start at a half.

    Nothing is left to choose, so no validation set is used.

    Source: Gao et al. 2024, CLIP-Adapter, whose ratios may come from a network of image features
    and classifier weights. It does not describe that network: here it is a bottleneck of the same
    width, on the image and the mean text, trained as in `clip_adapter`.
    """
    d = task.text.shape[1]
    draw = torch.Generator().manual_seed(task.seed)
    weights: dict[str, Any] = clip_adapter.first_bottleneck(draw, task)
    weights |= {f"text_{name}": w for name, w in clip_adapter.first_bottleneck(draw, task).items()}
    width = len(weights["down"])
    for name in ("blend_image", "blend_text"):
        weights[name] = trainable(first_weights(draw, 2 * d, width, d))
    for name in ("blend_ratio", "blend_text_ratio"):
        weights[name] = trainable(weights["blend_text"].new_zeros(width))
    head = BlendedHead(
        text=task.text, mean_text=task.text.mean(0), logit_scale=task.logit_scale, **weights
    )
    optimizer = torch.optim.AdamW(weights.values(), lr=clip_adapter.RATE)
    train(task, head.block_logits, optimizer, epochs=clip_adapter.EPOCHS)
    return replace(head, **detached(weights))
