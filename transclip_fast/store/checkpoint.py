"""The state of long work in a file beside the folder it will fill."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from transclip_fast.errors import InputError
from transclip_fast.store.arrays import read_arrays
from transclip_fast.store.atomic import beside, publish_file, writing


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

    def __init__(
        self, path: str | Path, name: str, identity: Mapping[str, Any], seconds: float
    ) -> None:
        self.path = path
        self.file, self._partial = files(path, name)
        self.name, self.seconds = name, seconds
        self.identity = json.dumps(identity, sort_keys=True)
        self._last = time.monotonic()

    def load(self) -> Mapping[str, np.ndarray] | None:
        """The state last kept, if it is of this work; one that is of no use is announced."""
        if not self.file.exists():
            return None
        try:
            state = read_arrays(self.file)
        except InputError as error:
            warnings.warn(f"{error}; {self.name} begins anew", stacklevel=2)
            return None
        if str(state.pop("identity", "")) == self.identity:
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
            arrays: dict[str, Any] = {"identity": np.array(self.identity), **state()}
            with open(self._partial, "wb") as file:
                np.savez(file, **arrays)
            publish_file(self._partial, self.file)
        self._last = time.monotonic()


def files(path: str | Path, name: str) -> list[Path]:
    """Where the state of work of that name is kept, and written."""
    return [beside(path, f"{name}.npz"), beside(path, f"{name}.partial")]
