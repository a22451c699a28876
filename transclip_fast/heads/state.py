"""The checked reading of what a head file holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from transclip_fast.data.checks import UNIT_NORM_TOLERANCE
from transclip_fast.errors import InputError


class StoredState:
    """
    Tensors and settings of a head file, which a head takes one by one.

    The letters of a shape, "Kd" for (K, d), are sizes: each is the same in all tensors of a file.
    """

    def __init__(
        self,
        path: str | Path,
        tensors: Mapping[str, torch.Tensor],
        settings: Mapping[str, Any],
        logit_scale: float,
        parameters: dict[str, float],
    ) -> None:
        self._path = path
        self._left: dict[str, dict[str, Any]] = {"tensors": {**tensors}, "settings": {**settings}}
        self._sizes: dict[str, int] = {}
        self._logit_scale, self._parameters = logit_scale, parameters

    def common(self) -> dict[str, Any]:
        """The arguments that every head has: text (K, d), logit_scale and parameters."""
        text = self.tensor("text", "Kd")
        norms = text.norm(dim=1)
        if not len(norms) or float((norms - 1).abs().max()) > UNIT_NORM_TOLERANCE:
            raise damaged(self._path, "text holds no unit rows")
        return {"text": text, "logit_scale": self._logit_scale, "parameters": self._parameters}

    def tensor(self, name: str, *shapes: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A finite tensor of one of these shapes."""
        tensor: torch.Tensor = self._take("tensors", name)
        shape = next((shape for shape in shapes if len(shape) == tensor.ndim), None)
        sizes = {} if shape is None else dict(zip(shape, tensor.shape, strict=True))
        if shape is None or any(self._sizes.get(k, size) != size for k, size in sizes.items()):
            expected = " or ".join(f"({', '.join(shape)})" for shape in shapes)
            known = ", ".join(f"{letter} = {size}" for letter, size in self._sizes.items())
            raise damaged(
                self._path,
                f"{name} has shape {tuple(tensor.shape)}, expected {expected}"
                + (f" with {known}" if known else ""),
            )
        self._sizes |= sizes
        if tensor.dtype != dtype:
            raise damaged(self._path, f"{name} holds {tensor.dtype}")
        if not tensor.isfinite().all():
            raise damaged(self._path, f"{name} has values that are no numbers")
        return tensor

    def labels(self, name: str, shape: str) -> torch.Tensor:
        """A tensor of classes 0 .. K - 1, int64."""
        labels, n_classes = self.tensor(name, shape, dtype=torch.int64), self._sizes["K"]
        if ((labels < 0) | (labels >= n_classes)).any():
            raise damaged(self._path, f"{name} has classes beyond the {n_classes}")
        return labels

    def setting(self, name: str, kind: type) -> Any:
        """A setting of this type."""
        value = self._take("settings", name)
        check_type(self._path, name, value, kind)
        return value

    def words(self, vectors: torch.Tensor) -> list[str]:
        """The setting "words": one for each of the vectors (..., width)."""
        words: list[str] = self.setting("words", list)
        if not (words and strings(words) and len(words) == vectors.shape[:-1].numel()):
            raise damaged(self._path, "words are not one for each vector of the context")
        return words

    def check_nothing_left(self) -> None:
        """Raise InputError if the file holds more than the head took."""
        for what, left in self._left.items():
            check_names(self._path, left, {}, what)

    def _take(self, what: str, name: str) -> Any:
        if name not in self._left[what]:
            check_names(self._path, {}, {name}, what)
        return self._left[what].pop(name)


def damaged(path: str | Path, what: str) -> InputError:
    """The error for a head file that contradicts itself."""
    return InputError(f"{path}: damaged: {what}")


def check_names(path: str | Path, found: Any, wanted: Any, what: str) -> None:
    """Raise InputError unless `found` has the names of `wanted` and no others."""
    missing, extra = sorted({*wanted} - {*found}), sorted({*found} - {*wanted})
    wrong = [f"lacks {', '.join(missing)}"] * bool(missing)
    wrong += [f"also has {', '.join(extra)}"] * bool(extra)
    if wrong:
        raise InputError(f"{path}: is no head of this version: its {what} {' and '.join(wrong)}")


def check_type(path: str | Path, name: str, value: Any, kind: Any) -> None:
    """Raise InputError unless a value of JSON has this type; a float may be a whole number."""
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        right = number and math.isfinite(value)
    else:
        right = isinstance(value, kind)
    if not right:
        raise damaged(path, f"{name} is {str(value)[:40]!r}")


def strings(values: Any) -> bool:
    """Whether this is a list of strings."""
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
