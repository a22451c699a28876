"""A head between FEATURES and TransCLIP: what `solve --head` adds to a solve."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import click
import numpy as np

from transclip_fast.cli import session
from transclip_fast.cli.towers import told
from transclip_fast.data.checks import as_unit_rows
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.heads import HEADS, LEARNERS, Head, check_head, fit_head
from transclip_fast.heads.files import read_head
from transclip_fast.heads.prompt_ensemble import prompt_texts
from transclip_fast.heads.prompts import TextTower
from transclip_fast.heads.prompts.cocoop import ConditionalHead
from transclip_fast.heads.task import inputs_for
from transclip_fast.metrics import accuracy
from transclip_fast.progress_bar import progress_bar
from transclip_fast.protocols.data import patched_rows
from transclip_fast.store.features import LOCAL, Features

LABELLED = ("support_features", "support_labels", "validation_features", "validation_labels")
PRIORS = ("prior", "prior_logits", "prototypes")
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class FittedHead:
    """
    A head that was fitted to stored features, or elsewhere, and what it said of them.

    Parameters
    ----------
    name : str
    parameters : dict
        What it was given or chose.
    labels : ndarray (N,) int64
        What it predicts by itself.
    stored : Features
        The features with the head as their prior, and without the shots.
    file : str, optional
        Where it comes from.
    """

    name: str
    parameters: dict[str, float]
    labels: np.ndarray
    stored: Features
    file: str | None = None

    def summary(self, truth: np.ndarray | None) -> dict[str, Any]:
        """Its part of run.json."""
        return {
            "name": self.name,
            "accuracy": None if truth is None else accuracy(self.labels, truth),
            "parameters": self.parameters,
            **({} if self.file is None else {"file": self.file}),
        }


def is_file(head: str) -> bool:
    """Whether `--head` names a file instead of a method."""
    known = head in HEADS or head in LEARNERS
    return not known and (head.endswith(SUFFIX) or os.path.exists(head))


def check_named(head: str) -> None:
    """Raise InputError unless `--head` names a file or a method that needs nothing but features."""
    if is_file(head):
        return
    check_head(head)
    if head in LEARNERS:
        raise InputError(
            f"head {head} trains through a text tower: `transclip-fast train-head {head}` does "
            "that and writes a file for --head"
        )


def wants_patches(head: str | None) -> bool:
    """Whether `--head` names a file of a head that transports local features."""
    return head is not None and is_file(head) and getattr(read_head(head).head, "patches", 0) > 0


def stored_head(
    head: str,
    seed: int,
    stored: Features,
    model: TransCLIP,
    stages: session.Stages,
    tower: Callable[[Features], TextTower],
) -> FittedHead:
    """
    A head from a file, or fitted to the shots of stored features.

    TransCLIP then runs as on top of any other method: with the head as prior, lambda as in
    zero-shot, and no support of its own. That is how the paper and its code combine it with
    few-shot methods ("TransCLIP-ZS on top"); shots in TransCLIP itself are TransCLIP-FS.

    `tower` gives the text tower of features to a head that needs one for each image.

    Raises
    ------
    InputError
        A prior in `stored` as well, a gamma, no text features, a head of other classes, dimensions
        or features, and as `fit_head` and `read_head`.
    """
    given = [prior for prior in PRIORS if stored.get(prior) is not None]
    if given:
        raise InputError(f"{given[0]}: the head {head} is the prior; leave one of them out")
    if model.gamma is not None:
        raise InputError(f"gamma: the shots go to the head {head}; leave gamma out")
    if is_file(head):
        with stages.time("head"):
            return _from_file(head, stored, model, tower)
    texts = stored.get("text_features")
    if texts is None:
        raise InputError(f"head {head} needs text_features")
    with stages.time("head"), progress_bar(f"head {head}", "steps") as show:
        labelled = {array: stored.get(array) for array in LABELLED}
        fitted = fit_head(
            head, texts, **labelled, logit_scale=model.logit_scale, seed=seed, progress=show
        )
        return _beneath(fitted, head, stored)


def _from_file(
    file: str, stored: Features, model: TransCLIP, tower: Callable[[Features], TextTower]
) -> FittedHead:
    kept = read_head(file)
    head, names = kept.head, kept.class_names
    n_classes, d = head.text.shape
    if stored.get("image_features").shape[1] != d:
        raise InputError(
            f"{file}: is for {d} dimensions, {stored.path} has "
            f"{stored.get('image_features').shape[1]}; encode with the model that it is for"
        )
    if None not in (kept.encoder, stored.encoder) and kept.encoder != stored.encoder:
        raise InputError(
            f"{file}: is for features of {told(kept.encoder or {})}, {stored.path} was encoded "
            f"with {told(stored.encoder or {})}"
        )
    _check_classes(file, n_classes, names, stored)
    if head.logit_scale != model.logit_scale:
        raise InputError(
            f"{file}: was trained with --logit-scale {head.logit_scale:g}; give the same"
        )
    if isinstance(head, ConditionalHead):
        if names is None:
            raise InputError(f"{file}: has no class names to make prompts of")
        known = copy(stored)
        known.encoder = stored.encoder or kept.encoder
        head = head.for_classes(tower(known), names)
        n_rows = len(stored.get("image_features"))
        click.echo(
            f"head {kept.name}: {n_rows:,} images, each in the prompts of {n_classes:,} classes, "
            f"are {n_rows * n_classes:,} runs of the text tower",
            err=True,
        )
    return _beneath(head, kept.name, stored, file)


def _check_classes(file: str, n_classes: int, names: list[str] | None, stored: Features) -> None:
    """Raise InputError unless a head's classes are those of the features."""
    texts = stored.get("text_features")
    known = len(prompt_texts(texts)[0]) if texts is not None else n_classes
    if known != n_classes:
        raise InputError(f"{file}: has {n_classes} classes, {stored.path} has {known}")
    for k, (own, other) in enumerate(zip(names or [], stored.class_names or [], strict=False)):
        if own != other:
            raise InputError(
                f"{file}: its class {k} is {own!r}, that of {stored.path} is {other!r}; give "
                "--class-names and --text-features that fit the head"
            )


def _beneath(head: Head, name: str, stored: Features, file: str | None = None) -> FittedHead:
    """The features with a head as their prior."""
    rows = as_unit_rows(stored.get("image_features"), "image_features", columns=head.text.shape[1])
    unseen = (*LABELLED, *LOCAL)
    kept = {array: value for array, value in stored.arrays.items() if array not in unseen}
    kept["image_features"] = rows
    texts = stored.get("text_features")
    if texts is not None:
        # Of several templates the first counts as zero-shot, so that the ensemble shows its gain.
        kept["text_features"] = prompt_texts(texts)[0]
    seen = inputs_for(head, rows, patched_rows(rows, stored))
    with progress_bar(f"head {name}", "images") as show:
        labels, prior = head.labels_and_prior(seen, show)
    return FittedHead(
        name, head.parameters, labels.numpy(), stored.with_arrays({**kept, **prior}), file
    )
