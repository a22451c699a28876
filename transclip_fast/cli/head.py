"""`solve --head`: a few-shot method whose prediction is the prior of TransCLIP."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import click
import numpy as np

from transclip_fast.cli import session
from transclip_fast.cli.towers import load_tower
from transclip_fast.data.checks import as_unit_rows
from transclip_fast.data.names import first_difference
from transclip_fast.data.priors import PRIORS
from transclip_fast.data.texts import ensemble, moved_text, prompt_texts
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.heads import HEADS, LEARNERS, Head, fit_head, method_named
from transclip_fast.heads.base import inputs_for
from transclip_fast.heads.files import StoredHead, read_head
from transclip_fast.metrics import accuracy
from transclip_fast.progress_bar import progress_bar
from transclip_fast.protocols.data import patched_rows
from transclip_fast.store.features import LABELLED, LOCAL, Features, check_encoder
from transclip_fast.store.tensors import SUFFIX


@dataclass(frozen=True)
class FittedHead:
    """A head and its prediction of features."""

    name: str  # of the method
    parameters: dict[str, float]  # hyperparameters, default or chosen
    labels: np.ndarray  # (N,) int64, predicted by the head alone
    features: Features  # with the head as their prior, and without the shots
    file: str | None  # that the head was read from

    def summary(self, truth: np.ndarray | None) -> dict[str, Any]:
        """Its part of run.json."""
        return {
            "name": self.name,
            "accuracy": None if truth is None else accuracy(self.labels, truth),
            "parameters": self.parameters,
            **({} if self.file is None else {"file": self.file}),
        }


def read_choice(name: str) -> StoredHead | None:
    """The head file that `--head` names; None for a method to fit."""
    if name in LEARNERS:
        raise InputError(
            f"head {name} trains through a text tower: `transclip-fast train-head {name}` does "
            "that and writes a file for --head"
        )
    if name not in HEADS and (name.endswith(SUFFIX) or os.path.exists(name)):
        return read_head(name)
    method_named(name)
    return None


def apply_head(
    name: str,
    stored: StoredHead | None,
    options: Mapping[str, Any],
    model: TransCLIP,
    stages: session.Stages,
    features: Features,
) -> FittedHead:
    """
    Fit the head `name` to the shots of features, or take it from its file; apply it to them.

    TransCLIP then runs as on top of any other method: with the head as prior, lambda as in
    zero-shot, and no support of its own. That is how the paper and its code combine it with
    few-shot methods ("TransCLIP-ZS on top"); shots in TransCLIP itself are TransCLIP-FS.
    """
    prior = next((prior for prior in PRIORS if features.get(prior) is not None), None)
    if prior is not None:
        raise InputError(f"{prior}: the head {name} is the prior; leave one of them out")
    if model.gamma is not None:
        raise InputError(f"gamma: the shots go to the head {name}; leave gamma out")
    with stages.time("head"):
        if stored is None:
            return _predicted(_fitted(name, features, model, options["seed"]), name, features)
        _check_stored(name, stored, features, model)
        head = _with_tower(name, stored, features, options)
        return _predicted(head, stored.name, features, name)


def _fitted(name: str, features: Features, model: TransCLIP, seed: int) -> Head:
    """The head of a method, fitted to the shots."""
    texts = features.get("text_features")
    if texts is None:
        raise InputError(f"head {name} needs text_features")
    arrays = {array: features.get(array) for array in LABELLED}
    scale = model.logit_scale
    with progress_bar(f"head {name}", "steps") as show:
        return fit_head(name, texts, **arrays, logit_scale=scale, seed=seed, progress=show)


def _check_stored(file: str, stored: StoredHead, features: Features, model: TransCLIP) -> None:
    """Raise InputError unless the head of a file is for these features and this model."""
    head = stored.head
    n_classes, d = head.text.shape
    if features.dim != d:
        raise InputError(
            f"{file}: is for {d} dimensions, {features.path} has {features.dim}; encode with the "
            "model that it is for"
        )
    check_encoder(file, stored.encoder, features)
    texts = features.get("text_features")
    known = len(prompt_texts(texts)[0]) if texts is not None else n_classes
    if known != n_classes:
        raise InputError(f"{file}: has {n_classes} classes, {features.path} has {known}")
    own, others = stored.class_names or [], features.class_names or []
    k = first_difference(own, others)
    if k is not None and k < min(len(own), len(others)):
        raise InputError(
            f"{file}: its class {k} is {own[k]!r}, that of {features.path} is {others[k]!r}; give "
            "--class-names and --text-features that fit the head"
        )
    if texts is not None and not (own and others):
        moved = moved_text(head.text, ensemble(texts, d, n_classes))
        if moved is not None:
            raise InputError(
                f"{file}: its class {moved[0]} has the text of class {moved[1]} of "
                f"{features.path}; give --text-features in the order of the head"
            )
    if head.logit_scale != model.logit_scale:
        raise InputError(
            f"{file}: was trained with --logit-scale {head.logit_scale:g}; give the same"
        )


def _with_tower(
    file: str, stored: StoredHead, features: Features, options: Mapping[str, Any]
) -> Head:
    """The head of a file, with the text tower if it runs one for each image."""
    names = stored.class_names
    if not stored.head.runs_tower:
        return stored.head
    if names is None:
        raise InputError(f"{file}: has no class names to make prompts of")
    known = copy(features)
    known.encoder = features.encoder or stored.encoder
    head = stored.head.for_classes(load_tower(known, options), names)
    n_rows, n_classes = len(features.get("image_features")), len(names)
    click.echo(
        f"head {stored.name}: {n_rows:,} images, each in the prompts of {n_classes:,} classes, "
        f"are {n_rows * n_classes:,} runs of the text tower",
        err=True,
    )
    return head


def _predicted(head: Head, name: str, features: Features, file: str | None = None) -> FittedHead:
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
