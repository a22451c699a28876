"""CoCoOp: a context that each image shifts, through a small network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F

from transclip_fast.heads.base import Head, Task
from transclip_fast.heads.prompts.context import (
    ContextSettings,
    class_prompts,
    first_context,
    nearest_words,
)
from transclip_fast.heads.prompts.learning import Learner, Schedule, prompting_of, train
from transclip_fast.heads.prompts.tower import Prompts, TextTower

CONTEXT = ContextSettings(n_ctx=4, start="a photo of a")
# Published with batches of one; the rate grows with the batch (Goyal et al. 2017).
SCHEDULE = Schedule(epochs=10, batch_size=8, rate=8 * 2e-3)
REDUCTION = 16


@dataclass(frozen=True)
class Conditional:
    """
    Contexts V + pi(f) with pi(f) = up relu(down f + down_bias) + up_bias, of images f.

    Parameters
    ----------
    context : Tensor (n_ctx, width)
        V.
    down, down_bias : Tensor (d/16, d), (d/16,)
    up, up_bias : Tensor (width, d/16), (width,)
    """

    context: torch.Tensor
    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor

    @classmethod
    def begin(cls, context: torch.Tensor, d: int, seed: int) -> Conditional:
        """An untrained one: layers drawn as torch draws them, uniform up to 1 / sqrt(inputs)."""
        draw = torch.Generator().manual_seed(seed)
        hidden, width = max(1, d // REDUCTION), context.shape[1]

        def drawn(inputs: int, *shape: int) -> torch.Tensor:
            return ((2 * torch.rand(shape, generator=draw) - 1) / math.sqrt(inputs)).to(context)

        return cls(
            context,
            drawn(d, hidden, d),
            drawn(d, hidden),
            drawn(hidden, width, hidden),
            drawn(hidden, width),
        )

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """Contexts (n, n_ctx, width) of unit rows (n, d)."""
        hidden = torch.relu(F.linear(rows, self.down, self.down_bias))
        return self.context + F.linear(hidden, self.up, self.up_bias)[:, None]

    def to(self, device: torch.device) -> Conditional:
        """The same elsewhere, without gradients."""
        return Conditional(*(getattr(self, x.name).detach().to(device) for x in fields(self)))


def conditional_logits(
    tower: TextTower, prompts: Prompts, conditional: Conditional, rows: torch.Tensor, scale: float
) -> torch.Tensor:
    """Logits (n, K) of unit rows (n, d): each with the prototypes (K, d) of its own contexts."""
    n_rows, n_classes = len(rows), len(prompts)
    repeated = prompts.rows(torch.arange(n_classes, device=tower.device).repeat(n_rows))
    contexts = conditional.of(rows).repeat_interleave(n_classes, 0)  # (n K, n_ctx, width)
    text = tower.encode(repeated, contexts).unflatten(0, (n_rows, n_classes))
    return scale * torch.einsum("nd,nkd->nk", rows, text)


def images_at_once(tower: TextTower, prompts: Prompts) -> int:
    """Images whose prompts the tower encodes in one go."""
    return max(1, tower.chunk(prompts.tokens.shape[1]) // len(prompts))


@dataclass(frozen=True, kw_only=True)
class ConditionalHead(Head):
    """
    Prototypes that a text tower makes anew for each image.

    Logits of N rows take N K runs of the tower.

    Parameters
    ----------
    text : Tensor (K, d)
        The classes in the context without an image.
    tower : TextTower
    prompts : Prompts
        Of the K classes.
    conditional : Conditional
    position : str
        Of the class name: "end", "middle" or "front".
    words : list of str
        Nearest word of each vector of the context.
    """

    tower: TextTower
    prompts: Prompts
    conditional: Conditional
    position: str
    words: list[str]

    @property
    def block_rows(self) -> int:
        return images_at_once(self.tower, self.prompts)

    def block_logits(self, rows: torch.Tensor) -> torch.Tensor:
        conditional = self.conditional.to(self.tower.device)
        there = rows.to(conditional.context)
        logits = conditional_logits(self.tower, self.prompts, conditional, there, self.logit_scale)
        return logits.to(rows)

    def restrict(self, classes: torch.Tensor) -> ConditionalHead:
        chosen = self.prompts.rows(classes.to(self.tower.device))
        return replace(self, text=self.text[classes], prompts=chosen)

    def for_classes(self, tower: TextTower, class_names: Sequence[str]) -> ConditionalHead:
        """The same context and network around other class names."""
        context = self.conditional.context
        prompts = class_prompts(tower, class_names, len(context), self.position)
        return replace(
            self, tower=tower, prompts=prompts, text=_without_image(tower, prompts, context)
        )


class CoCoOp(Learner):
    """
    A context and the network that shifts it.

    Gradients are added up over as many images at a time as the tower encodes in one go.

    Source: Zhou et al. 2022, Conditional Prompt Learning for Vision-Language Models, section 3.2,
    and the authors' repository (KaiyangZhou/CoOp, configs/trainers/CoCoOp): 4 tokens that start as
    "a photo of a", the class name at the end, a bottleneck of d/16, and 10 epochs. They train on
    one image at a time at a rate of 0.002; here the batch is larger, and the rate with it.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        prompting = prompting_of(task)
        self.tower, self.position = prompting.tower, prompting.context.position
        self.logit_scale = task.logit_scale
        settings = replace(prompting.context, class_specific=False)
        context = first_context(self.tower, settings, len(task.text), task.seed)
        self.prompts = class_prompts(self.tower, prompting.class_names, len(context), self.position)
        begun = Conditional.begin(context, task.text.shape[1], task.seed)
        for field in fields(begun):
            setattr(self, field.name, torch.nn.Parameter(getattr(begun, field.name)))

    @property
    def conditional(self) -> Conditional:
        return Conditional(*(getattr(self, field.name) for field in fields(Conditional)))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        conditional = self.conditional
        there = rows.to(conditional.context.dtype)
        return conditional_logits(self.tower, self.prompts, conditional, there, self.logit_scale)

    def descend(self, rows: torch.Tensor, labels: torch.Tensor) -> float:
        size, total = images_at_once(self.tower, self.prompts), 0.0
        for some, own in zip(rows.split(size), labels.split(size), strict=True):
            loss = F.cross_entropy(self(some), own, reduction="sum") / len(rows)
            torch.autograd.backward(loss)
            total += float(loss)
        return total

    @torch.no_grad()
    def head(self) -> ConditionalHead:
        conditional = self.conditional.to(torch.device("cpu"))
        return ConditionalHead(
            text=_without_image(self.tower, self.prompts, conditional.context),
            logit_scale=self.logit_scale,
            parameters={"n_ctx": len(conditional.context)},
            tower=self.tower,
            prompts=self.prompts,
            conditional=conditional,
            position=self.position,
            words=nearest_words(self.tower, conditional.context),
        )


def fit(task: Task) -> ConditionalHead:
    """Train a context and its network from the task's `prompting`."""
    learner = CoCoOp(task)
    train(learner, task)
    return learner.head()


@torch.no_grad()
def _without_image(tower: TextTower, prompts: Prompts, context: torch.Tensor) -> torch.Tensor:
    return tower.encode(prompts, context.to(tower.device)).float().cpu()
