"""`transclip-fast solve`: features to labels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from transclip_fast.cli import common
from transclip_fast.cli.graph import (
    AUTO,
    GraphOptions,
    describe,
    kept_graph,
    left_by,
    method_option,
)
from transclip_fast.cli.head import FittedHead, check_named, stored_head, wants_patches
from transclip_fast.cli.options import (
    array_options,
    model_of,
    parameter_options,
    requested,
)
from transclip_fast.cli.plan import plan_of, problem_of
from transclip_fast.cli.towers import load_tower, tower_options
from transclip_fast.data.checks import as_labels
from transclip_fast.data.feature_rows import Rows
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.heads import HEADS
from transclip_fast.heads.prompts import TextTower
from transclip_fast.metrics import accuracy, check_assignments, check_class_order
from transclip_fast.progress_bar import shown_on
from transclip_fast.solver.layout import peak_bytes
from transclip_fast.solver.parameters import GAMMAS
from transclip_fast.solver.problem import Settings
from transclip_fast.store.atomic import beside, new_folder, writing
from transclip_fast.store.checkpoint import FileCheckpoint, files
from transclip_fast.store.features import ARRAYS, Features, load_features
from transclip_fast.store.graphs import load_graph
from transclip_fast.store.linear_maps import map_features
from transclip_fast.store.results import CONTENTS, prediction_tables, save_result
from transclip_fast.types import NeighborGraph
from transclip_fast.version import __version__

CHECKPOINT_SECONDS = 1.0


@click.command("solve")
@click.argument("features", type=click.Path())
@common.out_option
@click.option("--graph", "graph_folder", type=click.Path(), help="Graph folder of these features.")
@method_option("--graph-method")
@common.recall_option
@click.option(
    "--head",
    help="Few-shot method that TransCLIP goes on top of: a file of `train-head`, or one that the "
    f"shots train here: {', '.join(HEADS)}.",
)
@click.option("--seed", default=0, show_default=True, help="Of the head's training.")
@tower_options
@common.device_option
@common.json_option
@array_options
@click.option("--shots", type=int, help="Which support of a folder of caches; 0 for none.")
@click.option("--text-map", type=click.Path(), help="Matrix (d, d) that the texts are mapped by.")
@common.image_map_option
@parameter_options
def command(
    features: str,
    out: str,
    graph_folder: str | None,
    method: str,
    recall: float,
    head: str | None,
    seed: int,
    device: str,
    as_json: bool,
    shots: int | None,
    text_map: str | None,
    image_map: str | None,
    **options: Any,
) -> None:
    """Label all rows of FEATURES jointly.

    FEATURES is a feature folder, or a .npz file with image_features (N, d), text_features (K, d)
    and optionally labels (N,), class_names (K,), support_features (M, d), support_labels (M,),
    validation_features, validation_labels, and a prior (N, K), prior_logits (N, K) or prototypes
    (K, d) of another method; or a folder of few-shot caches (test_f.pt, keys_16shots.pt, ...). A
    prior may name the largest classes of a row only: prior_indices (N, m) and prior_values (N, m),
    or a scipy CSR file. --out receives predictions.parquet, mixture.safetensors and run.json.

    \b
    Examples:
      transclip-fast solve features.npz --out result
      transclip-fast solve images.npy --text-features text.npy --class-names names.txt --out result
      transclip-fast solve features.npz --support-features shots.npy --support-labels y.npy \\
          --gamma 0.02 --out result
      transclip-fast solve caches/dtd --shots 16 --text-features text.pt --out result
      transclip-fast solve features.npz --head taskres --out result
      transclip-fast solve features --head coop.safetensors --out result
    """
    stages = common.Stages()
    model = model_of(options, device)
    if head is not None:
        check_named(head)
    with stages.time("load"):
        given = {name: options[name] for name in ARRAYS[1:]}
        local = wants_patches(head)
        stored = load_features(features, given, shots=shots, local=local)
        if local and image_map is not None:
            raise InputError(f"{image_map}: maps no local features, which the head {head} needs")
        map_features(stored, text=text_map, image=image_map)
        graph = load_graph(graph_folder, stored.sha256()) if graph_folder else None
    stored.origins["graph"] = graph_folder or "graph"
    how = GraphOptions(method, recall)
    named = {name: options[name] for name in ("model", "pretrained", "precision")}
    tower = partial(load_tower, device=device, **named)
    run = solve_features(
        stored, out, model, graph, stages, how, head=head, seed=seed, tower=tower, quiet=as_json
    )
    common.summarise(run, text(run, out), as_json)


def solve_features(
    stored: Features,
    out: str,
    model: TransCLIP,
    graph: NeighborGraph | None,
    stages: common.Stages,
    options: GraphOptions = AUTO,
    *,
    head: str | None = None,
    seed: int = 0,
    tower: Callable[[Features], TextTower] = load_tower,
    quiet: bool = False,
) -> dict[str, Any]:
    """
    Solve stored features and write the result folder `out`; what is in its run.json.

    Unless `quiet`, the plan is printed first. What a killed solve has done lies beside the folder
    until it is there: the graph, where none was given, and the state after the last step.
    """
    own_graph = beside(out, "graph")
    states = [file for run in range(len(GAMMAS)) for file in files(out, f"solve-{run}")]
    stored.origins |= {"X": stored.origins["image_features"], out: out, str(own_graph): out}
    if head is not None:
        stored.origins[head] = head  # where it is a file
    with (
        common.collected_warnings(stored.origins) as warnings,
        new_folder(out, CONTENTS, obsolete=[*states, *left_by(own_graph)]) as folder,
    ):
        with common.named(stored.origins, stored.path):
            fitted = stored_head(head, seed, stored, model, stages, tower) if head else None
            solved = fitted.stored if fitted else stored
            truth = _truth(solved)
            problem = problem_of(solved, model)
            settings = Settings.resolve(model, problem)
            plan = plan_of(problem, settings, options.method if graph is None else None)
            if not quiet:
                click.echo(plan.line())
            source = graph or partial(_search, own_graph, solved, model, stages, options)
            fit = partial(model.fit_problem, problem, settings, source)
            _fit(fit, stages, partial(_checkpoint, out, solved))
        _check(model, stored, truth, warnings)
        run = _summary(model, stored, truth, warnings, fitted)
        run["seconds"] = stages.seconds
        run["memory"] = {"planned": plan.peak, "allowed": plan.limit, "peak": peak_bytes()}
        tables = prediction_tables(
            model.label_distributions_,
            (model.zero_shot_labels_, model.zero_shot_confidences_),
            stored,
            truth,
        )
        with writing(out):
            save_result(folder, tables, run, model.tensors())
    return run


def _fit(
    fit: Callable[..., TransCLIP],
    stages: common.Stages,
    checkpoint: Callable[[str, dict[str, Any]], FileCheckpoint],
) -> None:
    searched = stages.seconds.get("graph", 0.0)  # by a caller, before this solve
    with stages.time("solve"), common.progress("solve", "rows") as show:
        fit(progress=shown_on(show), checkpoint=checkpoint)
    searching = stages.seconds.get("graph", 0.0) - searched
    stages.seconds["solve"] = round(stages.seconds["solve"] - searching, 4)


def _search(
    folder: Path,
    stored: Features,
    model: TransCLIP,
    stages: common.Stages,
    options: GraphOptions,
    rows: Rows,
) -> NeighborGraph:
    return kept_graph(folder, stored, model.n_neighbors, rows.device, stages, options, rows)


def _checkpoint(
    out: str,
    stored: Features,
    name: str,
    identity: dict[str, Any],
) -> FileCheckpoint:
    """Keeps a run's state, beside the folder that it will fill."""
    identity |= {"inputs_sha256": stored.inputs_sha256(), "version": __version__}
    return FileCheckpoint(out, name, identity, CHECKPOINT_SECONDS)


def _truth(stored: Features) -> np.ndarray | None:
    """The checked labels (N,), where there are any; also checks the number of class names."""
    n_classes = _n_classes(stored)
    names, labels = stored.class_names, stored.get("labels")
    if not n_classes:  # the fit will say what is wrong
        return None
    if names is not None and len(names) != n_classes:
        raise InputError(
            f"class_names: {len(names)} names for {n_classes} classes; give one name a class"
        )
    if labels is None:
        return None
    n_rows = len(stored.get("image_features"))
    return as_labels(labels, "labels", rows=n_rows, n_classes=n_classes).cpu().numpy()


def _n_classes(stored: Features) -> int | None:
    for name, axis in (("prior", 1), ("prior_logits", 1), ("prototypes", 0), ("text_features", 0)):
        array = stored.get(name)
        if array is not None and array.ndim == 2:
            return int(array.shape[axis])
    return None


def _check(
    model: TransCLIP, stored: Features, truth: np.ndarray | None, warnings: list[str]
) -> None:
    """Warn of signs that the input was wrong."""
    labels, zero_shot = model.transduction_, model.zero_shot_labels_
    n_classes = model.label_distributions_.shape[1]
    found = check_assignments(labels, zero_shot, n_classes, stored.class_names)
    if truth is not None:
        found += check_class_order(zero_shot, truth)
    for message in found:
        common.warn(warnings, message)


def _summary(
    model: TransCLIP,
    stored: Features,
    truth: np.ndarray | None,
    warnings: list[str],
    fitted: FittedHead | None,
) -> dict[str, Any]:
    n_queries, n_classes = model.label_distributions_.shape
    parameters = requested(model)
    return {
        "kind": "solve",
        "accuracy": None if truth is None else accuracy(model.transduction_, truth),
        "zero_shot_accuracy": (None if truth is None else accuracy(model.zero_shot_labels_, truth)),
        "head": fitted and fitted.summary(truth),
        "n_queries": n_queries,
        "n_classes": n_classes,
        "dim": model.means_.shape[1],
        "n_flipped": int((model.transduction_ != model.zero_shot_labels_).sum()),
        "n_iter": model.n_iter_,
        "objective": model.objective_.tolist(),
        "graph": {"n_neighbors": model.n_neighbors, **model.graph_.info},
        "backend": model.backend_,
        "truncation": model.truncation_,
        "device": str(model.device_),
        "inputs_sha256": stored.inputs_sha256(),
        "maps": stored.maps,
        "class_names": stored.class_names,
        "parameters": parameters,
        "config": {**parameters, "kl_weight": model.kl_weight_, "gamma": model.gamma_},
        "versions": common.versions(),
        "warnings": warnings,
    }


def text(run: dict[str, Any], out: str) -> str:
    """The summary of a solve for a reader."""
    graph, seconds = run["graph"], run["seconds"]
    lines = [
        f"{run['n_queries']:,} images, {run['n_classes']:,} classes, {run['dim']} dimensions",
        f"{run['n_flipped']:,} labels differ from zero-shot",
    ]
    if run["truncation"] is not None:
        kept = run["truncation"]
        lines.append(
            f"sparse: {kept['candidates']} candidates a row, {kept['rank']} kept; mass misplaced "
            f"at most {kept['mean_bound']:.1e} on average, {kept['largest_bound']:.1e} in a row"
        )
    if run["config"]["gamma"] is not None:
        chosen = "given" if run["parameters"]["gamma"] is not None else "chosen"
        lines.append(f"few-shot, gamma {run['config']['gamma']} {chosen}")
    if run["accuracy"] is not None:
        head = run.get("head")
        alone = f", {head['accuracy']:.2f} % {head['name']}" if head else ""
        before = f"{run['zero_shot_accuracy']:.2f} % zero-shot{alone}"
        lines.append(f"accuracy {before} -> {run['accuracy']:.2f} %")
    built = f" {seconds['graph']:.1f} s" if "graph" in seconds else " reused"
    lines += [
        f"graph {describe(graph)}{built}, solve {seconds['solve']:.1f} s on {run['device']}",
        f"written to {out}: predictions.parquet, mixture.safetensors, run.json",
    ]
    return "\n".join(lines)
