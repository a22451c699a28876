"""`solve --head`: a few-shot method whose prediction is the prior of TransCLIP."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import click
import numpy as np

from transclip_fast.cli import session
from transclip_fast.cli.towers import describe_encoder
from transclip_fast.data.checks import as_unit_rows
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.heads import HEADS, LEARNERS, Head, fit_head, method_named
from transclip_fast.heads.base import inputs_for
from transclip_fast.heads.files import SUFFIX, StoredHead, read_head
from transclip_fast.heads.prompt_ensemble import prompt_texts
from transclip_fast.heads.prompts import TextTower
from transclip_fast.metrics import accuracy
from transclip_fast.progress_bar import progress_bar
from transclip_fast.protocols.data import patched_rows
from transclip_fast.store.features import LOCAL, Features

LABELLED = ("support_features", "support_labels", "validation_features", "validation_labels")
PRIORS = ("prior", "prior_logits", "prototypes")


@dataclass(frozen=True)
class HeadChoice:
    """The head that `--head` names: a method to fit, or the content of a file."""

    name: str
    file: StoredHead | None = None

    @property
    def wants_patches(self) -> bool:
        """True if the head needs local features."""
        return self.file is not None and self.file.head.wants_patches


@dataclass(frozen=True)
class FittedHead:
    """A head and its prediction of features."""

    name: str  # of the method
    parameters: dict[str, float]  # hyperparameters, default or chosen
    labels: np.ndarray  # (N,) int64, predicted by the head alone
    features: Features  # with the head as their prior, and without the shots
    file: str | None = None  # that the head was read from

    def summary(self, truth: np.ndarray | None) -> dict[str, Any]:
        """Its part of run.json."""
        return {
            "name": self.name,
            "accuracy": None if truth is None else accuracy(self.labels, truth),
            "parameters": self.parameters,
            **({} if self.file is None else {"file": self.file}),
        }


def choose_head(name: str) -> HeadChoice:
    """
    Read the head file, or check the name of the method, that `--head` names.

    Raises
    ------
    InputError
        Neither a head file nor a method, or a method that needs more than features.
    """
    if name in LEARNERS:
        raise InputError(
            f"head {name} trains through a text tower: `transclip-fast train-head {name}` does "
            "that and writes a file for --head"
        )
    if name not in HEADS and (name.endswith(SUFFIX) or os.path.exists(name)):
        return HeadChoice(name, read_head(name))
    method_named(name)
    return HeadChoice(name)


def apply_head(
    choice: HeadChoice,
    seed: int,
    features: Features,
    model: TransCLIP,
    stages: session.Stages,
    tower: Callable[[Features], TextTower],
) -> FittedHead:
    """
    Fit the chosen head to the shots of features, or take it from its file; apply it to them.

    TransCLIP then runs as on top of any other method: with the head as prior, lambda as in
    zero-shot, and no support of its own. That is how the paper and its code combine it with
    few-shot methods ("TransCLIP-ZS on top"); shots in TransCLIP itself are TransCLIP-FS.

    `tower` returns the text tower of features, for a head that runs it for each image.

    Raises
    ------
    InputError
        The features have a prior or no texts, the model has a gamma, the head is of other classes,
        dimensions or features, and as `fit_head`.
    """
    head = choice.name
    prior = next((prior for prior in PRIORS if features.get(prior) is not None), None)
    if prior is not None:
        raise InputError(f"{prior}: the head {head} is the prior; leave one of them out")
    if model.gamma is not None:
        raise InputError(f"gamma: the shots go to the head {head}; leave gamma out")
    with stages.time("head"):
        if choice.file is not None:
            fitted = _prepared(choice.name, choice.file, features, model, tower)
            return _apply(fitted, choice.file.name, features, head)
        texts = features.get("text_features")
        if texts is None:
            raise InputError(f"head {head} needs text_features")
        arrays = {array: features.get(array) for array in LABELLED}
        scale = model.logit_scale
        with progress_bar(f"head {head}", "steps") as show:
            fitted = fit_head(head, texts, **arrays, logit_scale=scale, seed=seed, progress=show)
        return _apply(fitted, head, features)


def _prepared(
    file: str,
    read: StoredHead,
    features: Features,
    model: TransCLIP,
    tower: Callable[[Features], TextTower],
) -> Head:
    """The head of a file, checked against the features, with the text tower if it runs one."""
    head, names = read.head, read.class_names
    n_classes, d = head.text.shape
    if features.dim != d:
        raise InputError(
            f"{file}: is for {d} dimensions, {features.path} has {features.dim}; encode with the "
            "model that it is for"
        )
    if None not in (read.encoder, features.encoder) and read.encoder != features.encoder:
        raise InputError(
            f"{file}: is for features of {describe_encoder(read.encoder)}, {features.path} was "
            f"encoded with {describe_encoder(features.encoder)}"
        )
    _check_classes(file, n_classes, names, features)
    if head.logit_scale != model.logit_scale:
        raise InputError(
            f"{file}: was trained with --logit-scale {head.logit_scale:g}; give the same"
        )
    if not head.runs_tower:
        return head
    if names is None:
        raise InputError(f"{file}: has no class names to make prompts of")
    known = copy(features)
    known.encoder = features.encoder or read.encoder
    head = head.for_classes(tower(known), names)
    n_rows = len(features.get("image_features"))
    click.echo(
        f"head {read.name}: {n_rows:,} images, each in the prompts of {n_classes:,} classes, "
        f"are {n_rows * n_classes:,} runs of the text tower",
        err=True,
    )
    return head


def _check_classes(file: str, n_classes: int, names: list[str] | None, features: Features) -> None:
    """Raise InputError unless a head's classes are those of the features."""
    texts = features.get("text_features")
    known = len(prompt_texts(texts)[0]) if texts is not None else n_classes
    if known != n_classes:
        raise InputError(f"{file}: has {n_classes} classes, {features.path} has {known}")
    for k, (own, other) in enumerate(zip(names or [], features.class_names or [], strict=False)):
        if own != other:
            raise InputError(
                f"{file}: its class {k} is {own!r}, that of {features.path} is {other!r}; give "
                "--class-names and --text-features that fit the head"
            )


def _apply(head: Head, name: str, features: Features, file: str | None = None) -> FittedHead:
    """The prediction of a head, and the features with it as their prior."""
    rows = as_unit_rows(
        features.get("image_features"), "image_features", columns=head.text.shape[1]
    )
    used = (*LABELLED, *LOCAL)
    arrays = {array: value for array, value in features.arrays.items() if array not in used}
    arrays["image_features"] = rows
    texts = features.get("text_features")
    if texts is not None:
        # Of several templates the first counts as zero-shot, so that the ensemble shows its gain.
        arrays["text_features"] = prompt_texts(texts)[0]
    with progress_bar(f"head {name}", "images") as show:
        labels, prior = head.labels_and_prior(
            inputs_for(head, rows, patched_rows(rows, features)), show
        )
    solved = features.with_arrays({**arrays, **prior})
    return FittedHead(name, head.parameters, labels.numpy(), solved, file)
