"""`transclip-fast graph`: features to a graph folder."""

from __future__ import annotations

from typing import Any

import click
import torch

from transclip_fast.cli import common
from transclip_fast.device import resolve_device
from transclip_fast.graph import NeighborGraph, build_graph
from transclip_fast.inputs import as_unit_rows
from transclip_fast.store.atomic import new_folder, writing
from transclip_fast.store.features import Features, load_features
from transclip_fast.store.graphs import CONTENTS, save_graph


@click.command("graph")
@click.argument("features", type=click.Path())
@common.out_option
@click.option("--n-neighbors", default=3, show_default=True, type=click.IntRange(min=1))
@common.device_option
@common.json_option
def command(features: str, out: str, n_neighbors: int, device: str, as_json: bool) -> None:
    """Find the nearest neighbours of every row of FEATURES.

    FEATURES is a feature folder or a .npz, .npy, .pt or .safetensors file. The folder written
    holds neighbors.npy (N, k), similarities.npy (N, k) and a manifest; `solve --graph` takes it.

    \b
    Example:
      transclip-fast graph features.npz --out graph
    """
    stages = common.Stages()
    chosen = resolve_device(device)
    with stages.time("load"):
        stored = load_features(features)
    graph, manifest = graph_features(stored, out, n_neighbors, chosen, stages)
    text = (
        f"{len(graph):,} rows, {n_neighbors} neighbours each: {graph.info['method']}, recall "
        f"{graph.info['recall']:.4f}, {stages.seconds['graph']:.1f} s\nwritten to {out}"
    )
    common.summarise({**graph.info, **manifest}, text, as_json)


def graph_features(
    stored: Features, out: str, n_neighbors: int, device: torch.device, stages: common.Stages
) -> tuple[NeighborGraph, dict[str, Any]]:
    """Search stored features and write the graph folder `out`; the graph and its manifest."""
    with common.collected_warnings({}) as warnings, new_folder(out, CONTENTS) as folder:
        rows = as_unit_rows(stored.get("image_features"), stored.origins["image_features"])
        with stages.time("graph"), common.progress("graph", "rows") as show:
            graph = build_graph(rows, n_neighbors, device=device, progress=show)
        manifest = {
            "n_rows": len(graph),
            "n_neighbors": n_neighbors,
            "features_sha256": stored.sha256(),
            "seconds": stages.seconds,
            "device": str(device),
            "versions": common.versions(),
            "warnings": warnings,
        }
        with writing(out):
            save_graph(folder, graph, manifest)
    return graph, manifest
