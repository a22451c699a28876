"""CoOp: the context of the prompts is learned, the class names stay words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from transclip_fast.heads.prompts.context import class_prompts, first_context, nearest_words
from transclip_fast.heads.prompts.learning import Learner, prompting_of, train
from transclip_fast.heads.prompts.tower import TextTower
from transclip_fast.heads.task import Head, Labelled, PrototypeHead, Task, percent_right


@dataclass(frozen=True, kw_only=True)
class PromptHead(PrototypeHead):
    """
    Prototypes that a text tower made of class names in a learned context.

    Parameters
    ----------
    context : Tensor (n_ctx, width) or (K, n_ctx, width)
        Of all classes, or of each.
    position : str
        Of the class name: "end", "middle" or "front".
    words : list of str
        Nearest word of each vector of the context, flat.
    """

    context: torch.Tensor
    position: str
    words: list[str]

    def restrict(self, classes: torch.Tensor) -> PromptHead:
        head = replace(self, text=self.text[classes])
        if self.context.ndim == 2:
            return head
        n_ctx, chosen = self.context.shape[1], classes.tolist()
        words = [word for k in chosen for word in self.words[k * n_ctx : (k + 1) * n_ctx]]
        return replace(head, context=self.context[classes], words=words)

    @torch.no_grad()
    def for_classes(self, tower: TextTower, class_names: Sequence[str]) -> PromptHead:
        """
        The same context around other class names.

        Raises
        ------
        InputError
            The context is that of the classes it was trained on.
        """
        if self.context.ndim == 3:
            return self.transfer(self.text)  # type: ignore[return-value]
        prompts = class_prompts(tower, class_names, len(self.context), self.position)
        text = tower.encode(prompts, self.context.to(tower.device))
        return replace(self, text=text.float().cpu())


class CoOp(Learner):
    """
    Class prototypes of a learned context.

    Source: Zhou et al. 2022, Learning to Prompt for Vision-Language Models, section 3.2, equations
    2 to 4; the unified context and that of each class are its two forms.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        prompting = prompting_of(task)
        self.tower, self.settings = prompting.tower, prompting.context
        self.logit_scale = task.logit_scale
        vectors = first_context(self.tower, self.settings, len(task.text), task.seed)
        n_ctx = vectors.shape[-2]
        self.prompts = class_prompts(
            self.tower, prompting.class_names, n_ctx, self.settings.position
        )
        self.context = torch.nn.Parameter(vectors)

    def prototypes(self) -> torch.Tensor:
        """Unit rows (K, d)."""
        return self.tower.encode(self.prompts, self.context)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.logit_scale * rows @ self.prototypes().T

    @torch.no_grad()
    def head(self) -> PromptHead:
        return PromptHead(
            text=self.prototypes().float().cpu(),
            logit_scale=self.logit_scale,
            parameters={"n_ctx": self.context.shape[-2]},
            context=self.context.detach().float().cpu().clone(),
            position=self.settings.position,
            words=nearest_words(self.tower, self.context),
        )

    @torch.no_grad()
    def validate(self, rows: Labelled) -> float:
        head = PrototypeHead(text=self.prototypes().float().cpu(), logit_scale=self.logit_scale)
        return percent_right(head.logits(rows.features), rows.labels)


def fit(task: Task) -> Head:
    """Train a context with the task's `prompting`; a PromptHead."""
    return train(CoOp(task), task)
