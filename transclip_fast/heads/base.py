"""Fitted heads: the interface, and the head that has only prototypes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch

from transclip_fast.callbacks import Count
from transclip_fast.data.checks import as_tensor, as_unit_rows
from transclip_fast.data.patches import PatchedRows
from transclip_fast.device import exact_float32
from transclip_fast.errors import InputError
from transclip_fast.heads.text_tower import TextTower

AnyHead = TypeVar("AnyHead", bound="Head")
ImageRows: TypeAlias = torch.Tensor | PatchedRows

BLOCK_ROWS = 16384  # rows scored at a time: all N rows times M shots do not fit in memory

BOUND = "this head is bound to the classes it was trained on"


@dataclass(frozen=True, kw_only=True)
class Head(ABC):
    """
    A fitted classifier of image features over K classes.

    Parameters
    ----------
    text : Tensor (K, d) float32
        Unit rows: one prototype a class, from the text encoder or from training.
    logit_scale : float
    parameters : dict
        Hyperparameters, default or chosen, by name.
    """

    kind: ClassVar[str]  # names the class in head files
    # What head files hold of it: tensors with their possible shapes, where "Kd Md" is (K, d) or
    # (M, d) and a letter is one size in all tensors, K that of classes; and the types of settings.
    stored_tensors: ClassVar[Mapping[str, str]] = {"text": "Kd"}
    stored_settings: ClassVar[Mapping[str, type]] = {}
    runs_tower: ClassVar[bool] = False  # True if logits need the text tower for every image

    text: torch.Tensor
    logit_scale: float
    parameters: dict[str, float] = field(default_factory=dict)

    takes_patches: ClassVar[bool] = False  # True if rows may have patches

    @property
    def wants_patches(self) -> bool:
        """True if `logits` needs rows with patches."""
        return False

    @property
    def block_rows(self) -> int:
        """Rows scored at a time."""
        return BLOCK_ROWS

    @abstractmethod
    def block_logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits (n, K) of a block of unit rows (n, d), or (n, 1 + L, d) with patches."""

    def restrict(self: AnyHead, classes: torch.Tensor) -> AnyHead:
        """The same head over some of its classes (k,), in that order."""
        names = [name for name, shape in self.stored_tensors.items() if shape.startswith("K")]
        return replace(self, **{name: getattr(self, name)[classes] for name in names})

    def transfer(self, text: torch.Tensor) -> Head:
        """The same head over other classes with texts (K', d); InputError if it is bound to its."""
        raise InputError(BOUND)

    def for_classes(self, tower: TextTower, class_names: Sequence[str]) -> Head:
        """As `transfer`, but the text tower encodes the names of the classes."""
        raise InputError(BOUND)

    def words_by_context(self, class_names: Sequence[str]) -> dict[str, list[str]] | None:
        """Nearest words of each learned context, by the name of the context; None without any."""
        return None

    @classmethod
    def from_stored(cls, **fields: Any) -> Head:
        """The head of a head file, from checked tensors and settings."""
        return cls(**fields)

    @exact_float32()
    def logits(self, features: Any, progress: Count | None = None) -> torch.Tensor:
        """
        Logits (N, K) float32 of image features (N, d), on the scale that a softmax takes.

        Features are numpy or torch, of any float type, or `PatchedRows`; as in a fit, rows off the
        unit sphere are normalised with a warning. `progress` is called with the rows done and N.

        Raises
        ------
        InputError
            Features of another dimension, rows that are zero or not finite, or patches that this
            head does not take.
        """
        return torch.cat(list(self._blocks(features, progress)))

    @exact_float32()
    def predict(self, features: Any, progress: Count | None = None) -> torch.Tensor:
        """Most likely class (N,) int64 of image features (N, d): see `logits`."""
        return torch.cat([logits.argmax(1) for logits in self._blocks(features, progress)])

    def prior(self, features: Any, progress: Count | None = None) -> dict[str, Any]:
        """Arguments of `TransCLIP.fit` that make this prediction the prior of the same features."""
        return {"prior_logits": self.logits(features, progress)}

    def labels_and_prior(
        self, features: Any, progress: Count | None = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Results of `predict` and `prior`; logits are computed once."""
        prior = self.prior(features, progress)
        logits = prior.get("prior_logits")
        return (self.predict(features, progress) if logits is None else logits.argmax(1)), prior

    def _blocks(self, features: Any, progress: Count | None) -> Iterator[torch.Tensor]:
        rows = self._checked(features)
        n_rows, size = len(rows), self.block_rows
        for start in range(0, n_rows, size):
            yield self.block_logits(rows[start : start + size])
            if progress is not None:
                progress(min(start + size, n_rows), n_rows)

    def _checked(self, features: Any) -> ImageRows:
        """Image features, also with those of patches (N, 1 + L, d), as unit rows."""
        patched = isinstance(features, PatchedRows)
        tensor = features if patched else as_tensor(features, "features")
        if (patched or tensor.ndim == 3) and not self.takes_patches:
            raise InputError(
                "features: have patches, which this head does not take; give rows of images, (N, d)"
            )
        if isinstance(features, PatchedRows):
            return features
        tensor = tensor.to(self.text.device)
        rows = tensor[:, 0] if tensor.ndim == 3 else tensor
        rows = as_unit_rows(rows, "features", columns=self.text.shape[1])
        return PatchedRows(rows, tensor[:, 1:], "features") if tensor.ndim == 3 else rows


@dataclass(frozen=True, kw_only=True)
class PrototypeHead(Head):
    """logits = tau F T^T: everything learned is in the prototypes T, here `text`."""

    kind: ClassVar[str] = "prototypes"

    def block_logits(self, rows: torch.Tensor) -> torch.Tensor:
        return self.logit_scale * rows @ self.text.T

    def prior(self, features: Any, progress: Count | None = None) -> dict[str, Any]:
        return {"prototypes": self.text}


def percent_right(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Percentage of rows whose largest logit is at their label."""
    return 100 * float((logits.argmax(1) == labels).double().mean())


def inputs_for(head: Head, rows: torch.Tensor, patched: PatchedRows | None) -> ImageRows:
    """The rows that a head is applied to: with patches if it wants them and there are any."""
    return patched if head.wants_patches and patched is not None else rows
