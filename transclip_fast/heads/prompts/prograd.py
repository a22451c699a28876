"""ProGrad: CoOp without the gradients that contradict zero-shot."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from transclip_fast.heads.base import Head
from transclip_fast.heads.prompts.coop import CoOp
from transclip_fast.heads.prompts.learning import train
from transclip_fast.heads.task import HeadTask

LAMBDA = 1.0  # how much of that part is removed


class ProGrad(CoOp):
    """
    CoOp without the part of its gradient that points against that of zero-shot.

    Source: Zhu et al. 2023, Prompt-aligned Gradient for Prompt Tuning, with lambda = 1 and a
    temperature of 1 as in the authors' repository (BeierZhu/Prompt-align). Zero-shot is the
    prediction of the task's text features.
    """

    def __init__(self, task: HeadTask) -> None:
        super().__init__(task)
        self.zero_shot = task.text.to(self.tower.device)

    def descend(self, rows: torch.Tensor, labels: torch.Tensor) -> float:
        logits = self(rows)
        loss = F.cross_entropy(logits, labels)
        general = F.cross_entropy(logits, (self.logit_scale * rows @ self.zero_shot.T).softmax(1))
        (direction,) = torch.autograd.grad(general, self.context, retain_graph=True)
        (gradient,) = torch.autograd.grad(loss, self.context)
        self.context.grad = aligned(gradient, direction)
        return float(loss.detach())


def aligned(gradient: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """
    The gradient, without its part along `direction` if it points against that.

    g - lambda (g . u) u with u = direction / |direction| where g . u < 0, all of the tensor as one
    vector. `direction` is the gradient of the cross-entropy towards zero-shot's probabilities,
    which is that of KL(zero-shot || prediction).
    """
    size = direction.norm()
    if size == 0:
        return gradient
    against = ((gradient * direction).sum() / size).clamp_max(0)
    return torch.sub(gradient, LAMBDA * against * direction / size)


def fit(task: HeadTask) -> Head:
    """Train a context with the task's `prompting`; a PromptHead."""
    return train(ProGrad(task), task)
