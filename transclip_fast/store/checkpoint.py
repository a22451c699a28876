"""Checkpoints of long work: hidden files beside the folder that it fills."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transclip_fast.errors import InputError
from transclip_fast.store.arrays import array_sha256, read_arrays
from transclip_fast.store.atomic import beside, writing
from transclip_fast.store.tensors import read_tensors, write_tensors
from transclip_fast.whole_files import new_file, partial_of


class FileCheckpoint:
    """
    The state of a piece of work in a .npz file, to resume from after a crash.

    The caller has locked `path`, the folder to fill; `name` is that of the work. `identity` has all
    that decides the result, input, method and parameters; a state of another identity is not used.
    A state younger than `seconds` is not replaced, so a crash costs that much work.
    """

    suffix = "npz"

    def __init__(
        self, path: str | Path, name: str, identity: Mapping[str, Any], seconds: float
    ) -> None:
        self.path = path
        self.file = files(path, name, self.suffix)[0]
        self.name, self.seconds = name, seconds
        self.identity = json.dumps(identity, sort_keys=True)
        self._last = time.monotonic()

    def load(self) -> Mapping[str, np.ndarray] | None:
        """The last state of this very work, or None, with a warning if there is an unusable one."""
        if not self.file.exists():
            return None
        try:
            state, identity = self._read()
        except InputError as error:
            warnings.warn(f"{error}; {self.name} begins anew", stacklevel=2)
            return None
        if identity == self.identity:
            return state
        warnings.warn(
            f"{self.file}: is of other input or parameters; {self.name} begins anew", stacklevel=2
        )
        return None

    def keep(self, state: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Write the state if the last one is old enough."""
        if time.monotonic() - self._last < self.seconds:
            return
        with writing(self.path):
            self._write(state())
        self._last = time.monotonic()

    def _read(self) -> tuple[Mapping[str, np.ndarray], str]:
        """The state in the file and its identity."""
        state = read_arrays(self.file)
        identity, sha256 = (str(state.pop(name, "")) for name in ("identity", "sha256"))
        _check_state(self.file, state, sha256)
        return state, identity

    def _write(self, state: Mapping[str, np.ndarray]) -> None:
        texts = {"identity": self.identity, "sha256": _state_sha256(state)}
        arrays: dict[str, Any] = {name: np.array(text) for name, text in texts.items()} | {**state}
        with new_file(self.file) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)


class TensorCheckpoint(FileCheckpoint):
    """The same in a .safetensors file, for a training."""

    suffix = "safetensors"

    def _read(self) -> tuple[Mapping[str, np.ndarray], str]:
        tensors, metadata = read_tensors(self.file)
        state = {name: tensor.numpy() for name, tensor in tensors.items()}
        _check_state(self.file, state, metadata.get("sha256", ""))
        return state, metadata.get("identity", "")

    def _write(self, state: Mapping[str, np.ndarray]) -> None:
        tensors = {name: torch.from_numpy(array) for name, array in state.items()}
        metadata = {"identity": self.identity, "sha256": _state_sha256(state)}
        write_tensors(self.file, tensors, None, metadata=metadata)


def _check_state(file: Path, state: Mapping[str, np.ndarray], sha256: str) -> None:
    if sha256 != _state_sha256(state):
        raise InputError(f"{file}: damaged, or of an earlier version")


def _state_sha256(state: Mapping[str, np.ndarray]) -> str:
    """Hash of the arrays of a state and of their names."""
    hashes = [(name, array_sha256(np.asarray(array))) for name, array in sorted(state.items())]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def files(path: str | Path, name: str, suffix: str = FileCheckpoint.suffix) -> list[Path]:
    """The files of a checkpoint: the state, and its hidden neighbour while it is written."""
    file = beside(path, f"{name}.{suffix}")
    return [file, partial_of(file)]
