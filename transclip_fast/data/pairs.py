"""Features of images, of a true caption of each and of a false one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from transclip_fast.data.checks import as_unit_rows
from transclip_fast.errors import InputError


@dataclass(frozen=True)
class PairFeatures:
    """
    N unit rows of each kind; `PairFeatures.of` checks arrays.

    Parameters
    ----------
    images, captions, negatives : Tensor (N, d) float32
        Row i of `negatives` is the false caption of image i, or zero where it has none.
    groups : list of str, optional
        Of each row, such as its relation.

    Examples
    --------
    >>> pairs = PairFeatures.of([[0.6, 0.8]], [[1, 0]], [[0, 1]])
    >>> pairs.margins()
    tensor([-0.2000], dtype=torch.float64)
    """

    images: torch.Tensor
    captions: torch.Tensor
    negatives: torch.Tensor
    groups: list[str] | None = None

    @classmethod
    def of(
        cls, images: Any, captions: Any, negatives: Any, groups: Sequence[Any] | None = None
    ) -> PairFeatures:
        """
        Unit rows of arrays (N, d).

        Raises
        ------
        InputError
            As `as_unit_rows`, and for arrays of different shapes.
        """
        first = as_unit_rows(images, "image_features")
        true = as_unit_rows(captions, "caption_features", columns=first.shape[1])
        false = as_unit_rows(negatives, "negative_features", columns=first.shape[1])
        named = {"caption_features": true, "negative_features": false, "groups": groups}
        for name, rows in named.items():
            if rows is not None and len(rows) != len(first):
                raise InputError(
                    f"{name}: has {len(rows)} rows, expected {len(first)}, those of image_features"
                )
        return cls(first, true, false, None if groups is None else [*map(str, groups)])

    def __len__(self) -> int:
        return len(self.images)

    @property
    def has_negative(self) -> torch.Tensor:
        """Which rows have a false caption, (N,) bool."""
        return self.negatives.any(1)

    def rows(self, chosen: torch.Tensor) -> PairFeatures:
        """The rows at these positions, or of this mask."""
        return PairFeatures(self.images[chosen], self.captions[chosen], self.negatives[chosen])

    def margins(self) -> torch.Tensor:
        """Cosines of images to their captions less those to the false ones, (N,) float64."""
        images = self.images.double()
        true, false = self.captions.double(), self.negatives.double()
        return (images * true).sum(1) - (images * false).sum(1)
