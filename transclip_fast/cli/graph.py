"""`transclip-fast graph`: features to a graph folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from transclip_fast.cli import options, session
from transclip_fast.cli.session import counted
from transclip_fast.data.feature_rows import Rows
from transclip_fast.device import resolve_device
from transclip_fast.errors import InputError
from transclip_fast.graph.build import build_graph
from transclip_fast.graph.faiss_index import faiss_installed, is_file
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.progress_bar import progress_bar
from transclip_fast.store.atomic import HIDDEN, beside, clean, new_folder, writing
from transclip_fast.store.checkpoint import FileCheckpoint, files
from transclip_fast.store.features import Features, load_features
from transclip_fast.store.graphs import CONTENTS, load_graph, load_manifest, save_graph

SEARCH_OPTIONS = ("search", "recall", "index")  # of a `GraphSearch`
CHECKPOINT = "search"  # name of the search's checkpoint
CHECKPOINT_SECONDS = 30.0  # the most work that a crash costs


@dataclass(frozen=True)
class GraphSearch:
    """A search for neighbours, with the parameters of `build_graph`."""

    n_neighbors: int
    device: torch.device
    search: str = "auto"
    recall: float = 0.99
    index: str | None = None

    @property
    def planned(self) -> str:
        """The search as `plan` knows it."""
        return self.search if self.index is None else "faiss"


def search_of(values: Mapping[str, Any], n_neighbors: int) -> GraphSearch:
    """The search that --device and the options of `options.search_options` ask for."""
    device = resolve_device(values["device"])
    return GraphSearch(n_neighbors, device, *(values[name] for name in SEARCH_OPTIONS))


@click.command("graph")
@click.argument("path", metavar="FEATURES", type=options.PATH)
@options.out_option
@click.option("--n-neighbors", default=3, type=options.POSITIVE, help="Neighbours of each row.")
@options.search_options
@click.option("--save-index", type=options.PATH, help="File to write the FAISS index to.")
@options.device_option
@options.json_option
def command(
    path: str, out: str, n_neighbors: int, save_index: str | None, as_json: bool, **values: Any
) -> None:
    """Find the nearest neighbours of every row of FEATURES.

    FEATURES is a feature folder or a .npz, .npy, .pt or .safetensors file. The folder --out
    receives neighbors.npy (N, k), similarities.npy (N, k) and manifest.json; `solve --graph` reads
    it. Run the same command again after a crash: it resumes from the last checkpoint.

    \b
    Examples:
      transclip-fast graph features.npz --out graph
      transclip-fast graph images.npy --index image.index --recall 0.99 --out graph
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("graph is one process; run it without torchrun, then torchrun the `solve`")
    stages = session.Stages()
    search = search_of(values, n_neighbors)
    if save_index is not None and Path(out).resolve() in (
        Path(save_index).resolve(),
        *Path(save_index).resolve().parents,
    ):
        raise InputError(
            f"{save_index}: is in --out, which is replaced as a whole; name another file"
        )
    with stages.time("load"):
        features = load_features(path, shots=0)
    graph, manifest = graph_features(features, out, search, stages, save_index=save_index)
    text = (
        f"{counted(len(graph), 'row')}, {counted(n_neighbors, 'neighbour')} each: "
        f"{describe(graph.info)}, {stages.seconds['graph']:.1f} s\nwritten to {out}"
    )
    session.print_summary({**graph.info, **manifest}, text, as_json)


def describe(info: Mapping[str, Any]) -> str:
    """The search of a graph and how good it is."""
    parts = [info["search"], f"recall {info['recall']:.4f}"]
    if "recall_rows" in info:
        parts[1] += f" on {counted(info['recall_rows'], 'row')}"
        parts.append(f"weight error {info['weight_error']:.1e}")
    if "probes" in info:
        parts.insert(1, f"{info['probes']} of {counted(info['lists'], 'list')} a row")
    if "index" in info:
        parts.insert(1, info["index"])
    return ", ".join(parts)


def graph_features(
    features: Features,
    out: str,
    search: GraphSearch,
    stages: session.Stages,
    rows: Rows | None = None,  # unit rows of the features, if they are loaded already
    save_index: str | None = None,
) -> tuple[NeighborGraph, dict[str, Any]]:
    """Search the neighbours of all rows and write the graph folder `out`; graph and manifest."""
    identity = _identity(features, search)
    state_of = identity | {"faiss": faiss_installed()}  # on which "auto" depends
    origins = {"features": features.origins["image_features"]}
    with (
        session.collected_warnings(origins) as warnings,
        new_folder(out, CONTENTS, obsolete=search_leftovers(out)) as folder,
    ):
        with (
            session.errors_about(origins, features.path),
            stages.time("graph"),
            progress_bar("graph", "rows") as show,
        ):
            graph = build_graph(
                features.get("image_features") if rows is None else rows,
                save_index=save_index,
                progress=show,
                checkpoint=FileCheckpoint(out, CHECKPOINT, state_of, CHECKPOINT_SECONDS),
                **vars(search),
            )
        manifest = {
            "n_rows": len(graph),
            "n_neighbors": search.n_neighbors,
            "features_sha256": features.sha256(),
            "sha256": graph.sha256(),
            "identity": identity,
            "seconds": stages.seconds,
            "device": str(search.device),
            "versions": session.versions(),
            "warnings": warnings,
        }
        with writing(out):
            save_graph(folder, graph, manifest)
    return graph, manifest


def kept_graph(
    folder: Path,
    features: Features,
    search: GraphSearch,
    stages: session.Stages,
    rows: Rows | None = None,
) -> NeighborGraph:
    """The graph in `folder` if the same search made it; otherwise search and write it there."""
    with contextlib.suppress(InputError):  # no such folder, or a damaged one
        if load_manifest(folder).get("identity") == _identity(features, search):
            graph = load_graph(folder, features.sha256())
            graph = graph.check(len(features.get("image_features")), search.n_neighbors)
            clean(folder, search_leftovers(folder))
            return graph
    return graph_features(features, str(folder), search, stages, rows)[0]


def search_leftovers(folder: str | Path) -> list[Path]:
    """The checkpoint beside a graph folder, which it needs no more once it is whole."""
    return files(folder, CHECKPOINT)


def leftovers(folder: Path) -> list[Path]:
    """A graph folder, and every file that a killed search of it may have left."""
    return [folder, *(beside(folder, name) for name in HIDDEN), *search_leftovers(folder)]


def _identity(features: Features, search: GraphSearch) -> dict[str, Any]:
    """All that decides the neighbours."""
    index = None
    if search.index is not None and is_file(search.index):
        status = Path(search.index).stat()
        index = [status.st_size, status.st_mtime_ns]
    return {
        "features_sha256": features.sha256(),
        **vars(search),
        "index_file": index,
        "device": search.device.type,
    }
