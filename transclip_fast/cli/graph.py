"""`transclip-fast graph`: features to a graph folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from transclip_fast.cli import common
from transclip_fast.cli.common import Command
from transclip_fast.data.feature_rows import Rows
from transclip_fast.device import resolve_device
from transclip_fast.errors import InputError
from transclip_fast.graph.build import METHODS, build_graph
from transclip_fast.store.arrays import array_sha256
from transclip_fast.store.atomic import HIDDEN, beside, new_folder, writing
from transclip_fast.store.checkpoint import FileCheckpoint, files
from transclip_fast.store.features import Features, load_features
from transclip_fast.store.graphs import CONTENTS, load_graph, load_manifest, save_graph
from transclip_fast.types import NeighborGraph

SEARCH, CHECKPOINT_SECONDS = "search", 30.0  # what is kept of a search, and how often


@dataclass(frozen=True)
class GraphOptions:
    """How to search; `build_graph` says what each means."""

    method: str = "auto"
    recall: float = 0.99

    def build(self, features: Any, n_neighbors: int, stored: Features, **how: Any) -> NeighborGraph:
        """The graph of some features, anchored at the classes of `stored`."""
        return build_graph(
            features,
            n_neighbors,
            method=self.method,
            recall=self.recall,
            anchors=anchors(stored),
            **how,
        )


AUTO = GraphOptions()


def anchors(stored: Features) -> Any:
    """The prototypes, else the text features, or None."""
    prototypes = stored.get("prototypes")
    return stored.get("text_features") if prototypes is None else prototypes


def method_option(flag: str) -> Callable[[Command], Command]:
    """The choice of a method, under the name that it has in a command."""
    return click.option(
        flag,
        "method",
        default="auto",
        show_default=True,
        type=click.Choice(METHODS),
        help="How neighbours are searched; auto is exact up to 20,000 rows.",
    )


@click.command("graph")
@click.argument("features", type=click.Path())
@common.out_option
@click.option("--n-neighbors", default=3, show_default=True, type=click.IntRange(min=1))
@method_option("--method")
@common.recall_option
@click.option(
    "--anchors",
    "anchor_file",
    type=click.Path(),
    help="Class means or prototypes (K, d).  [default: the prototypes or texts in FEATURES]",
)
@common.device_option
@common.json_option
def command(
    features: str,
    out: str,
    n_neighbors: int,
    method: str,
    recall: float,
    anchor_file: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Find the nearest neighbours of every row of FEATURES.

    FEATURES is a feature folder or a .npz, .npy, .pt or .safetensors file. The folder written
    holds neighbors.npy (N, k), similarities.npy (N, k) and a manifest; `solve --graph` takes it.
    A killed search goes on when it is started again.

    \b
    Examples:
      transclip-fast graph features.npz --out graph
      transclip-fast graph images.npy --method anchored --anchors text.npy --recall 0.99 --out graph
    """
    stages = common.Stages()
    chosen = resolve_device(device)
    with stages.time("load"):
        stored = load_features(features, {"prototypes": anchor_file}, shots=0)
    options = GraphOptions(method, recall)
    graph, manifest = graph_features(stored, out, n_neighbors, chosen, stages, options)
    text = f"{len(graph):,} rows, {n_neighbors} neighbours each: {describe(graph.info)}, "
    text += f"{stages.seconds['graph']:.1f} s\nwritten to {out}"
    common.summarise({**graph.info, **manifest}, text, as_json)


def describe(info: Mapping[str, Any]) -> str:
    """The method of a graph and how good it is."""
    if "probes" not in info:
        return f"{info['method']}, recall {info['recall']:.4f}"
    return (
        f"{info['method']}, {info['probes']} of {info['lists']} lists a row, recall "
        f"{info['recall']:.4f} on {info['recall_rows']} rows, weight error "
        f"{info['weight_error']:.1e}"
    )


def graph_features(
    stored: Features,
    out: str,
    n_neighbors: int,
    device: torch.device,
    stages: common.Stages,
    options: GraphOptions = AUTO,
    rows: Rows | None = None,
) -> tuple[NeighborGraph, dict[str, Any]]:
    """
    Search stored features and write the graph folder `out`; the graph and its manifest.

    `rows` are their unit rows, where they are at hand.
    """
    identity = _identity(stored, n_neighbors, options) | {"device": device.type}
    checkpoint = FileCheckpoint(out, SEARCH, identity, CHECKPOINT_SECONDS)
    origins = {"features": stored.origins["image_features"], "anchors": stored.path}
    with (
        common.collected_warnings(origins) as warnings,
        new_folder(out, CONTENTS, obsolete=files(out, SEARCH)) as folder,
    ):
        with (
            common.named(origins, stored.path),
            stages.time("graph"),
            common.progress("graph", "rows") as show,
        ):
            graph = options.build(
                stored.get("image_features") if rows is None else rows,
                n_neighbors,
                stored,
                device=device,
                progress=show,
                checkpoint=checkpoint,
            )
        manifest = {
            "n_rows": len(graph),
            "n_neighbors": n_neighbors,
            "features_sha256": stored.sha256(),
            "identity": identity,
            "seconds": stages.seconds,
            "device": str(device),
            "versions": common.versions(),
            "warnings": warnings,
        }
        with writing(out):
            save_graph(folder, graph, manifest)
    return graph, manifest


def kept_graph(
    folder: Path,
    stored: Features,
    n_neighbors: int,
    device: torch.device,
    stages: common.Stages,
    options: GraphOptions = AUTO,
    rows: Rows | None = None,
) -> NeighborGraph:
    """The graph in a folder where it is whole and would be made again; otherwise a new one."""
    with contextlib.suppress(InputError):
        identity = load_manifest(folder).get("identity", {})
        if identity == _identity(stored, n_neighbors, options) | {"device": device.type}:
            graph = load_graph(folder, stored.sha256())
            return graph.check(len(stored.get("image_features")), n_neighbors)
    return graph_features(stored, str(folder), n_neighbors, device, stages, options, rows)[0]


def left_by(folder: Path) -> list[Path]:
    """A graph folder, and all that a killed search of it may have left."""
    return [folder, *(beside(folder, name) for name in HIDDEN), *files(folder, SEARCH)]


def _identity(stored: Features, n_neighbors: int, options: GraphOptions) -> dict[str, Any]:
    """What decides the neighbours."""
    starts = anchors(stored)
    return {
        "features_sha256": stored.sha256(),
        "anchors_sha256": None if starts is None else array_sha256(starts),
        "n_neighbors": n_neighbors,
        **asdict(options),
    }
