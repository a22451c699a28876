"""Graph folders: neighbors.npy, similarities.npy and a manifest that names the features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transclip_fast.errors import InputError
from transclip_fast.store.arrays import inside, npy_bytes, read_array
from transclip_fast.store.atomic import read_json, write_json
from transclip_fast.types import NeighborGraph

CONTENTS = frozenset({"neighbors.npy", "similarities.npy", "manifest.json"})
# Entries of the manifest that describe the search.
INFO = (
    "search", "index", "blas", "probes", "lists",
    "recall", "recall_target", "recall_rows", "weight_error",
)  # fmt: skip


def save_graph(folder: Path, graph: NeighborGraph, manifest: dict[str, Any]) -> None:
    """Write a graph into the folder of a `new_folder`; see `load_graph` for `manifest`."""
    for name, array in (("neighbors", graph.neighbors), ("similarities", graph.similarities)):
        (folder / f"{name}.npy").write_bytes(npy_bytes(array))
    write_json(folder / "manifest.json", {**graph.info, **manifest})


def load_graph(path: str | Path, features_sha256: str) -> NeighborGraph:
    """The graph in a folder; InputError if it was built from other features, or is damaged."""
    folder, manifest = Path(path), load_manifest(path)
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
    info.setdefault("search", manifest.get("method", "unknown"))  # its name in earlier versions
    return NeighborGraph(neighbors, similarities, info)


def load_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a graph folder."""
    folder = Path(path)
    if not (folder / "manifest.json").is_file():
        raise InputError(f"{path}: is not a graph folder (no manifest.json)")
    return read_json(inside(folder, "manifest.json"))
