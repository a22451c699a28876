"""Unmix-CLIP: projectors of images and texts to a space where the texts of classes are apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from transclip_fast.data.feature_rows import unit
from transclip_fast.heads.base import Head
from transclip_fast.heads.task import HeadTask
from transclip_fast.heads.training import (
    best_validated,
    detached,
    first_weights,
    train,
    trainable,
)

ALPHAS = (7e-5, 7e-4, 7e-3)  # weights of the decorrelation; the first without validation rows
OFF_DIAGONAL = 0.2  # lambda
HIDDEN, OUT = 0.75, 0.5  # widths, in parts of d
EPOCHS, RATE = 100, 2e-3


@dataclass(frozen=True, kw_only=True)
class ProjectedHead(Head):
    """logits = tau unit(F image^T) unit(relu(T hidden^T) out^T)^T."""

    kind: ClassVar[str] = "projected"
    stored_tensors: ClassVar = {"text": "Kd", "image": "pd", "hidden": "hd", "out": "ph"}

    image: torch.Tensor  # (d/2, d)
    hidden: torch.Tensor  # (3d/4, d)
    out: torch.Tensor  # (d/2, 3d/4)

    def block_logits(self, rows: torch.Tensor) -> torch.Tensor:
        return self.logit_scale * unit(rows @ self.image.T) @ self.projected_text().T

    def projected_text(self) -> torch.Tensor:
        """Projected texts (K, d/2), unit rows."""
        return unit(torch.relu(self.text @ self.hidden.T) @ self.out.T)

    def transfer(self, text: torch.Tensor) -> ProjectedHead:
        return replace(self, text=text)


def decorrelation(rows: torch.Tensor) -> torch.Tensor:
    """sum_i (S_ii - 1)^2 + lambda sum_{i != j} S_ij^2, S (K, K) the products of rows (K, d)."""
    identity = torch.eye(len(rows), dtype=rows.dtype)
    weights = OFF_DIAGONAL + (1 - OFF_DIAGONAL) * identity
    return (weights * (rows @ rows.T - identity).square()).sum()


def fit(task: HeadTask) -> ProjectedHead:
    """
    Minimise cross-entropy + alpha `decorrelation`; choose alpha by validation accuracy.

    Both projectors start at random, so that nothing is left of zero-shot: this takes more shots of
    a class than methods that start from the text, and a class without shots is hardly found.

    Source: Rawlekar et al. 2025, Disentangling CLIP Features for Enhanced Localized Understanding
    (Unmix-CLIP, later DCLIP); widths, lambda and the first alpha as in public implementations of
    it: a linear projector of images, 512 -> 256, and one of texts with a hidden layer, 512 -> 384
    -> 256. It trains on patches of COCO by SGD with an asymmetric loss, for many labels an image; a
    shot has one label, hence the cross-entropy, and there are few, hence AdamW. Tried with 16 shots
    on WHU-RS19 and DTD, the asymmetric loss is far less accurate.
    """
    alphas = ALPHAS[:1] if task.validation is None else ALPHAS
    heads = [_trained(task, alpha, place, len(alphas)) for place, alpha in enumerate(alphas)]
    return best_validated(heads, task)


def _trained(task: HeadTask, alpha: float, place: int, trainings: int) -> ProjectedHead:
    """The head of one alpha; `place` of so many trainings is for the progress."""
    d = task.text.shape[1]
    hidden, out = (max(1, int(part * d)) for part in (HIDDEN, OUT))
    draw = torch.Generator().manual_seed(task.seed)
    shapes = {"image": (out, d), "hidden": (hidden, d), "out": (out, hidden)}
    weights: dict[str, Any] = {
        name: trainable(first_weights(draw, shape[1], *shape)) for name, shape in shapes.items()
    }
    head = ProjectedHead(
        text=task.text, logit_scale=task.logit_scale, parameters={"alpha": alpha}, **weights
    )

    def penalty() -> torch.Tensor:
        return alpha * decorrelation(head.projected_text())

    optimizer = torch.optim.AdamW(weights.values(), lr=RATE)
    schedule = {"epochs": EPOCHS, "place": place, "trainings": trainings}
    train(task, head.block_logits, optimizer, penalty=penalty, **schedule)
    return replace(head, **detached(weights))
