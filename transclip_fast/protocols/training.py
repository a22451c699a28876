"""The training of one head on features: its rows, checkpoint and accuracies."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from transclip_fast.data.checks import as_unit_rows
from transclip_fast.data.labelled_rows import LabelledRows
from transclip_fast.errors import InputError
from transclip_fast.heads import Head
from transclip_fast.heads.base import PrototypeHead, inputs_for
from transclip_fast.heads.prompts import Prompting
from transclip_fast.metrics import accuracy
from transclip_fast.protocols.data import draw_shots, labelled_pools, patched_rows
from transclip_fast.store.arrays import array_sha256
from transclip_fast.store.features import Features
from transclip_fast.version import __version__


def draw_rows(
    features: Features, text: torch.Tensor, shots: int | None, seed: int
) -> dict[str, LabelledRows]:
    """The shots and validation rows of the training."""
    n_classes, d = text.shape
    pools = labelled_pools(features, d, n_classes, text)
    if "support" not in pools:
        raise InputError(
            "has no shots: give a folder with train/, or support_features and support_labels"
        )
    shortage = shots and pools["support"].shortage(shots)
    if shortage:
        warnings.warn(f"{features.path}: {shortage}", stacklevel=2)
    return draw_shots(pools, shots, seed)


def checkpoint_identity(
    name: str,
    features: Features,
    rows: Mapping[str, LabelledRows],
    prompting: Prompting,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that the result of a training depends on."""
    hashes = {
        f"{use}_{part}": array_sha256(getattr(labelled, part))
        for use, labelled in rows.items()
        for part in ("features", "labels")
    }
    return {
        "name": name,
        **prompting.identity,
        "text": features.inputs_sha256()["text_features"],
        **hashes,
        **{option: options[option] for option in ("seed", "logit_scale")},
        "device": prompting.tower.device.type,
        "version": __version__,
    }


def summarise_head(
    head: Head,
    features: Features,
    rows: Mapping[str, LabelledRows],
    text: torch.Tensor,
    truth: np.ndarray | None,
) -> dict[str, Any]:
    """The head's parameters and words, and its accuracy on queries and validation rows."""
    before = after = validation = None
    # For a head that runs the tower for every query this takes long, and `solve` does it anyway.
    if truth is not None and not head.runs_tower:
        queries = as_unit_rows(
            features.get("image_features"), "image_features", columns=text.shape[1]
        )
        inputs = inputs_for(head, queries, patched_rows(queries, features))
        zero_shot = PrototypeHead(text=text, logit_scale=head.logit_scale)
        before = accuracy(zero_shot.predict(queries).numpy(), truth)
        after = accuracy(head.predict(inputs).numpy(), truth)
    if "validation" in rows:
        held_out = rows["validation"]
        validation = accuracy(head.predict(held_out.features).numpy(), held_out.labels.numpy())
    return {
        "n_classes": len(head.text),
        "n_shots": len(rows["support"]),
        "n_queries": len(features.get("image_features")),
        "n_labelled": 0 if truth is None else int((truth >= 0).sum()),
        "zero_shot_accuracy": before,
        "accuracy": after,
        "validation_accuracy": validation,
        "parameters": head.parameters,
        "nearest_words": head.words_by_context(features.class_names or []),
    }
