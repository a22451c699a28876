"""What every head is given, and what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from transclip_fast.data.patches import PatchedRows, images
from transclip_fast.errors import InputError

if TYPE_CHECKING:
    from transclip_fast.heads.prompts.learning import Prompting


ImageRows: TypeAlias = torch.Tensor | PatchedRows

ROWS = 16384  # of a block, so that nothing (N, M) is ever held
Progress = Callable[..., None]  # steps done, of how many, and figures by name


@dataclass(frozen=True)
class Labelled:
    """Unit rows (M, d) float32, (M, 1 + L, d) with patches, and their classes (M,) int64."""

    features: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Task:
    """
    What a head is fitted to.

    Parameters
    ----------
    text : Tensor (K, d) float32
        Unit rows.
    shots : Labelled
        May leave classes out; (0, d) where there are none.
    validation : Labelled, optional
        Chooses what a head leaves open; without it published defaults hold.
    logit_scale : float
        tau: logits are tau times cosines.
    seed : int
        Of everything random.
    progress : callable
        Told of the steps of a training.
    prompting : Prompting, optional
        Text tower and class names, for the prompt learners.
    """

    text: torch.Tensor
    shots: Labelled
    validation: Labelled | None
    logit_scale: float
    seed: int
    progress: Progress
    prompting: Prompting | None = None

    @property
    def n_shots(self) -> int:
        """Most shots that a class has."""
        return int(torch.bincount(self.shots.labels).max())


@dataclass(frozen=True, kw_only=True)
class Head(ABC):
    """
    A fitted classifier of image features over K classes.

    Parameters
    ----------
    text : Tensor (K, d) float32
        Unit rows: the classes, as the text encoder or a training placed them.
    logit_scale : float
    parameters : dict
        Hyperparameters that were given or chosen, by name.
    """

    text: torch.Tensor
    logit_scale: float
    parameters: dict[str, float] = field(default_factory=dict)

    @property
    def block_rows(self) -> int:
        """Rows of a block."""
        return ROWS

    @abstractmethod
    def block_logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits (n, K) of a block of unit rows (n, d), or (n, 1 + L, d) with patches."""

    @abstractmethod
    def restrict(self, classes: torch.Tensor) -> Head:
        """The same head over some of its classes (k,), in that order, and no others."""

    def transfer(self, text: torch.Tensor) -> Head:
        """
        The same head over other classes, of which only the text (K', d) is known.

        Raises
        ------
        InputError
            What was trained belongs to the classes it was trained on.
        """
        raise InputError("this head is bound to the classes it was trained on")

    def logits(self, features: ImageRows, progress: Progress | None = None) -> torch.Tensor:
        """
        Logits (N, K) float32 of unit rows (N, d), on the scale that a softmax takes.

        `progress` is told of the rows done.
        """
        return torch.cat(list(self._blocks(features, progress)))

    def predict(self, features: ImageRows, progress: Progress | None = None) -> torch.Tensor:
        """Most likely class (N,) int64 of unit rows (N, d); `progress` as in `logits`."""
        return torch.cat([logits.argmax(1) for logits in self._blocks(features, progress)])

    def prior(self, features: ImageRows, progress: Progress | None = None) -> dict[str, Any]:
        """What TransCLIP's `fit` takes as this head's prediction of unit rows (N, d), by name."""
        return {"prior_logits": self.logits(features, progress)}

    def labels_and_prior(
        self, features: ImageRows, progress: Progress | None = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """What `predict` and `prior` give, with logits computed once."""
        prior = self.prior(features, progress)
        if "prior_logits" in prior:
            return prior["prior_logits"].argmax(1), prior
        return self.predict(features, progress), prior

    @torch.no_grad()
    def _blocks(
        self, features: ImageRows, progress: Progress | None
    ) -> Generator[torch.Tensor, None, None]:
        n_rows, size = len(features), self.block_rows
        for start in range(0, max(1, n_rows), size):
            yield self.block_logits(features[start : start + size])
            if progress is not None:
                progress(min(start + size, n_rows), n_rows)


@dataclass(frozen=True, kw_only=True)
class PrototypeHead(Head):
    """logits = tau F T^T: all that was learned is in the prototypes T, here `text`."""

    def block_logits(self, rows: torch.Tensor) -> torch.Tensor:
        return self.logit_scale * rows @ self.text.T

    def restrict(self, classes: torch.Tensor) -> PrototypeHead:
        return replace(self, text=self.text[classes])

    def prior(self, features: ImageRows, progress: Progress | None = None) -> dict[str, Any]:
        return {"prototypes": self.text}


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows scaled to unit norm."""
    return torch.nn.functional.normalize(rows, dim=-1)


def percent_right(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of rows whose largest logit is at their label, in percent."""
    return 100 * float((logits.argmax(1) == labels).double().mean())


def best(candidates: Sequence[Any], score: Callable[[Any], float]) -> Any:
    """The candidate with the largest score; the first of equal ones."""
    return max(candidates, key=score)


def inputs_for(
    head: Head, rows: torch.Tensor, patched: PatchedRows | None
) -> torch.Tensor | PatchedRows:
    """Rows (N, d) as a head takes them: with their patches where it was trained with such."""
    wants = getattr(head, "patches", 0) > 0
    return patched if wants and patched is not None else rows


def as_fit_arguments(rows: Labelled | None, use: str) -> dict[str, Any]:
    """Labelled rows under the names that `fit_head` has for them, e.g. "support_features"."""
    if rows is None:
        return {}
    found = {f"{use}_features": images(rows.features), f"{use}_labels": rows.labels}
    if rows.features.ndim == 3:
        found[f"{use}_local_features"] = rows.features[:, 1:]
    return found
