"""`transclip-fast graph`: features to a graph folder."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
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
from transclip_fast.ops.exchange import Partition
from transclip_fast.progress_bar import progress_bar
from transclip_fast.ranks import ALONE, check_same, current_ranks, joined
from transclip_fast.store.atomic import HIDDEN, beside, clean, shared_folder, writing
from transclip_fast.store.checkpoint import checkpoint_of, files
from transclip_fast.store.features import Features, load_features
from transclip_fast.store.graphs import CONTENTS, load_graph, load_manifest, save_graph, save_lists
from transclip_fast.version import __version__

SEARCH_OPTIONS = ("search", "recall", "index")  # of a `GraphSearch`
CHECKPOINT = "search"  # name of the search's checkpoint
CHECKPOINT_SECONDS = 30.0  # between two states, unless they are slow to write


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
    device = resolve_device(current_ranks().device(values["device"]))
    return GraphSearch(n_neighbors, device, *(values[name] for name in SEARCH_OPTIONS))


def refuse_search(values: Mapping[str, Any]) -> None:
    """InputError if the command was given an option of the search, and --graph."""
    if values["graph_folder"]:
        options.refuse_unused(SEARCH_OPTIONS, "the graph of --graph is not searched")


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
      torchrun --nproc-per-node 4 -m transclip_fast.cli graph features --out graph

    Started by torchrun, processes on one or more machines that see the same folders share the work;
    the graph has the same bits for any number of them, also when another number resumes.
    """
    stages = session.Stages()
    real = os.path.realpath(out)
    if save_index is not None and Path(os.path.realpath(save_index)).is_relative_to(real):
        raise InputError(
            f"{save_index}: is in --out, which is replaced as a whole; name another file"
        )
    with joined(together=True) as ranks:
        search = search_of(values, n_neighbors)
        with stages.time("load"):
            features = load_features(path, shots=0)
        graph, manifest = graph_features(features, out, search, stages, save_index=save_index)
    if not ranks.leads:
        return
    text = (
        f"{counted(manifest['n_rows'], 'row')}, {counted(n_neighbors, 'neighbour')} each: "
        f"{describe(graph.info)}, {stages.seconds['graph']:.1f} s\nwritten to {out}"
    )
    session.print_summary(manifest, text, as_json)


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
    """
    Search the neighbours of all rows and write the graph folder `out`; graph and manifest.

    Ranks that share the rows all call this: each writes and returns the lists of its own, the first
    one writes everything else, and returns the whole manifest.
    """
    ranks, identity = current_ranks(), _identity(features, search)
    partition = Partition(len(features.get("image_features")), ranks)
    work = {**identity, "faiss": faiss_installed(), "arrays": 2}  # "auto" depends on FAISS
    checkpoint = checkpoint_of(out, CHECKPOINT, work, CHECKPOINT_SECONDS, partition)
    origins = {"features": features.origins["image_features"]}
    with (
        session.collected_warnings(origins, shown=ranks.leads) as warnings,
        shared_folder(out, CONTENTS, ranks, obsolete=search_leftovers(out)) as folder,
    ):
        with (
            session.errors_about(origins, features.path),
            stages.time("graph"),
            progress_bar("graph", "rows", shown=ranks.leads) as show,
        ):
            check_same(ranks, {"search": json.dumps(identity)})
            graph = build_graph(
                features.get("image_features") if rows is None else rows,
                save_index=save_index,
                progress=show,
                checkpoint=checkpoint,
                own_rows=True,
                **vars(search),
            )
        with writing(out):
            if len(graph):
                save_lists(folder, graph, partition.rows.start)
            # All ranks have written theirs when they say this.
            said = ranks.all_gather(warnings)
        manifest = {
            "n_rows": partition.n_rows,
            "n_neighbors": search.n_neighbors,
            "features_sha256": features.sha256(),
            "identity": identity,
            "seconds": stages.seconds,
            "device": str(search.device),
            "versions": session.versions(),
            "warnings": [*dict.fromkeys(text for found in said for text in found)],
        }
        if ranks.leads:
            with writing(out):
                manifest = save_graph(folder, graph.info, manifest)
    return graph, manifest


def kept_graph(
    folder: Path,
    features: Features,
    search: GraphSearch,
    stages: session.Stages,
    rows: Rows | None = None,
) -> NeighborGraph:
    """
    The graph in `folder` if the same search made it; otherwise search and write it there.

    Ranks that share the rows all call this; the graph then stays in its files.
    """
    ranks, graph = current_ranks(), None
    shared = ranks is not ALONE
    with contextlib.suppress(InputError):  # no such folder, or a damaged one
        if load_manifest(folder).get("identity") == _identity(features, search):
            graph = load_graph(folder, features.sha256(), mapped=shared)
            graph = graph.check(len(features.get("image_features")), search.n_neighbors)
    kept = all(ranks.all_gather(graph is not None))
    if graph is None or not kept:
        graph, _ = graph_features(features, str(folder), search, stages, rows)
        return load_graph(folder, features.sha256(), mapped=True) if shared else graph
    if ranks.leads:
        clean(folder, search_leftovers(folder))
    return graph


def search_leftovers(folder: str | Path) -> Iterator[Path]:
    """The checkpoints beside a graph folder, which it needs no more once it is whole."""
    return files(folder, CHECKPOINT)


def leftovers(folder: Path) -> list[Path]:
    """A graph folder, and every file that a killed search of it may have left."""
    return [folder, *(beside(folder, name) for name in HIDDEN), *search_leftovers(folder)]


def index_file(index: str | None) -> list[int] | None:
    """Size and time of the file that --index names; None for a factory string, and for nothing."""
    if index is None or not is_file(index):
        return None
    status = Path(index).stat()
    return [status.st_size, status.st_mtime_ns]


def _identity(features: Features, search: GraphSearch) -> dict[str, Any]:
    """All that decides the neighbours."""
    return {
        "features_sha256": features.sha256(),
        **vars(search),
        "index_file": index_file(search.index),
        "device": search.device.type,
        "version": __version__,
    }
