"""Pools of labelled rows beside a list of class names, from golden data: `bench.accuracy.wild`.

A pool has every row and every name; `bench.accuracy.wild_scenarios` takes some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import numpy as np

from bench.accuracy.golden import golden_folder
from bench.common import Problem, make_problem, unit_rows

BACKBONES = {"rn50": "rn50", "vit-b-32": "vit_b_32", "vit-l-14": "vit_l_14"}  # keys of the prompts
SETS = ("oxford_pets", "dtd", "caltech101")  # CoOp splits of ViT-B/32 features, without text
MADE_ACCURACIES = (0.26, 0.41, 0.56)  # of zero-shot with made text: weak, as names of textures are
HALVINGS = 16
MAX_GAP = 4.0  # length of the common direction, where a class mean has length 1
DIM = 512  # of made problems


class Pool(NamedTuple):
    """Rows with their classes, and the prototypes of a list of names."""

    name: str
    features: np.ndarray  # (N, d) float32
    prototypes: np.ndarray  # (K, d) float32
    labels: np.ndarray  # (N,)
    logit_scale: float = 100.0


def arrays(file: str, *names: str) -> list[np.ndarray]:
    """Return arrays of a file of golden data, features as float32 unit rows."""
    with np.load(golden_folder() / f"{file}.npz", allow_pickle=False) as stored:
        found = [stored[name] for name in names]
    return [unit_rows(x.astype(np.float32)) if x.dtype == np.float16 else x for x in found]


def class_means(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the unit mean of each class (K, d) float32."""
    means = [features[labels == k].mean(0, dtype=np.float64) for k in range(labels.max() + 1)]
    return unit_rows(np.stack(means)).astype(np.float32)


def with_real_text(name: str, file: str) -> Pool:
    """Return a file of golden data that has text."""
    features, text, labels = arrays(file, "image_features", "text_features", "labels")
    return Pool(name, features, text, labels)


def with_means(name: str) -> Pool:
    """Return one of `SETS` beside the means of its validation rows."""
    parts = [f"{part}_{x}" for part in ("test", "val") for x in ("features", "labels")]
    features, labels, others, their_labels = arrays(f"{name}_vitb32", *parts)
    return Pool(name, features, class_means(others, their_labels), labels)


@cache
def whurs19() -> list[Pool]:
    """Return WHU-RS19 by three backbones with the text of the average prompt."""
    return [with_real_text(f"whurs19 {x}", f"whurs19_clip_{x}") for x in BACKBONES]


@cache
def single_prompts() -> list[Pool]:
    """Return WHU-RS19 by three backbones with the text of each of eight single prompts."""
    pools = []
    for pool, key in zip(whurs19(), BACKBONES.values(), strict=True):
        texts, prompts = arrays("whurs19_prompts", f"{key}_text_features", f"{key}_prompts")
        pools += [
            pool._replace(name=f"{pool.name}, {prompt}", prototypes=text)
            for prompt, text in zip(prompts.tolist(), texts, strict=True)
        ]
    return pools


def zero_shot(pool: Pool) -> tuple[float, float]:
    """Return accuracy and mean confidence of the text alone, between 0 and 1."""
    logits = pool.logit_scale * pool.features @ pool.prototypes.T
    mass = np.exp(logits - logits.max(1, keepdims=True)).sum(1)
    return float((logits.argmax(1) == pool.labels).mean()), float((1 / mass).mean())


def poor_prompts() -> list[Pool]:
    """Return WHU-RS19 by three backbones with the single prompt that is worst for each."""
    prompts, each = single_prompts(), len(single_prompts()) // len(BACKBONES)
    groups = (prompts[i : i + each] for i in range(0, len(prompts), each))
    return [min(group, key=lambda pool: zero_shot(pool)[0]) for group in groups]


def halved(falls: Callable[[float], bool], high: float) -> float:
    """Return the place in (0, high) where `falls` turns from true to false."""
    low = 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if falls(middle) else (low, middle)
    return (low + high) / 2


def made_text(pool: Pool, accuracy: float, seed: int = 0) -> Pool:
    """Return the pool with text made of its prototypes, class means, to a zero-shot `accuracy`.

    Each mean is blended with noise of its own, which sets the accuracy, and all are moved along one
    common direction, as texts lie apart from images: that shrinks the differences of their logits
    and is chosen so that the mean confidence is close to the accuracy.
    """
    means, rng = pool.prototypes, np.random.default_rng(seed)
    noise = unit_rows(rng.standard_normal(means.shape)).astype(np.float32)
    apart = unit_rows(rng.standard_normal((1, means.shape[1]))).astype(np.float32)

    def with_text(blend: float, gap: float) -> Pool:
        text = unit_rows((1 - blend) * means + blend * noise + gap * apart)
        return pool._replace(prototypes=text)

    def blended(gap: float) -> Pool:
        good = halved(lambda blend: zero_shot(with_text(blend, gap))[0] > accuracy, 1.0)
        return with_text(good, gap)

    return blended(halved(lambda gap: zero_shot(blended(gap))[1] > accuracy, MAX_GAP))


@cache
def weak_texts() -> list[Pool]:
    """Return sets beside made text, from hard to easy, of which `textures` has none.

    WHU-RS19 is halved: the class means are those of the other half.
    """
    bases = [with_means(name) for name in SETS if name != "dtd"]
    for pool in whurs19():
        rows = np.random.default_rng(0).permutation(len(pool.labels))
        own, others = np.sort(rows[::2]), rows[1::2]
        means = class_means(pool.features[others], pool.labels[others])
        bases.append(Pool(pool.name, pool.features[own], means, pool.labels[own]))
    return [
        made_text(pool, x)._replace(name=f"{pool.name}, made text {x:.0%}")
        for x in MADE_ACCURACIES
        for pool in bases
    ]


@cache
def textures() -> list[Pool]:
    """Return DTD with made text, from hard to easy."""
    return [
        made_text(with_means("dtd"), x)._replace(name=f"dtd, made text {x:.0%}")
        for x in MADE_ACCURACIES
    ]


@cache
def among_lvis() -> list[Pool]:
    """Return Caltech101 images of 42 classes beside LVIS's 1,203 names, with their real text."""
    return [with_real_text("caltech101 among LVIS", "caltech101_in_lvis_vitb32")]


@cache
def own_lists() -> list[Pool]:
    """Return each set of ViT-B/32 features beside the validation means of its own classes."""
    return [with_means(name) for name in SETS]


@cache
def long_lists() -> list[Pool]:
    """Return each set beside the classes of all sets, put together to one list."""
    names = np.concatenate([pool.prototypes for pool in own_lists()])
    starts = np.cumsum([0, *(len(pool.prototypes) for pool in own_lists())])
    return [
        pool._replace(prototypes=names, labels=pool.labels + start)
        for pool, start in zip(own_lists(), starts[:-1], strict=True)
    ]


@cache
def all_sets() -> list[Pool]:
    """Return the rows of all sets beside the classes of all sets."""
    parts = long_lists()
    features, labels = (
        np.concatenate([getattr(p, x) for p in parts]) for x in ("features", "labels")
    )
    return [Pool("all sets", features, parts[0].prototypes, labels)]


def scaled(pools: Iterable[Pool], logit_scale: float) -> list[Pool]:
    """Return the pools with another temperature of the text prediction."""
    return [pool._replace(logit_scale=logit_scale) for pool in pools]


def shares(n_classes: int, present: int, law: str, rng: np.random.Generator) -> np.ndarray:
    """Return the share of rows (K,) of each class, 0 for those that are absent.

    `law` is "Dirichlet" (with parameter 1) or "power law", that of `make_problem`.
    """
    sizes = {
        "Dirichlet": rng.dirichlet(np.ones(present)),
        "power law": 1 / (np.arange(present) + present / 20),
    }[law]
    found = np.zeros(n_classes)
    found[rng.permutation(n_classes)[:present]] = sizes / sizes.sum()
    return found


def made(n: int, n_classes: int, present: int, law: str, seed: int) -> Problem:
    """Return a made problem of `n` rows of `present` among `n_classes` classes."""
    sizes = shares(n_classes, present, law, np.random.default_rng(seed))
    return make_problem(n, n_classes, DIM, seed=seed, shares=sizes)
