"""Input of the prompt learners beside labelled features: text tower, class names, settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transclip_fast.callbacks import Checkpoint, NoCheckpoint
from transclip_fast.errors import InputError
from transclip_fast.heads.text_tower import TextTower

POSITIONS = ("end", "middle", "front")
WARM_UP_EPOCHS, WARM_UP_RATE = 1, 1e-5
EPOCHS_BY_SHOTS = ((1, 50), (4, 100), (math.inf, 200))  # (most shots a class, epochs)


@dataclass(frozen=True)
class ContextSettings:
    """The learned part of a prompt."""

    n_ctx: int = 16  # number of vectors, if they do not start from words
    class_specific: bool = False  # each class has vectors of its own
    position: str = "end"  # of the class name, one of POSITIONS
    start: str | None = None  # words that the vectors start from, e.g. "a photo of a"; or random


@dataclass(frozen=True)
class Schedule:
    """Length and speed of a training."""

    epochs: int | None = None  # by default as in EPOCHS_BY_SHOTS
    batch_size: int = 32
    rate: float = 2e-3  # learning rate where a cosine starts; the warm-up is its first epoch

    def of(self, shots: int) -> int:
        """Number of epochs for that many shots a class."""
        return self.epochs or next(epochs for most, epochs in EPOCHS_BY_SHOTS if shots <= most)

    def rates(self, epochs: int) -> list[float]:
        """The learning rate of each epoch: a cosine towards zero, its first epoch the warm-up."""
        cosine = [self.rate * (1 + math.cos(math.pi * e / epochs)) / 2 for e in range(epochs)]
        return [WARM_UP_RATE] * min(WARM_UP_EPOCHS, epochs) + cosine[WARM_UP_EPOCHS:]


@dataclass(frozen=True)
class Prompting:
    """Input of a prompt learner beside labelled features."""

    tower: TextTower
    class_names: Sequence[str]  # in the order of the labels
    context: ContextSettings = field(default_factory=ContextSettings)
    schedule: Schedule = field(default_factory=Schedule)
    checkpoint: Checkpoint = field(default_factory=NoCheckpoint)  # from which a training resumes

    @property
    def identity(self) -> dict[str, Any]:
        """The entries on which the result of a training depends."""
        return {
            "tower": self.tower.identity,
            "context": asdict(self.context),
            "schedule": asdict(self.schedule),
            "class_names": list(self.class_names),
        }

    def check(self, n_classes: int) -> None:
        """Raise InputError unless there is a name for each class and the settings make sense."""
        names, context = self.class_names, self.context
        if len(names) != n_classes:
            raise InputError(f"class_names: {len(names)} names for {n_classes} classes")
        if context.position not in POSITIONS:
            raise InputError(f"position {context.position!r}: choose one of {', '.join(POSITIONS)}")
        if context.n_ctx < 1:
            raise InputError(f"a context of {context.n_ctx} tokens; give at least one")
