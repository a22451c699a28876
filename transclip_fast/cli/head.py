"""A head between FEATURES and TransCLIP: what `solve --head` adds to a solve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from transclip_fast.cli import common
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.evaluate import accuracy
from transclip_fast.heads import fit_head
from transclip_fast.heads.prompt_ensemble import prompt_texts
from transclip_fast.inputs import as_unit_rows
from transclip_fast.store.features import Features

LABELLED = ("support_features", "support_labels", "validation_features", "validation_labels")
PRIORS = ("prior", "prior_logits", "prototypes")


@dataclass(frozen=True)
class FittedHead:
    """
    A head that was fitted to stored features, and what it said of them.

    Parameters
    ----------
    name : str
    parameters : dict
        What it was given or chose.
    labels : ndarray (N,) int64
        What it predicts by itself.
    stored : Features
        The features with the head as their prior, and without the shots.
    """

    name: str
    parameters: dict[str, float]
    labels: np.ndarray
    stored: Features

    def summary(self, truth: np.ndarray | None) -> dict[str, Any]:
        """Its part of run.json."""
        return {
            "name": self.name,
            "accuracy": None if truth is None else accuracy(self.labels, truth),
            "parameters": self.parameters,
        }


def fit_stored_head(
    name: str, seed: int, stored: Features, model: TransCLIP, stages: common.Stages
) -> FittedHead:
    """
    Fit a head to the shots of stored features.

    TransCLIP then runs as on top of any other method: with the head as prior, lambda as in
    zero-shot, and no support of its own. That is how the paper and its code combine it with
    few-shot methods ("TransCLIP-ZS on top"); shots in TransCLIP itself are TransCLIP-FS.

    Raises
    ------
    InputError
        A prior in `stored` as well, a gamma, no text features, and as `fit_head`.
    """
    given = [prior for prior in PRIORS if stored.get(prior) is not None]
    if given:
        raise InputError(f"{given[0]}: the head {name} is the prior; leave one of them out")
    if model.gamma is not None:
        raise InputError(f"gamma: the shots go to the head {name}; leave gamma out")
    texts = stored.get("text_features")
    if texts is None:
        raise InputError(f"head {name} needs text_features")
    with stages.time("head"), common.progress(f"head {name}", "steps") as show:
        labelled = {array: stored.get(array) for array in LABELLED}
        head = fit_head(
            name, texts, **labelled, logit_scale=model.logit_scale, seed=seed, progress=show
        )
        rows = as_unit_rows(
            stored.get("image_features"), "image_features", columns=head.text.shape[1]
        )
        labels, prior = head.labels_and_prior(rows)
    kept = {array: value for array, value in stored.arrays.items() if array not in LABELLED}
    # Of several templates the first counts as zero-shot, so that the ensemble shows what it adds.
    kept |= {"image_features": rows, "text_features": prompt_texts(texts)[0]}
    solved = stored.with_arrays({**kept, **prior})
    return FittedHead(name, head.parameters, labels.numpy(), solved)
