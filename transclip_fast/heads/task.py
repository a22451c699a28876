"""Texts, labelled rows and settings of one fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from transclip_fast.data.labelled_rows import LabelledRows, as_labelled_rows
from transclip_fast.data.patches import PatchedRows, images
from transclip_fast.errors import InputError
from transclip_fast.heads.prompting import Prompting

# Called with (steps done, steps in all, **figures): figures are text by name, e.g. the loss.
TrainingProgress: TypeAlias = Callable[..., None]


@dataclass(frozen=True)
class HeadTask:
    """Texts, shots and settings of one fit."""

    text: torch.Tensor  # (K, d) float32, unit rows
    shots: LabelledRows  # (0, d) without any; classes may be missing
    validation: LabelledRows | None  # chooses hyperparameters, instead of published defaults
    logit_scale: float  # tau: logits are tau times cosines
    seed: int
    progress: TrainingProgress
    prompting: Prompting | None = None  # of prompt learners

    @property
    def n_shots(self) -> int:
        """Largest number of shots of a class."""
        return int(torch.bincount(self.shots.labels).max())


def labelled_rows(
    use: str, features: Any, labels: Any, patches: Any, text: torch.Tensor
) -> LabelledRows | None:
    """Check the rows (M, d), labels (M,) and patches (M, L, d) of "support" or "validation"."""
    rows = as_labelled_rows(use, features, labels, text.shape[1], len(text))
    name = f"{use}_local_features"
    if rows is None:
        if patches is not None:
            raise InputError(f"{name} and {use}_features come together; one is missing")
        return None
    found = rows.features if patches is None else PatchedRows(rows.features, patches, name)[:]
    return LabelledRows(own_copy(found), own_copy(rows.labels))


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """
    A copy that a head can keep: the caller may write to the tensor.

    It can be trained with, too, unlike a tensor that inference mode made.
    """
    return tensor.clone()


def as_fit_arguments(rows: Mapping[str, LabelledRows], *, patches: bool = True) -> dict[str, Any]:
    """Labelled rows by use as arguments of `fit_head`: "support_features", "support_labels", ..."""
    found: dict[str, Any] = {}
    for use, labelled in rows.items():
        found |= {f"{use}_features": images(labelled.features), f"{use}_labels": labelled.labels}
        if patches and labelled.features.ndim == 3:
            found[f"{use}_local_features"] = labelled.features[:, 1:]
    return found
