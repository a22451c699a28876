"""What a few-shot method is fitted to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from transclip_fast.heads.prompts.settings import Prompting

# Called with (steps done, steps in all, **figures): figures are text by name, e.g. the loss.
TrainingProgress: TypeAlias = Callable[..., None]


@dataclass(frozen=True)
class Labelled:
    """Unit rows (M, d) float32, or (M, 1 + L, d) with L patches, and their classes (M,) int64."""

    features: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Task:
    """Texts, shots and settings of one fit."""

    text: torch.Tensor  # (K, d) float32, unit rows
    shots: Labelled  # (0, d) without any; classes may be missing
    validation: Labelled | None  # chooses hyperparameters, instead of published defaults
    logit_scale: float  # tau: logits are tau times cosines
    seed: int
    progress: TrainingProgress
    prompting: Prompting | None = None  # of prompt learners

    @property
    def n_shots(self) -> int:
        """Largest number of shots of a class."""
        return int(torch.bincount(self.shots.labels).max())
