"""
PLOT: several prompts a class, with which optimal transport pairs the patches of an image.

The logit of a class is tau <T, S>: S (L, P) are the cosines of the L patches and the P prompts of
the class, T (L, P) is the plan of `transport`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from transclip_fast.data.feature_rows import unit
from transclip_fast.data.patches import images
from transclip_fast.errors import InputError
from transclip_fast.heads.base import Head
from transclip_fast.heads.prompting import ContextSettings, Schedule
from transclip_fast.heads.prompts.context import (
    INITIAL_DEVIATION,
    ContextHead,
    class_prompts,
    first_context,
    nearest_words,
)
from transclip_fast.heads.prompts.learning import Learner, train
from transclip_fast.heads.task import HeadTask
from transclip_fast.heads.text_tower import Prompts, TextTower

CONTEXT = ContextSettings(n_ctx=16)
SCHEDULE = Schedule(epochs=50)
PROMPTS = 4  # a class
# Of the transport, as published: weight of the entropy, most iterations, change that ends them.
EPSILON, ITERATIONS, THRESHOLD = 0.1, 100, 1e-2
BLOCK_ENTRIES = 1 << 24  # similarities of a block: rows, patches, classes, prompts


@torch.no_grad()
def transport(
    similarities: torch.Tensor,
    *,
    epsilon: float = EPSILON,
    iterations: int = ITERATIONS,
    threshold: float = THRESHOLD,
) -> torch.Tensor:
    """
    Plans (B, L, P) that move the weight 1/L of each of L rows to the weight 1/P of each of P
    columns, for B problems of cost 1 - S, with S (B, L, P) cosines.

    T = diag(r) A diag(c) with A = exp(-(1 - S) / epsilon), where Sinkhorn's iterations alternate
    r = (1/L) / (A c) and c = (1/P) / (A^T r) from c = 1 on. A problem ends when the mean change of
    its r is below the threshold, so that no plan depends on the other problems. (The authors' code
    ends all at the mean over the batch.) Columns sum to 1/P exactly, rows to 1/L once r has
    converged. No gradient passes: the plan is a constant of the loss, as in the paper.

    Source: Cuturi 2013, Sinkhorn Distances; Chen et al. 2023, PLOT, algorithm 1; epsilon,
    iterations and threshold as in the authors' repository (CHENGY12/PLOT).
    """
    kernel = torch.exp((similarities - 1) / epsilon)
    n_problems, rows, columns = kernel.shape
    r, c = kernel.new_ones(n_problems, rows, 1), kernel.new_ones(n_problems, columns, 1)
    active = torch.ones(n_problems, 1, 1, dtype=torch.bool, device=kernel.device)
    for _ in range(iterations):
        new_r = 1 / (rows * (kernel @ c))
        new_c = 1 / (columns * (kernel.mT @ new_r))
        moved = (new_r - r).abs().mean(1, keepdim=True)
        r, c = torch.where(active, new_r, r), torch.where(active, new_c, c)
        active &= moved >= threshold
        if not active.any():
            break
    return r * kernel * c.mT


def transported_logits(rows: torch.Tensor, texts: torch.Tensor, scale: float) -> torch.Tensor:
    """
    Logits (n, K): scale <T, S>, with S the cosines of patches and prompts and T their plan.

    Rows are (n, 1 + L, d), of which the first, the image, is not used; or (n, d) without patches,
    where the only plan weighs all prompts equally. Texts are unit rows (K, P, d).

    Source: Chen et al. 2023, PLOT, equations 5 to 7.
    """
    if rows.ndim == 2:
        return scale * rows @ texts.mean(1).T
    similarities = torch.einsum("nld,kpd->nklp", rows[:, 1:], texts)
    plans = transport(similarities.flatten(0, 1)).view_as(similarities)
    return scale * (plans * similarities).sum((2, 3))


@dataclass(frozen=True, kw_only=True)
class TransportHead(ContextHead):
    """P prototypes a class, with the logits of `transported_logits`; `text` is their unit mean."""

    kind: ClassVar[str] = "transport"
    stored_tensors: ClassVar = {"text": "Kd", "texts": "KPd", "contexts": "Pnv"}
    stored_settings: ClassVar = {**ContextHead.stored_settings, "patches": int}
    vectors: ClassVar[str] = "contexts"
    takes_patches: ClassVar[bool] = True

    texts: torch.Tensor  # (K, P, d), unit rows
    contexts: torch.Tensor  # (P, n_ctx, width)
    patches: int  # L of the training; 0 without patches

    @property
    def wants_patches(self) -> bool:
        return self.patches > 0

    @property
    def block_rows(self) -> int:
        classes, prompts, _ = self.texts.shape
        return max(1, BLOCK_ENTRIES // (max(1, self.patches) * classes * prompts))

    def block_logits(self, rows: torch.Tensor) -> torch.Tensor:
        if not self.patches:
            rows = images(rows)
        elif rows.ndim == 2:
            raise InputError(
                "local_features: the head plot was trained with them, and these rows have none; "
                "encode them with --local-features"
            )
        return transported_logits(rows, self.texts, self.logit_scale)

    @torch.no_grad()
    def for_classes(self, tower: TextTower, class_names: Sequence[str]) -> TransportHead:
        contexts = self.contexts.to(tower.device)
        prompts = class_prompts(tower, class_names, contexts.shape[1], self.position)
        texts = encode_each(tower, prompts, contexts).float().cpu()
        return replace(self, text=unit(texts.mean(1)), texts=texts)

    def context_names(self, class_names: Sequence[str]) -> Sequence[str]:
        return [f"prompt {number}" for number in range(1, len(self.contexts) + 1)]


class Plot(Learner):
    """
    P contexts that all classes share.

    Source: Chen et al. 2023, PLOT: Prompt Learning with Optimal Transport for Vision-Language
    Models, and the authors' repository (CHENGY12/PLOT): 4 prompts of 16 random tokens, the class
    name at the end, 50 epochs of CoOp's training.
    """

    def __init__(self, task: HeadTask) -> None:
        super().__init__(task)
        if self.settings.class_specific:
            raise InputError("plot: its contexts are shared by all classes, not class-specific")
        shots = task.shots.features
        self.patches = shots.shape[1] - 1 if shots.ndim == 3 else 0
        settings = replace(self.settings, class_specific=True)  # each prompt has its own vectors
        contexts = first_context(self.tower, settings, PROMPTS, task.seed)
        if settings.start is not None:  # without noise all prompts would stay equal
            draw = torch.Generator().manual_seed(task.seed)
            noise = torch.randn(contexts.shape, generator=draw, dtype=torch.float32).to(contexts)
            contexts = contexts + INITIAL_DEVIATION * noise
        self.prompts = self.class_prompts(contexts.shape[1])
        self.contexts = torch.nn.Parameter(contexts)

    def texts(self) -> torch.Tensor:
        """Unit rows (K, P, d)."""
        return encode_each(self.tower, self.prompts, self.contexts)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        texts = self.texts()
        used = (rows if self.patches else images(rows)).to(texts.dtype)
        return transported_logits(used, texts, self.logit_scale)

    @torch.no_grad()
    def head(self, *, words: bool = True) -> TransportHead:
        texts = self.texts().float().cpu()
        return TransportHead(
            text=unit(texts.mean(1)),
            logit_scale=self.logit_scale,
            parameters={"n_ctx": self.contexts.shape[1], "patches": self.patches},
            texts=texts,
            contexts=self.contexts.detach().float().cpu().clone(),
            position=self.settings.position,
            words=nearest_words(self.tower, self.contexts) if words else [],
            patches=self.patches,
        )


def encode_each(tower: TextTower, prompts: Prompts, contexts: torch.Tensor) -> torch.Tensor:
    """Unit rows (K, P, d) of K prompts in each of P contexts (P, n_ctx, width)."""
    n_classes, number = len(prompts), len(contexts)
    rows = torch.arange(n_classes, device=tower.device).repeat_interleave(number)
    repeated = contexts.repeat(n_classes, 1, 1)
    return tower.encode(prompts.rows(rows), repeated).view(n_classes, number, -1)


def fit(task: HeadTask) -> Head:
    """Train contexts with the task's `prompting`; warns if the shots have no patches."""
    learner = Plot(task)
    if not learner.patches:
        warnings.warn(
            f"head plot: no local features, so it transports over its {PROMPTS} prompts alone, "
            "which is their mean; `encode --local-features` gives patches",
            stacklevel=2,
        )
    return train(learner, task)
