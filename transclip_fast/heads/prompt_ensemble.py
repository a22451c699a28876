"""Prompt ensembles: one prototype a class from the texts of several templates."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from transclip_fast.data.checks import as_unit_rows
from transclip_fast.errors import InputError
from transclip_fast.heads.base import PrototypeHead, unit
from transclip_fast.heads.task import Task


def fit(task: Task) -> PrototypeHead:
    """
    The prototypes of `ensemble`, which `fit_head` has made already: `task.text`.

    Source: Radford et al. 2021, Learning Transferable Visual Models From Natural Language
    Supervision, section 3.1.4.
    """
    return PrototypeHead(text=task.text, logit_scale=task.logit_scale)


def ensemble(text_features: Any) -> torch.Tensor:
    """
    Prototypes (K, d), unit rows float32, from the texts of one or several templates.

    Parameters
    ----------
    text_features : array_like (K, d), (P, K, d), or a sequence of P arrays (K, d)

    Raises
    ------
    InputError
        Another shape, templates of different shapes, and as `as_unit_rows`.
    """
    templates = prompt_texts(text_features)
    if not templates:
        raise InputError("text_features: holds no template")
    rows = [as_unit_rows(template, "text_features") for template in templates]
    if len({row.shape for row in rows}) != 1:
        shapes = ", ".join(str(tuple(row.shape)) for row in rows[:3])
        raise InputError(f"text_features: templates have different shapes ({shapes}, ...)")
    if len(rows) == 1:
        return rows[0]
    mean = torch.stack([unit(row) for row in rows]).mean(0)
    return as_unit_rows(unit(mean), "text_features")


def prompt_texts(text_features: Any) -> list[Any]:
    """The P arrays (K, d) of `text_features`, see `ensemble`; one array if it is (K, d)."""
    if isinstance(text_features, np.ndarray | torch.Tensor):
        return list(text_features) if text_features.ndim == 3 else [text_features]
    parts = list(text_features)
    nested = bool(parts) and getattr(parts[0], "ndim", 0) == 2
    return parts if nested else [text_features]
