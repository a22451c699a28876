"""CoOp: the context of the prompts is learned, the class names stay words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from transclip_fast.errors import InputError
from transclip_fast.heads.base import BOUND, Head, PrototypeHead
from transclip_fast.heads.prompts.context import (
    ContextHead,
    class_prompts,
    first_context,
    nearest_words,
)
from transclip_fast.heads.prompts.learning import Learner, train
from transclip_fast.heads.task import HeadTask
from transclip_fast.heads.text_tower import TextTower


@dataclass(frozen=True, kw_only=True)
class PromptHead(ContextHead, PrototypeHead):
    """Prototypes from a text tower: class names in a learned context."""

    kind: ClassVar[str] = "prompts"
    stored_tensors: ClassVar = {"text": "Kd", "context": "nv Knv"}

    context: torch.Tensor  # (n_ctx, width), or (K, n_ctx, width) with one for each class

    def restrict(self, classes: torch.Tensor) -> PromptHead:
        head = super().restrict(classes)
        if self.context.ndim == 2:
            return head
        n_ctx, chosen = self.context.shape[1], classes.tolist()
        words = [word for k in chosen for word in self.words[k * n_ctx : (k + 1) * n_ctx]]
        return replace(head, context=self.context[classes], words=words)

    @torch.no_grad()
    def for_classes(self, tower: TextTower, class_names: Sequence[str]) -> PromptHead:
        if self.context.ndim == 3:
            raise InputError(BOUND)
        prompts = class_prompts(tower, class_names, len(self.context), self.position)
        text = tower.encode(prompts, self.context.to(tower.device))
        return replace(self, text=text.float().cpu())

    def context_names(self, class_names: Sequence[str]) -> Sequence[str]:
        return class_names if self.context.ndim == 3 else ["all"]


class CoOp(Learner):
    """
    Class prototypes of a learned context.

    Source: Zhou et al. 2022, Learning to Prompt for Vision-Language Models, section 3.2, equations
    2 to 4; with a unified context, or one for each class.
    """

    def __init__(self, task: HeadTask) -> None:
        super().__init__(task)
        context = first_context(self.tower, self.settings, len(task.text), task.seed)
        self.prompts = self.class_prompts(context.shape[-2])
        self.context = torch.nn.Parameter(context)

    def prototypes(self) -> torch.Tensor:
        """Unit rows (K, d)."""
        return self.tower.encode(self.prompts, self.context)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.logit_scale * rows @ self.prototypes().T

    @torch.no_grad()
    def head(self, *, words: bool = True) -> PromptHead:
        return PromptHead(
            text=self.prototypes().float().cpu(),
            logit_scale=self.logit_scale,
            parameters={"n_ctx": self.context.shape[-2]},
            context=self.context.detach().float().cpu().clone(),
            position=self.settings.position,
            words=nearest_words(self.tower, self.context) if words else [],
        )


def fit(task: HeadTask) -> Head:
    """Train a context with the task's `prompting`; a PromptHead."""
    return train(CoOp(task), task)
