"""The state of long work in a file beside the folder it will fill."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transclip_fast.errors import InputError
from transclip_fast.store.arrays import read_arrays
from transclip_fast.store.atomic import beside, publish_file, writing
from transclip_fast.store.tensors import read_tensors, write_tensors


class FileCheckpoint:
    """
    The state of a piece of work, so that a killed one goes on.

    Parameters
    ----------
    path : path
        The folder to fill; whoever keeps a checkpoint holds its lock.
    name : str
        Of the work.
    identity : mapping
        What decides the result: input, method, parameters. A state of another is not used.
    seconds : float
        A state that is younger is not replaced: what a kill may cost.
    """

    suffix = "npz"

    def __init__(
        self, path: str | Path, name: str, identity: Mapping[str, Any], seconds: float
    ) -> None:
        self.path = path
        self.file, self._partial = files(path, name, self.suffix)
        self.name, self.seconds = name, seconds
        self.identity = json.dumps(identity, sort_keys=True)
        self._last = time.monotonic()

    def load(self) -> Mapping[str, np.ndarray] | None:
        """The state last kept, if it is of this work; one that is of no use is announced."""
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
        """Write the state, if the last one is old enough."""
        if time.monotonic() - self._last < self.seconds:
            return
        with writing(self.path):
            self._write(state())
        self._last = time.monotonic()

    def _read(self) -> tuple[Mapping[str, np.ndarray], str]:
        """The state in the file, and whose it is."""
        state = read_arrays(self.file)
        return state, str(state.pop("identity", ""))

    def _write(self, state: Mapping[str, np.ndarray]) -> None:
        arrays: dict[str, Any] = {"identity": np.array(self.identity), **state}
        with open(self._partial, "wb") as file:
            np.savez(file, **arrays)
        publish_file(self._partial, self.file)


class TensorCheckpoint(FileCheckpoint):
    """The same in a .safetensors file, for what is trained."""

    suffix = "safetensors"

    def _read(self) -> tuple[Mapping[str, np.ndarray], str]:
        tensors, metadata = read_tensors(self.file)
        state = {name: tensor.numpy() for name, tensor in tensors.items()}
        return state, metadata.get("identity", "")

    def _write(self, state: Mapping[str, np.ndarray]) -> None:
        tensors = {name: torch.from_numpy(array) for name, array in state.items()}
        write_tensors(self.file, tensors, None, metadata={"identity": self.identity})


def files(path: str | Path, name: str, suffix: str = FileCheckpoint.suffix) -> list[Path]:
    """Where the state of work of that name is kept, and written."""
    return [beside(path, f"{name}.{suffix}"), beside(path, f"{name}.partial")]
