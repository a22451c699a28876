"""Graph folders: neighbors.npy, similarities.npy and a manifest that names the features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0

from transclip_fast.errors import InputError
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.store.arrays import inside, mapped_array, npy_bytes, read_array
from transclip_fast.store.atomic import read_json, write_json
from transclip_fast.store.json_text import value_of

LISTS = ("neighbors", "similarities")
CONTENTS = frozenset({"neighbors.npy", "similarities.npy", "manifest.json"})
PART = "{}-{:012}.npy"  # of the lists of a graph, and the number of the first row
# Entries of the manifest that describe the search.
INFO: dict[str, Any] = {
    "search": str, "index": str, "blas": (str, type(None)), "probes": int, "lists": int,
    "recall": float, "recall_target": float, "recall_rows": int, "weight_error": float,
}  # fmt: skip
TOGETHER = ({"probes", "lists"}, {"recall_rows", "weight_error"})


def save_lists(folder: Path, graph: NeighborGraph, first: int) -> None:
    """Write the lists of row `first` and on into a folder to which other processes write others."""
    for name in LISTS:
        (folder / PART.format(name, first)).write_bytes(npy_bytes(getattr(graph, name)))


def save_graph(
    folder: Path, info: Mapping[str, Any], manifest: Mapping[str, Any]
) -> dict[str, Any]:
    """
    Complete a graph folder in which the lists of all rows are, by `save_lists`.

    See `load_graph` for `manifest`; returns all that the one in the folder has.
    """
    for name in LISTS:
        _join_parts(sorted(folder.glob(f"{name}-*.npy")), folder / f"{name}.npy")
    lists = (mapped_array(folder / f"{name}.npy", name) for name in LISTS)
    whole = {**info, **manifest, "sha256": NeighborGraph(*lists).sha256()}
    write_json(folder / "manifest.json", whole)
    return whole


def _join_parts(parts: Sequence[Path], file: Path) -> None:
    """Make the arrays in the files `parts` one, along their rows; of one file its name."""
    if len(parts) == 1:
        parts[0].rename(file)
        return
    arrays = [mapped_array(part, file.stem) for part in parts]
    header = header_data_from_array_1_0(arrays[0])
    header["shape"] = sum(map(len, arrays)), arrays[0].shape[1]
    with open(file, "wb") as whole:
        write_array_header_1_0(whole, header)
        for array in arrays:
            whole.write(array)
    for part in parts:
        part.unlink()


def load_graph(path: str | Path, features_sha256: str, *, mapped: bool = False) -> NeighborGraph:
    """
    The graph in a folder; InputError if it was built from other features, or is damaged.

    A `mapped` one stays in its files: processes that share its rows read their own.
    """
    read = mapped_array if mapped else read_array
    folder, manifest = Path(path), load_manifest(path)
    if manifest.get("features_sha256") != features_sha256:
        raise InputError(f"{path}: was built from other features; build it again")
    neighbors = read(inside(folder, "neighbors.npy"), "neighbors")
    similarities = read(inside(folder, "similarities.npy"), "similarities")
    for name, array in (("neighbors", neighbors), ("similarities", similarities)):
        if not array.dtype.isnative:  # the hash is of the bytes
            raise InputError(f"{folder / name}.npy: has bytes in another order; build it again")
    if similarities.dtype.kind != "f":
        raise InputError(
            f"{folder / 'similarities.npy'}: expected floats, got {similarities.dtype}; "
            "build the graph again"
        )
    if "search" not in manifest:  # its name in earlier versions
        manifest["search"] = manifest.get("method")
    needed = {"search", "recall"}.union(*(both for both in TOGETHER if both & manifest.keys()))
    origin = folder / "manifest.json"
    info = {  # in the order of the manifest: a resumed run describes its graph in the same bytes
        name: value_of(manifest, name, INFO[name], origin, minimum=0)
        for name in dict.fromkeys([*manifest, *sorted(needed)])
        if name in INFO
    }
    graph = NeighborGraph(neighbors, similarities, info)
    if neighbors.ndim == 2:
        graph.check(neighbors.shape[0], neighbors.shape[1], name=str(path))
    if "sha256" in manifest and manifest["sha256"] != graph.sha256():  # earlier ones have none
        raise InputError(f"{path}: its arrays differ from its manifest; build it again")
    return graph


def load_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a graph folder."""
    folder = Path(path)
    if not (folder / "manifest.json").is_file():
        raise InputError(f"{path}: is not a graph folder (no manifest.json)")
    return read_json(inside(folder, "manifest.json"))
