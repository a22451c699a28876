"""`transclip-fast run`: images and class names to labels; each stage's folder is kept."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import click

from transclip_fast.cli import common
from transclip_fast.cli.encode import encode, encode_options, report
from transclip_fast.cli.evaluate import evaluate_result
from transclip_fast.cli.evaluate import text as evaluation_text
from transclip_fast.cli.graph import AUTO, GraphOptions, graph_features, method_option
from transclip_fast.cli.solve import requested, solve_features
from transclip_fast.cli.solve import text as solve_text
from transclip_fast.device import resolve_device
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.graph import NeighborGraph
from transclip_fast.store.features import Features, load_features
from transclip_fast.store.graphs import load_graph
from transclip_fast.store.results import load_mixture, load_result


@click.command("run")
@click.argument("images", type=click.Path())
@common.out_option
@encode_options
@method_option("--graph-method")
@common.recall_option
@common.device_option
@common.json_option
def command(images: str, out: str, device: str, as_json: bool, **options: Any) -> None:
    """Label IMAGES with the class names in --classes: encode, graph, solve, report.

    IMAGES is a folder of images, ImageNet's folders, a .txt, .csv or .parquet list of paths, or
    webdataset tars. --out receives the folders features/, graph/ and result/. Started again it
    skips each stage that is whole, and continues an encode that was killed.

    \b
    Example:
      transclip-fast run photos --classes names.txt --model ViT-B-32 --pretrained openai --out out
    """
    strict = options.pop("strict")
    graph_options = GraphOptions(options.pop("method"), options.pop("recall"))
    if options["names"] is None:
        raise InputError("run needs --classes: a text file with one name a line, or imagenet")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("run is one process; torchrun the `encode` into OUT/features, then run")
    folder = Path(out)
    with common.collected_warnings({}) as warnings:
        made = encode(images, str(folder / "features"), device, **options)
        encoded, encoded_text = report(made, str(folder / "features"))
        solved, solved_text = solve_folder(folder, TransCLIP(device=device), graph_options)
    summary = {
        **solved,
        "failures": encoded["failures"],
        "throughput": encoded["throughput"],
        "seconds": {**made.seconds, **solved["seconds"]},
        "warnings": [*warnings, *solved["warnings"]],
    }
    common.summarise(summary, f"{encoded_text}\n{solved_text}", as_json)
    if strict and encoded["failures"]:
        sys.exit(1)


def solve_folder(
    folder: Path, model: TransCLIP, options: GraphOptions = AUTO
) -> tuple[dict[str, Any], str]:
    """Graph, result and report of folder/features, in folder/graph and folder/result."""
    stages = common.Stages()
    stored = load_features(folder / "features")
    result = folder / "result"
    run = _solved(result, stored, model)
    if run is None:
        graph = _graph(folder / "graph", stored, model, stages, options)
        run = solve_features(stored, str(result), model, graph, stages)
    text = solve_text(run, str(result))
    if run["accuracy"] is not None:
        text = f"{text}\n\n{evaluation_text(*evaluate_result(str(result)))}"
    return run, text


def _graph(
    folder: Path,
    stored: Features,
    model: TransCLIP,
    stages: common.Stages,
    options: GraphOptions,
) -> NeighborGraph:
    """The graph in a folder where it is whole and of these features, otherwise a new one."""
    with contextlib.suppress(InputError):
        graph = load_graph(folder, stored.sha256())
        if graph.n_neighbors == model.n_neighbors:
            return graph.check(len(stored.get("image_features")), model.n_neighbors)
    device = resolve_device(model.device)
    return graph_features(stored, str(folder), model.n_neighbors, device, stages, options)[0]


def _solved(result: Path, stored: Features, model: TransCLIP) -> dict[str, Any] | None:
    """run.json of a whole result of these very inputs and parameters, where there is one."""
    try:
        run = load_result(result).run
        load_mixture(result)
    except InputError:
        return None
    known = {
        "kind": "solve",
        "parameters": requested(model),
        "inputs_sha256": stored.inputs_sha256(),
        "class_names": stored.class_names,
    }
    return run if all(run.get(name) == value for name, value in known.items()) else None
