"""Checks of the true labels and the class names that come with features."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np

from transclip_fast.cli.session import counted
from transclip_fast.data.checks import as_labels
from transclip_fast.data.names import odd_names
from transclip_fast.errors import InputError
from transclip_fast.store.features import Features
from transclip_fast.store.names import place


def true_labels(features: Features, n_classes: int) -> np.ndarray | None:
    """The checked labels (N,) int64 of the queries, -1 where unknown; None if they all are."""
    labels = features.get("labels")
    if labels is None:
        return None
    n_rows = len(features.get("image_features"))
    truth = as_labels(labels, "labels", rows=n_rows, n_classes=n_classes, lowest=-1).cpu().numpy()
    if (truth < 0).all():
        warnings.warn("labels: no row has one, so that there is no accuracy", stacklevel=2)
        return None
    return truth


def check_class_names(features: Features, n_classes: int) -> None:
    """Raise InputError unless there are no class names, or one a class; warn of odd ones."""
    names = features.class_names
    if names is not None and len(names) != n_classes:
        raise InputError(
            f"class_names: {counted(len(names), 'name')} for {counted(n_classes, 'class')}; give "
            "one name a class"
        )
    origin = features.origins.get("class_names", "class_names")
    if names is not None and not features.encoded_names:
        for message in odd_names(names, partial(place, origin), "labels"):
            warnings.warn(f"class_names: {message}", stacklevel=2)
