"""Graph folders: neighbors.npy, similarities.npy and a manifest that names the features."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from transclip_fast.errors import InputError
from transclip_fast.graph import NeighborGraph
from transclip_fast.store.arrays import inside, npy_bytes, read_array, read_arrays
from transclip_fast.store.atomic import publish_file, read_json, write_json, writing

CONTENTS = frozenset({"neighbors.npy", "similarities.npy", "manifest.json"})
# What the manifest says of how the lists were made.
INFO = ("method", "recall", "recall_target", "recall_rows", "weight_error", "probes", "lists")
CHECKPOINT_SECONDS = 30.0


def save_graph(folder: Path, graph: NeighborGraph, manifest: dict[str, Any]) -> None:
    """Write a graph into a folder that `new_folder` gave; see `load_graph` for `manifest`."""
    for name, array in (("neighbors", graph.neighbors), ("similarities", graph.similarities)):
        (folder / f"{name}.npy").write_bytes(npy_bytes(array))
    write_json(folder / "manifest.json", {**graph.info, **manifest})


def load_graph(path: str | Path, features_sha256: str) -> NeighborGraph:
    """
    The graph in a folder, whose manifest must name the hash of the features.

    Raises
    ------
    InputError
        Not a graph folder, damaged, or built from other features.
    """
    folder = Path(path)
    if not (folder / "manifest.json").is_file():
        raise InputError(f"{path}: is not a graph folder (no manifest.json)")
    manifest = read_json(inside(folder, "manifest.json"))
    if manifest.get("features_sha256") != features_sha256:
        raise InputError(f"{path}: was built from other features; build it again")
    neighbors = read_array(inside(folder, "neighbors.npy"), "neighbors")
    similarities = read_array(inside(folder, "similarities.npy"), "similarities")
    if similarities.dtype.kind != "f":
        raise InputError(
            f"{folder / 'similarities.npy'}: expected floats, got {similarities.dtype}; "
            "build the graph again"
        )
    info = {name: manifest[name] for name in INFO if name in manifest}
    return NeighborGraph(neighbors, similarities, info)


class GraphCheckpoint:
    """
    The state of a search beside the folder it will fill, so that a killed one goes on.

    Parameters
    ----------
    path : path
        The graph folder; whoever keeps a checkpoint holds its lock.
    identity : mapping
        What decides the result: features, method, parameters. A state of another is not used.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, Any]) -> None:
        target = Path(os.path.realpath(path))
        self.file = target.parent / f".{target.name}.progress.npz"
        self.identity = json.dumps(identity, sort_keys=True)
        self._last = time.monotonic()

    def load(self) -> Mapping[str, np.ndarray] | None:
        """The state last kept, if it is of this search; a damaged one is announced."""
        if not self.file.exists():
            return None
        try:
            state = read_arrays(self.file)
        except InputError as error:
            warnings.warn(f"{error}; the search begins anew", stacklevel=2)
            return None
        return state if str(state.pop("identity", "")) == self.identity else None

    def keep(self, state: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Write the state if the last one is half a minute old."""
        if time.monotonic() - self._last < CHECKPOINT_SECONDS:
            return
        with writing(self.file):
            partial = self.file.with_suffix(".partial")
            arrays: dict[str, Any] = {"identity": np.array(self.identity), **state()}
            with open(partial, "wb") as file:
                np.savez(file, **arrays)
            publish_file(partial, self.file)
        self._last = time.monotonic()

    def remove(self) -> None:
        """Forget the state, once the folder is there."""
        self.file.unlink(missing_ok=True)
