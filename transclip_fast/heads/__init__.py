"""
Few-shot methods on features: a classifier from class texts and a few labelled rows.

Each method is a file of this folder with a function `fit`; those in `prompts` train through a text
tower. TransCLIP takes their prediction as its prior.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from transclip_fast.data.checks import check_number
from transclip_fast.data.labelled_rows import LabelledRows
from transclip_fast.data.texts import ensemble
from transclip_fast.device import exact_float32
from transclip_fast.errors import InputError
from transclip_fast.heads import (
    clip_adapter,
    clip_adapter_blend,
    linear_probe,
    prompt_ensemble,
    task_res,
    tip_adapter,
    tip_adapter_f,
    unmix_clip,
)
from transclip_fast.heads.base import Head, PrototypeHead
from transclip_fast.heads.prompts import (
    ContextSettings,
    Prompting,
    Schedule,
    cocoop,
    coop,
    plot,
    prograd,
)
from transclip_fast.heads.task import (
    HeadTask,
    TrainingProgress,
    labelled_rows,
    own_copy,
)
from transclip_fast.solver.parameters import check_scale, check_weight

__all__ = [
    "HEADS",
    "LEARNERS",
    "SETTINGS",
    "Head",
    "HeadMethod",
    "PrototypeHead",
    "ensemble",
    "fit_head",
    "method_named",
]


@dataclass(frozen=True)
class HeadMethod:
    """A few-shot method, and the properties of its heads that are known before a fit."""

    fit: Callable[[HeadTask], Head]
    needs_shots: bool = True
    takes_patches: bool = False
    transfers: bool = False  # to classes other than those of the training


HEADS = {
    "prompt-ensemble": HeadMethod(prompt_ensemble.fit, needs_shots=False),
    "tip-adapter": HeadMethod(tip_adapter.fit),
    "tip-adapter-f": HeadMethod(tip_adapter_f.fit),
    "clip-adapter": HeadMethod(clip_adapter.fit, transfers=True),
    "clip-adapter-text": HeadMethod(
        partial(clip_adapter.fit, names=clip_adapter.TEXT), transfers=True
    ),
    "clip-adapter-both": HeadMethod(
        partial(clip_adapter.fit, names=clip_adapter.BOTH), transfers=True
    ),
    "clip-adapter-blend": HeadMethod(clip_adapter_blend.fit, transfers=True),
    "unmix-clip": HeadMethod(unmix_clip.fit, transfers=True),
    "taskres": HeadMethod(task_res.fit),
    "linear-probe": HeadMethod(linear_probe.fit),
}
LEARNERS = {  # of prompts, through a text tower
    "coop": HeadMethod(coop.fit, transfers=True),
    "prograd": HeadMethod(prograd.fit, transfers=True),
    "cocoop": HeadMethod(cocoop.fit, transfers=True),
    "plot": HeadMethod(plot.fit, takes_patches=True, transfers=True),
}
SETTINGS: dict[str, tuple[ContextSettings, Schedule]] = {  # published, except cocoop's schedule
    "coop": (ContextSettings(), Schedule()),
    "prograd": (ContextSettings(), Schedule()),
    "cocoop": (cocoop.CONTEXT, cocoop.SCHEDULE),
    "plot": (plot.CONTEXT, plot.SCHEDULE),
}


def method_named(name: str) -> HeadMethod:
    """
    The few-shot method of that name.

    Raises
    ------
    InputError
        There is none.
    """
    known = HEADS | LEARNERS
    if name not in known:
        raise InputError(f"head {name!r} is not known; choose one of {', '.join(known)}")
    return known[name]


@exact_float32()
def fit_head(
    name: str,
    text_features: Any,
    support_features: Any = None,
    support_labels: Any = None,
    *,
    validation_features: Any = None,
    validation_labels: Any = None,
    support_local_features: Any = None,
    validation_local_features: Any = None,
    logit_scale: float = 100.0,
    seed: int = 0,
    progress: TrainingProgress | None = None,
    prompting: Prompting | None = None,
) -> Head:
    """
    Fit a few-shot classifier ("head") to the texts of K classes and a few labelled rows.

    Arrays are numpy or torch, of any float type, and are not modified. Rows that are not unit
    vectors are normalised. The same seed gives the same head.

    Parameters
    ----------
    name : str
        One of `HEADS` or `LEARNERS`.
    text_features : array_like (K, d), or (P, K, d), or a sequence of P arrays (K, d)
        Text embedding of each class; those of P templates are averaged to an ensemble.
    support_features, support_labels : array_like (M, d), (M,)
        The shots, needed by all methods but "prompt-ensemble". Classes may be missing.
    validation_features, validation_labels : array_like (V, d), (V,), optional
        Used to choose hyperparameters; published defaults are used without them.
    support_local_features, validation_local_features : array_like (M, L, d), (V, L, d), optional
        Features of L patches of each image, for "plot" only.
    logit_scale : float
        tau, 1 / temperature: cosines are multiplied by it. TransCLIP on top needs the same.
    seed : int
    progress : callable, optional
        Called with the steps done and the steps in all; by prompt learners also with `loss` and
        `validation`, the accuracy, as text.
    prompting : Prompting, optional
        Text tower, class names and settings, for the prompt learners. They train on the device of
        the tower, all others on the CPU.

    Returns
    -------
    Head
        With `logits(features)`, `predict(features)` and `prior(features)`: the last gives the
        arguments that make the head the prior of TransCLIP, as in
        `fit(X, text_features=T, **head.prior(X))`.

    Raises
    ------
    InputError
        An unknown name, missing shots, a logit scale or seed out of range, or arrays that cannot be
        used.

    Examples
    --------
    >>> import torch
    >>> from transclip_fast import TransCLIP, fit_head
    >>> text, labels = torch.eye(3, 8), torch.arange(3).repeat(4)
    >>> images = text[labels] + 0.2 * torch.rand(12, 8, generator=torch.Generator().manual_seed(0))
    >>> images /= images.norm(dim=1, keepdim=True)
    >>> head = fit_head("tip-adapter", text, images[:6], labels[:6])
    >>> head.parameters
    {'alpha': 1.17, 'beta': 1.0}
    >>> head.predict(images[6:]).tolist()
    [0, 1, 2, 0, 1, 2]
    >>> model = TransCLIP().fit(images[6:], text_features=text, **head.prior(images[6:]))
    >>> model.transduction_.tolist()
    [0, 1, 2, 0, 1, 2]
    """
    check_weight("logit_scale", logit_scale)
    check_scale(logit_scale)
    check_number("seed", seed, 0)
    method = method_named(name)
    known = None if prompting is None else len(prompting.class_names)
    text = own_copy(ensemble(text_features, n_classes=known).cpu())
    shots = labelled_rows("support", support_features, support_labels, support_local_features, text)
    validation = labelled_rows(
        "validation", validation_features, validation_labels, validation_local_features, text
    )
    if shots is None and method.needs_shots:
        raise InputError(f"head {name} needs shots: give support_features and support_labels")
    _check_patches(name, method, {"support": shots, "validation": validation})
    task = HeadTask(
        text=text,
        shots=shots
        or LabelledRows(text.new_empty(0, text.shape[1]), torch.empty(0, dtype=torch.int64)),
        validation=validation,
        logit_scale=logit_scale,
        seed=seed,
        progress=progress or (lambda done, steps, **figures: None),
        prompting=prompting,
    )
    with torch.enable_grad():
        return method.fit(task)


def _check_patches(name: str, method: HeadMethod, rows: dict[str, LabelledRows | None]) -> None:
    """Raise InputError for patches that the method does not take, or that some rows lack."""
    patched = {use: found.features.ndim == 3 for use, found in rows.items() if found is not None}
    if any(patched.values()) and not method.takes_patches:
        use = next(use for use in patched if patched[use])
        takers = ", ".join(n for n, known in (HEADS | LEARNERS).items() if known.takes_patches)
        raise InputError(f"{use}_local_features: the head {name} takes none, only {takers} does")
    if len({*patched.values()}) == 2:
        raise InputError("local features: give those of support and validation, or neither")
