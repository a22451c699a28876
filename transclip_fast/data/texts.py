"""Text features of one or several templates."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from transclip_fast.data.checks import as_unit_rows
from transclip_fast.errors import InputError, user_level


def ensemble(text_features: Any, columns: int | None = None) -> torch.Tensor:
    """
    Prototypes (K, d), unit rows float32, from the texts of one or several templates.

    Parameters
    ----------
    text_features : array_like (K, d), (P, K, d), or a sequence of P arrays (K, d)
    columns : int, optional
        d.

    Raises
    ------
    InputError
        Another shape, templates of different shapes, and as `as_unit_rows`.
    """
    templates = prompt_texts(text_features)
    if not templates:
        raise InputError("text_features: holds no template")
    rows = [as_unit_rows(template, "text_features", columns=columns) for template in templates]
    if len({row.shape for row in rows}) != 1:
        shapes = ", ".join(str(tuple(row.shape)) for row in rows[:3])
        raise InputError(f"text_features: templates have different shapes ({shapes}, ...)")
    if len(rows) == 1:
        return rows[0]
    mean = torch.stack([normalize(row, dim=-1) for row in rows]).mean(0)
    return as_unit_rows(normalize(mean, dim=-1), "text_features")


def prompt_texts(text_features: Any) -> list[Any]:
    """The P arrays (K, d) of `text_features`, see `ensemble`; one array if it is (K, d)."""
    if isinstance(text_features, np.ndarray | torch.Tensor):
        return list(text_features) if text_features.ndim == 3 else [text_features]
    parts = list(text_features)
    nested = bool(parts) and getattr(parts[0], "ndim", 0) == 2
    return parts if nested else [text_features]


def templates_first(text_features: Any, n_classes: int | None) -> Any:
    """
    Texts (P, K, d), also if they are (K, P, d), as far as the known number K of classes tells it.

    Raises
    ------
    InputError
        As many templates as classes, so that it does not.
    """
    if text_features.ndim != 3:
        return text_features
    if n_classes is None:
        n_templates, n_texts = text_features.shape[:2]
        if n_templates > n_texts:
            warnings.warn(
                f"text_features: shape {tuple(text_features.shape)} is taken as {n_templates} "
                f"templates of {n_texts} classes; if it is the other way, swap the first two axes",
                stacklevel=user_level(),
            )
        return text_features
    fits = [size == n_classes for size in text_features.shape[:2]]
    if all(fits) and n_classes > 1:
        raise InputError(
            f"text_features: shape {tuple(text_features.shape)} can be (templates, classes, d) and "
            "(classes, templates, d); give the mean over the templates, (classes, d)"
        )
    return text_features.swapaxes(0, 1) if fits == [True, False] else text_features
