"""
Few-shot methods on features that are already there: a classifier from texts and a few shots.

Each is a file of this folder with a function `fit`; those of `prompts` train through a text tower.
TransCLIP goes on top of what they predict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from transclip_fast.data.checks import as_labelled_rows
from transclip_fast.data.patches import PatchedRows
from transclip_fast.errors import InputError
from transclip_fast.heads import (
    clip_adapter,
    linear_probe,
    prompt_ensemble,
    task_res,
    tip_adapter,
    tip_adapter_f,
)
from transclip_fast.heads.prompt_ensemble import ensemble
from transclip_fast.heads.prompts import (
    ContextSettings,
    Prompting,
    Schedule,
    cocoop,
    coop,
    plot,
    prograd,
)
from transclip_fast.heads.task import Head, Labelled, Progress, PrototypeHead, Task

__all__ = [
    "HEADS",
    "LEARNERS",
    "SETTINGS",
    "Head",
    "PrototypeHead",
    "check_head",
    "ensemble",
    "fit_head",
]

HEADS: dict[str, Callable[[Task], Head]] = {
    "prompt-ensemble": prompt_ensemble.fit,
    "tip-adapter": tip_adapter.fit,
    "tip-adapter-f": tip_adapter_f.fit,
    "clip-adapter": clip_adapter.fit,
    "taskres": task_res.fit,
    "linear-probe": linear_probe.fit,
}
LEARNERS: dict[str, Callable[[Task], Head]] = {  # of prompts, through a text tower
    "coop": coop.fit,
    "prograd": prograd.fit,
    "cocoop": cocoop.fit,
    "plot": plot.fit,
}
SETTINGS: dict[str, tuple[ContextSettings, Schedule]] = {  # published, but for cocoop's schedule
    "coop": (ContextSettings(), Schedule()),
    "prograd": (ContextSettings(), Schedule()),
    "cocoop": (cocoop.CONTEXT, cocoop.SCHEDULE),
    "plot": (plot.CONTEXT, plot.SCHEDULE),
}
WITH_PATCHES = frozenset({"plot"})
WITHOUT_SHOTS = frozenset({"prompt-ensemble"})
TRANSFERABLE = frozenset({"clip-adapter"})  # their `transfer` takes other classes


def check_head(name: str) -> None:
    """Raise InputError unless there is a head of that name."""
    known = (*HEADS, *LEARNERS)
    if name not in known:
        raise InputError(f"head {name!r} is not known; choose one of {', '.join(known)}")


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
    progress: Progress | None = None,
    prompting: Prompting | None = None,
) -> Head:
    """
    Fit a head to the texts of K classes and a few labelled rows.

    Arrays are numpy or torch, of any float type, and never modified; rows off the unit sphere are
    normalised. The same seed gives the same head.

    Parameters
    ----------
    name : str
        One of `HEADS` or `LEARNERS`.
    text_features : array_like (K, d), or (P, K, d), or a sequence of P arrays (K, d)
        Text embedding of each class; of P templates, the ensemble of them is used.
    support_features, support_labels : array_like (M, d), (M,)
        The shots; needed by all but "prompt-ensemble". Classes may be without.
    validation_features, validation_labels : array_like (V, d), (V,), optional
        Choose hyperparameters; without them published defaults hold.
    support_local_features, validation_local_features : array_like (M, L, d), (V, L, d), optional
        Features of each image's L patches, for the head plot alone.
    logit_scale : float
        tau; TransCLIP on top needs the same.
    seed : int
    progress : callable, optional
        Called with the steps done and their number, and by prompt learners with `loss` and
        `validation`, the accuracy, as text.
    prompting : Prompting, optional
        Text tower, class names and settings, which the prompt learners need; these train where the
        tower is, all others on the CPU.

    Returns
    -------
    Head
        `logits(features)`, `predict(features)`, and `prior(features)`, the arguments that make
        TransCLIP's `fit` take it: `model.fit(X, T, **head.prior(X))`, X a tensor of unit rows.

    Raises
    ------
    InputError
        An unknown name, no shots, and arrays that cannot be used.
    """
    check_head(name)
    text = ensemble(text_features)
    n_classes, d = text.shape
    shots = as_labelled_rows("support", support_features, support_labels, d, n_classes)
    if shots is None and name not in WITHOUT_SHOTS:
        raise InputError(f"head {name} needs shots: give support_features and support_labels")
    held_out = as_labelled_rows("validation", validation_features, validation_labels, d, n_classes)
    shots = _patched("support", shots, support_local_features, name)
    held_out = _patched("validation", held_out, validation_local_features, name)
    if shots and held_out and shots[0].ndim != held_out[0].ndim:
        raise InputError("local features: give those of support and validation, or neither")
    task = Task(
        text=text,
        shots=Labelled(*(shots or (text.new_empty(0, d), torch.empty(0, dtype=torch.int64)))),
        validation=held_out and Labelled(*held_out),
        logit_scale=logit_scale,
        seed=seed,
        progress=progress or (lambda done, of, **figures: None),
        prompting=prompting,
    )
    with torch.enable_grad():
        return (HEADS | LEARNERS)[name](task)


def _patched(
    use: str, rows: tuple[torch.Tensor, torch.Tensor] | None, patches: Any, head: str
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Labelled rows with their patches behind them, where there are any."""
    if patches is None:
        return rows
    name = f"{use}_local_features"
    if head not in WITH_PATCHES:
        raise InputError(f"{name}: the head {head} takes none, only {', '.join(WITH_PATCHES)} does")
    if rows is None:
        raise InputError(f"{name} and {use}_features come together; one is missing")
    return PatchedRows(rows[0], patches, name)[:], rows[1]
