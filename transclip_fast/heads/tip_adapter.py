"""Tip-Adapter: the shots are a cache of keys and labels beside the text, without training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from transclip_fast.data.labelled_rows import LabelledRows
from transclip_fast.heads.base import Head, percent_right
from transclip_fast.heads.task import HeadTask

ALPHA, BETA = 1.17, 1.0  # of most of the published configurations, ImageNet's among them
# The published grids are linear, up to 7 or 50 depending on the data set.
ALPHAS = tuple(float(x) for x in torch.logspace(-1, 1.7, 20, dtype=torch.float32))
BETAS = tuple(float(x) for x in torch.logspace(-1, 1.7, 40, dtype=torch.float32))


@dataclass(frozen=True, kw_only=True)
class CacheHead(Head):
    """logits = tau F T^T + alpha exp(-beta (1 - F keys^T)) Y, with Y (M, K) the one-hot labels."""

    kind: ClassVar[str] = "cache"
    stored_tensors: ClassVar = {"text": "Kd", "cache.features": "Md", "cache.labels": "M"}
    stored_settings: ClassVar = {"alpha": float, "beta": float}

    cache: LabelledRows  # keys (M, d) and their classes; trained keys need not be unit rows
    alpha: float  # weight of the cache
    beta: float  # sharpness of the cache

    def block_logits(self, rows: torch.Tensor) -> torch.Tensor:
        text = self.logit_scale * rows @ self.text.T
        cached = cache_logits(rows @ self.cache.features.T, self.cache, self.beta, len(self.text))
        return text + self.alpha * cached

    def restrict(self, classes: torch.Tensor) -> CacheHead:
        place = torch.full((len(self.text),), -1)
        place[classes] = torch.arange(len(classes))
        labels = place[self.cache.labels]
        inside = labels >= 0
        cache = LabelledRows(self.cache.features[inside], labels[inside])
        return replace(self, text=self.text[classes], cache=cache)

    @classmethod
    def from_stored(cls, **fields: Any) -> CacheHead:
        cache = LabelledRows(fields.pop("cache.features"), fields.pop("cache.labels"))
        return cls(cache=cache, **fields)


def cache_logits(
    affinity: torch.Tensor, cache: LabelledRows, beta: float, n_classes: int
) -> torch.Tensor:
    """Class sums (n, K) of exp(-beta (1 - affinity)), affinity (n, M)."""
    weights = torch.exp(beta * (affinity - 1))
    # Not a product with one-hot labels: that costs K additions an entry.
    return weights.new_zeros(len(affinity), n_classes).index_add(1, cache.labels, weights)


def fit(task: HeadTask) -> CacheHead:
    """
    The shots as they are, with the alpha and beta of `search`.

    Source: Zhang et al. 2022, Tip-Adapter: Training-free Adaption of CLIP for Few-shot
    Classification, section 3.1; defaults as in the authors' repository (gaopengcuhk/Tip-Adapter,
    configs).
    """
    return with_cache(task, task.shots)


def with_cache(task: HeadTask, cache: LabelledRows) -> CacheHead:
    """The head with these keys and the alpha and beta of `search`."""
    alpha, beta = search(task, cache)
    return CacheHead(
        text=task.text,
        logit_scale=task.logit_scale,
        parameters={"alpha": alpha, "beta": beta},
        cache=cache,
        alpha=alpha,
        beta=beta,
    )


def search(task: HeadTask, cache: LabelledRows) -> tuple[float, float]:
    """The alpha and beta with the best validation accuracy; the defaults without such rows."""
    if task.validation is None:
        return ALPHA, BETA
    rows, labels = task.validation.features, task.validation.labels
    text = task.logit_scale * rows @ task.text.T
    affinity = rows @ cache.features.T
    found: list[tuple[float, float, float]] = []
    for beta in BETAS:
        cached = cache_logits(affinity, cache, beta, len(task.text))
        found += [(percent_right(text + alpha * cached, labels), alpha, beta) for alpha in ALPHAS]
    _, alpha, beta = max(found, key=lambda entry: entry[0])  # the first of equally good ones
    return alpha, beta
