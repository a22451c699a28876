"""Labelled rows as arguments of `fit_head`, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from transclip_fast.data.checks import as_labelled_rows
from transclip_fast.data.patches import PatchedRows, images
from transclip_fast.errors import InputError
from transclip_fast.heads.task import Labelled


def labelled_rows(
    use: str, features: Any, labels: Any, patches: Any, text: torch.Tensor
) -> Labelled | None:
    """Check the rows (M, d), labels (M,) and patches (M, L, d) of "support" or "validation"."""
    rows = as_labelled_rows(use, features, labels, text.shape[1], len(text))
    if patches is None:
        return None if rows is None else Labelled(*rows)
    name = f"{use}_local_features"
    if rows is None:
        raise InputError(f"{name} and {use}_features come together; one is missing")
    return Labelled(PatchedRows(rows[0], patches, name)[:], rows[1])


def as_fit_arguments(rows: Mapping[str, Labelled], *, patches: bool = True) -> dict[str, Any]:
    """Labelled rows by use as arguments of `fit_head`: "support_features", "support_labels", ..."""
    found: dict[str, Any] = {}
    for use, labelled in rows.items():
        found |= {f"{use}_features": images(labelled.features), f"{use}_labels": labelled.labels}
        if patches and labelled.features.ndim == 3:
            found[f"{use}_local_features"] = labelled.features[:, 1:]
    return found
