"""Rows and their classes: shots and validation rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from transclip_fast.data.checks import as_labels, as_unit_rows
from transclip_fast.errors import InputError


@dataclass(frozen=True)
class LabelledRows:
    """Rows (M, d) float32, or (M, 1 + L, d) with L patches, and their classes (M,) int64."""

    features: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @staticmethod
    def joined(parts: list[LabelledRows]) -> LabelledRows:
        """The rows of all parts, in order."""
        features, labels = [part.features for part in parts], [part.labels for part in parts]
        return LabelledRows(torch.cat(features), torch.cat(labels))

    def to(self, device: torch.device) -> LabelledRows:
        """The same on another device."""
        return LabelledRows(self.features.to(device), self.labels.to(device))


def as_labelled_rows(
    name: str, rows: Any, labels: Any, dim: int, n_classes: int
) -> LabelledRows | None:
    """
    Unit rows (M, d) and their labels (M,) int64, on the CPU; None if both are None.

    Errors are those of `as_unit_rows` and `as_labels`, and one without the other.
    """
    if rows is None and labels is None:
        return None
    if rows is None or labels is None:
        raise InputError(f"{name}_features and {name}_labels come together; one is missing")
    features = as_unit_rows(rows, f"{name}_features", columns=dim)
    checked = as_labels(labels, f"{name}_labels", rows=len(features), n_classes=n_classes)
    return LabelledRows(features.cpu(), checked.cpu())
