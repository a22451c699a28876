"""CoCoOp: each image shifts the context of the prompts through a small network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from transclip_fast.errors import InputError
from transclip_fast.heads.base import Head
from transclip_fast.heads.prompting import ContextSettings, Schedule
from transclip_fast.heads.prompts.context import (
    ContextHead,
    class_prompts,
    first_context,
    nearest_words,
)
from transclip_fast.heads.prompts.learning import Learner, train
from transclip_fast.heads.task import HeadTask
from transclip_fast.heads.text_tower import Prompts, TextTower
from transclip_fast.heads.training import first_weights

CONTEXT = ContextSettings(n_ctx=4, start="a photo of a")
SCHEDULE = Schedule(epochs=20, batch_size=4, rate=4e-3)
REDUCTION = 16  # d / width of the network's hidden layer
# Of heads and learners, with their shapes in head files.
TENSORS = {"context": "nv", "down": "wd", "down_bias": "w", "up": "vw", "up_bias": "v"}


def shifted_contexts(weights: Any, rows: torch.Tensor) -> torch.Tensor:
    """
    Contexts (n, n_ctx, width) of unit rows (n, d): V + up relu(down f + down_bias) + up_bias.

    `weights` has the `TENSORS`: V (n_ctx, width), down (d/16, d), up (width, d/16) and biases.
    """
    hidden = torch.relu(F.linear(rows, weights.down, weights.down_bias))
    contexts: torch.Tensor = (
        weights.context + F.linear(hidden, weights.up, weights.up_bias)[:, None]
    )
    return contexts


@dataclass(frozen=True)
class Reader:
    """A text tower and the prompts of K classes, which it encodes for each image."""

    tower: TextTower
    prompts: Prompts

    @property
    def images(self) -> int:
        """Number of images whose prompts the tower encodes at once."""
        return max(1, self.tower.chunk(self.prompts.tokens.shape[1]) // len(self.prompts))

    def logits(self, weights: Any, rows: torch.Tensor, scale: float) -> torch.Tensor:
        """Logits (n, K) of unit rows (n, d), each with prototypes (K, d) of its own context."""
        n_rows, n_classes = len(rows), len(self.prompts)
        each = torch.arange(n_classes, device=self.tower.device).repeat(n_rows)
        # (n K, n_ctx, width)
        contexts = shifted_contexts(weights, rows).repeat_interleave(n_classes, 0)
        text = self.tower.encode(self.prompts.rows(each), contexts).view(n_rows, n_classes, -1)
        return scale * torch.einsum("nd,nkd->nk", rows, text)

    @torch.no_grad()
    def without_image(self, context: torch.Tensor) -> torch.Tensor:
        """Prototypes (K, d) in a context that no image shifts, on the CPU."""
        return self.tower.encode(self.prompts, context.to(self.tower.device)).float().cpu()


@dataclass(frozen=True, kw_only=True)
class ConditionalHead(ContextHead):
    """
    A head whose prototypes differ for each image: logits of N rows take N K runs of the text tower.

    `text` has the prototypes in the context that no image shifts.
    """

    kind: ClassVar[str] = "conditional"
    stored_tensors: ClassVar = {"text": "Kd", **TENSORS}
    runs_tower: ClassVar[bool] = True

    context: torch.Tensor  # this and the next four as in `shifted_contexts`
    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
    reader: Reader | None = None  # needed to predict; not in head files, see `for_classes`

    @property
    def block_rows(self) -> int:
        return self._reader().images

    def block_logits(self, rows: torch.Tensor) -> torch.Tensor:
        reader = self._reader()
        device = reader.tower.device
        weights = replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})
        there = rows.to(weights.context)
        return reader.logits(weights, there, self.logit_scale).to(rows)

    def restrict(self, classes: torch.Tensor) -> ConditionalHead:
        reader = self._reader()
        prompts = reader.prompts.rows(classes.to(reader.tower.device))
        return replace(super().restrict(classes), reader=replace(reader, prompts=prompts))

    def for_classes(self, tower: TextTower, class_names: Sequence[str]) -> ConditionalHead:
        prompts = class_prompts(tower, class_names, len(self.context), self.position)
        reader = Reader(tower, prompts)
        return replace(self, text=reader.without_image(self.context), reader=reader)

    def _reader(self) -> Reader:
        if self.reader is None:
            raise InputError("the head cocoop runs a text tower for every image: give it one")
        return self.reader


class CoCoOp(Learner):
    """
    A context and the network that shifts it.

    Gradients are summed over parts of the batch, as many images as the tower encodes at once.

    Source: Zhou et al. 2022, Conditional Prompt Learning for Vision-Language Models, section 3.2,
    and the authors' repository (KaiyangZhou/CoOp, configs/trainers/CoCoOp): 4 tokens that start as
    "a photo of a", the class name at the end, a bottleneck of d/16. They take one image at a time,
    for 10 epochs at a rate of 0.002. Batches of 4 over 20 epochs are half the steps at twice the
    rate, and learn the demo's digits as well; 10 epochs at four times the rate fail for some draws.
    """

    def __init__(self, task: HeadTask) -> None:
        super().__init__(task)
        if self.settings.class_specific:
            raise InputError("cocoop: its context is shared by all classes, not class-specific")
        context = first_context(self.tower, self.settings, len(task.text), task.seed)
        self.reader = Reader(self.tower, self.class_prompts(len(context)))
        d, width = task.text.shape[1], context.shape[1]
        hidden = max(1, d // REDUCTION)
        draw = torch.Generator().manual_seed(task.seed)

        def drawn(inputs: int, *shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(first_weights(draw, inputs, *shape).to(context))

        self.context = torch.nn.Parameter(context)
        self.down, self.down_bias = drawn(d, hidden, d), drawn(d, hidden)
        self.up, self.up_bias = drawn(hidden, width, hidden), drawn(hidden, width)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.reader.logits(self, rows.to(self.context.dtype), self.logit_scale)

    def descend(self, rows: torch.Tensor, labels: torch.Tensor) -> float:
        size, total = self.reader.images, 0.0
        for part, own in zip(torch.split(rows, size), torch.split(labels, size), strict=True):
            loss = F.cross_entropy(self(part), own, reduction="sum") / len(rows)
            torch.autograd.backward(loss)
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def head(self, *, words: bool = True) -> ConditionalHead:
        return ConditionalHead(
            text=self.reader.without_image(self.context),
            logit_scale=self.logit_scale,
            parameters={"n_ctx": len(self.context)},
            **{name: getattr(self, name).detach().float().cpu().clone() for name in TENSORS},
            position=self.settings.position,
            words=nearest_words(self.tower, self.context) if words else [],
            reader=self.reader,
        )


def fit(task: HeadTask) -> Head:
    """Train a context and its network with the task's `prompting`; a ConditionalHead."""
    return train(CoCoOp(task), task)
