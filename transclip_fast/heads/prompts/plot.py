"""PLOT: several prompts a class, to which the patches of an image are transported."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from transclip_fast.data.patches import images
from transclip_fast.errors import InputError
from transclip_fast.heads.prompts.context import (
    SPREAD,
    ContextSettings,
    class_prompts,
    first_context,
    nearest_words,
)
from transclip_fast.heads.prompts.learning import Learner, Schedule, prompting_of, train
from transclip_fast.heads.prompts.tower import Prompts, TextTower
from transclip_fast.heads.task import Head, Labelled, Task, percent_right, unit

CONTEXT = ContextSettings(n_ctx=16)
SCHEDULE = Schedule(epochs=50)
PROMPTS = 4
EPSILON, ITERATIONS, THRESHOLD = 0.1, 100, 1e-2  # of the transport
ENTRIES = 1 << 24  # of the similarities of a block: rows, patches, classes, prompts


@torch.no_grad()
def transport(
    similarities: torch.Tensor,
    *,
    epsilon: float = EPSILON,
    iterations: int = ITERATIONS,
    threshold: float = THRESHOLD,
) -> torch.Tensor:
    """
    Plans (P, L, N) that carry the weight 1/L of each of L rows to the weight 1/N of N columns.

    T = diag(r) A diag(c) with A = exp(-(1 - S) / epsilon), where r = (1/L) / (A c) and
    c = (1/N) / (A^T r) follow each other from c = 1 on: Sinkhorn's iterations for the cost 1 - S.
    A problem is done when the mean change of its r is below the threshold, and then stays as it
    is, so that no plan depends on the problems beside it. (The authors' code goes on until the mean
    over all problems of a batch is.) Columns sum to 1/N exactly, rows to 1/L as far as r stands
    still. No gradient passes: the plan is a constant of the loss, as in the paper.

    Source: Cuturi 2013, Sinkhorn Distances; Chen et al. 2023, PLOT, algorithm 1; epsilon,
    iterations and threshold as in the authors' repository (CHENGY12/PLOT).

    Parameters
    ----------
    similarities : Tensor (P, L, N)
        S, cosines; float32 or float64, which the plans are, too.
    """
    kernel = torch.exp((similarities - 1) / epsilon)
    n_problems, rows, columns = kernel.shape
    r, c = kernel.new_ones(n_problems, rows, 1), kernel.new_ones(n_problems, columns, 1)
    going = torch.ones(n_problems, 1, 1, dtype=torch.bool, device=kernel.device)
    for _ in range(iterations):
        new_r = 1 / (rows * (kernel @ c))
        new_c = 1 / (columns * (kernel.mT @ new_r))
        moved = (new_r - r).abs().mean(1, keepdim=True)
        r, c = torch.where(going, new_r, r), torch.where(going, new_c, c)
        going &= moved >= threshold
        if not going.any():
            break
    return r * kernel * c.mT


def transported_logits(rows: torch.Tensor, texts: torch.Tensor, scale: float) -> torch.Tensor:
    """
    Logits (n, K): scale times the similarity of patches and prompts that a transport pairs.

    <T, S> with S (L, P) the cosines of an image's patches and a class's prompts, and T their
    transport plan (`transport`), through which no gradient passes. Where an image is one feature,
    the only plan that there is gives every prompt the same: the mean of their cosines.

    Source: Chen et al. 2023, PLOT, equations 5 to 7.

    Parameters
    ----------
    rows : Tensor (n, 1 + L, d), or (n, d) without patches
        The image itself, which comes first, takes no part beside patches.
    texts : Tensor (K, P, d)
        Unit rows.
    """
    if rows.ndim == 2:
        return scale * rows @ texts.mean(1).T
    similarities = torch.einsum("nld,kpd->nklp", rows[:, 1:], texts)
    plans = transport(similarities.flatten(0, 1)).view_as(similarities)
    return scale * (plans * similarities).sum((2, 3))


@dataclass(frozen=True, kw_only=True)
class TransportHead(Head):
    """
    Several prototypes a class, see `transported_logits`.

    Parameters
    ----------
    text : Tensor (K, d)
        Unit mean of a class's prototypes.
    texts : Tensor (K, P, d)
        Unit rows.
    contexts : Tensor (P, n_ctx, width)
    position : str
        Of the class name: "end", "middle" or "front".
    words : list of str
        Nearest word of each vector of the contexts, flat.
    patches : int
        L that it was trained with; 0 without patches.
    """

    texts: torch.Tensor
    contexts: torch.Tensor
    position: str
    words: list[str]
    patches: int

    @property
    def block_rows(self) -> int:
        classes, prompts, _ = self.texts.shape
        return max(1, ENTRIES // (max(1, self.patches) * classes * prompts))

    def block_logits(self, rows: torch.Tensor) -> torch.Tensor:
        if not self.patches:
            rows = images(rows)
        elif rows.ndim == 2:
            raise InputError(
                "local_features: the head plot was trained with them, and these rows have none; "
                "encode them with --local-features"
            )
        return transported_logits(rows, self.texts, self.logit_scale)

    def restrict(self, classes: torch.Tensor) -> TransportHead:
        return replace(self, text=self.text[classes], texts=self.texts[classes])

    @torch.no_grad()
    def for_classes(self, tower: TextTower, class_names: Sequence[str]) -> TransportHead:
        """The same contexts around other class names."""
        contexts = self.contexts.to(tower.device)
        prompts = class_prompts(tower, class_names, contexts.shape[1], self.position)
        texts = encode_each(tower, prompts, contexts).float().cpu()
        return replace(self, text=unit(texts.mean(1)), texts=texts)


class Plot(Learner):
    """
    P contexts that all classes share.

    Source: Chen et al. 2023, PLOT: Prompt Learning with Optimal Transport for Vision-Language
    Models, and the authors' repository (CHENGY12/PLOT): 4 prompts of 16 random tokens, the class
    name at the end, 50 epochs of CoOp's training.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        prompting = prompting_of(task)
        if prompting.context.class_specific:
            raise InputError("plot: its contexts are shared by all classes, not class-specific")
        self.tower, self.position = prompting.tower, prompting.context.position
        self.logit_scale = task.logit_scale
        shots = task.shots.features
        self.patches = shots.shape[1] - 1 if shots.ndim == 3 else 0
        settings = replace(prompting.context, class_specific=True)
        contexts = first_context(self.tower, settings, PROMPTS, task.seed)
        if settings.start is not None:  # or all would start, and stay, the same
            draw = torch.Generator().manual_seed(task.seed)
            contexts = contexts + SPREAD * torch.randn(contexts.shape, generator=draw).to(contexts)
        self.prompts = class_prompts(
            self.tower, prompting.class_names, contexts.shape[1], self.position
        )
        self.contexts = torch.nn.Parameter(contexts)

    def texts(self) -> torch.Tensor:
        """Unit rows (K, P, d)."""
        return encode_each(self.tower, self.prompts, self.contexts)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        texts = self.texts()
        there = (rows if self.patches else images(rows)).to(texts.dtype)
        return transported_logits(there, texts, self.logit_scale)

    def head(self) -> TransportHead:
        return self._head(nearest_words(self.tower, self.contexts))

    def validate(self, rows: Labelled) -> float:
        return percent_right(self._head([]).logits(rows.features), rows.labels)

    @torch.no_grad()
    def _head(self, words: list[str]) -> TransportHead:
        texts = self.texts().float().cpu()
        return TransportHead(
            text=unit(texts.mean(1)),
            logit_scale=self.logit_scale,
            parameters={"n_ctx": self.contexts.shape[1], "patches": self.patches},
            texts=texts,
            contexts=self.contexts.detach().float().cpu().clone(),
            position=self.position,
            words=words,
            patches=self.patches,
        )


def encode_each(tower: TextTower, prompts: Prompts, contexts: torch.Tensor) -> torch.Tensor:
    """Unit rows (K, P, d) of K prompts in each of P contexts (P, n_ctx, width)."""
    n_classes, number = len(prompts), len(contexts)
    each = torch.arange(n_classes, device=tower.device).repeat_interleave(number)
    repeated = contexts.repeat(n_classes, 1, 1)
    return tower.encode(prompts.rows(each), repeated).view(n_classes, number, -1)


def fit(task: Task) -> Head:
    """Train contexts with the task's `prompting`, and warn where images have no patches."""
    learner = Plot(task)
    if not learner.patches:
        warnings.warn(
            f"head plot: no local features, so it transports over its {PROMPTS} prompts alone, "
            "which is their mean; `encode --local-features` gives patches",
            stacklevel=2,
        )
    return train(learner, task)
