"""What `TransCLIP.fit` is given, checked, on the device that does the work."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from transclip_fast.data.checks import (
    as_labelled_rows,
    as_log_probabilities,
    as_logits,
    as_unit_rows,
    is_aligned,
    unread_matrix,
)
from transclip_fast.data.feature_rows import Rows
from transclip_fast.data.npy_shards import StoredRows
from transclip_fast.errors import InputError
from transclip_fast.graph.exact import nearest
from transclip_fast.metrics import check_class_order
from transclip_fast.solver.layout import Size
from transclip_fast.solver.parameters import Parameters
from transclip_fast.solver.prior import GivenPrior, LinearPrior, Prior
from transclip_fast.solver.support import Support


def size_of(
    X: Any,
    n_classes: int,
    parameters: Parameters,
    device: torch.device,
    *,
    linear: bool = True,
    runs: int = 1,
) -> Size:
    """The size of a problem, as far as memory is concerned."""
    matrix = unread_matrix(X, "X")
    n_rows, dim = matrix.shape[0], matrix.shape[1]
    in_file = isinstance(X, np.memmap | StoredRows)
    own = n_rows * dim * matrix.dtype.itemsize
    # A given prior, its logarithm, and what computing that takes.
    given = 0 if linear else 16 * n_rows * n_classes
    as_is = isinstance(matrix, torch.Tensor) and is_aligned(matrix) and device.type == "cpu"
    return Size(
        n_rows,
        n_classes,
        dim,
        parameters.n_neighbors,
        stored=own if in_file else 0,
        given=given if in_file else given + own,
        copied=in_file or not as_is,
        linear=linear,
        runs=runs,
    )


def make_priors(
    shape: tuple[int, int],
    device: torch.device,
    logit_scale: float,
    *,
    text_features: Any = None,
    prior: Any = None,
    prior_logits: Any = None,
    prototypes: Any = None,
) -> tuple[Prior, Prior]:
    """The prior, and the one that counts as zero-shot: of the text features, if there are."""
    if sum(x is not None for x in (prior, prior_logits, prototypes)) > 1:
        raise InputError("give one of prior, prior_logits and prototypes, not several")

    def linear(array: Any, name: str) -> Prior:
        rows = as_unit_rows(array, name, columns=shape[1])
        return LinearPrior.from_prototypes(rows, logit_scale).to(device)

    def given(log_probabilities: torch.Tensor) -> Prior:
        return GivenPrior(log_probabilities).to(device)

    text = None if text_features is None else linear(text_features, "text_features")
    if prior is not None:
        chosen = given(as_log_probabilities(prior, "prior", rows=shape[0]))
    elif prior_logits is not None:
        chosen = given(as_logits(prior_logits, "prior_logits", rows=shape[0]))
    elif prototypes is not None:
        chosen = linear(prototypes, "prototypes")
    elif text is not None:
        chosen = text
    else:
        raise InputError(
            "no text features and no prior: give text_features, prototypes, prior or prior_logits"
        )
    if text is not None and text.n_classes != chosen.n_classes:
        raise InputError(
            f"text_features: has {text.n_classes} classes, the prior {chosen.n_classes}"
        )
    return chosen, text or chosen


def make_support(
    features: Rows, prior: Prior, rows: Any, labels: Any, parameters: Parameters
) -> Support | None:
    """The labelled rows and the queries that are most similar to them."""
    labelled = as_labelled_rows("support", rows, labels, features.shape[1], prior.n_classes)
    if labelled is None:
        return None
    shots, classes = labelled[0].to(features.device), labelled[1]
    support = Support.build(
        shots,
        classes.to(features.device),
        features,
        n_classes=prior.n_classes,
        n_neighbors=parameters.n_neighbors,
        clamp_similarity=parameters.clamp_similarity,
    )
    _warn_of_order("support", classes, prior, shots, support.neighbors[:, 0])
    return support


def make_validation(
    features: Rows, prior: Prior, rows: Any, labels: Any
) -> tuple[np.ndarray, np.ndarray] | None:
    """The most similar query (V,) of each validation row, and the labels (V,)."""
    labelled = as_labelled_rows("validation", rows, labels, features.shape[1], prior.n_classes)
    if labelled is None:
        return None
    held = labelled[0].to(features.device)
    ids, _ = nearest(held, features, 1)
    _warn_of_order("validation", labelled[1], prior, held, ids[:, 0])
    return ids[:, 0].cpu().numpy(), labelled[1].numpy()


def _warn_of_order(
    name: str, labels: torch.Tensor, prior: Prior, rows: torch.Tensor, queries: torch.Tensor
) -> None:
    """Warn where labels (M,) contradict the prior of rows (M, d), or of their nearest queries."""
    if isinstance(prior, LinearPrior):
        zero_shot = prior.predict(rows)[0]
    else:
        zero_shot = prior.log_probabilities[queries].argmax(1).cpu().numpy()
    for message in check_class_order(zero_shot, labels.numpy()):
        warnings.warn(f"{name}_labels: {message}", stacklevel=4)
