"""Solving features into a result folder: checks, fit, run.json and its text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import click
import numpy as np

from transclip_fast.cli import session
from transclip_fast.cli.graph import GraphSearch, describe, kept_graph, leftovers
from transclip_fast.cli.head import FittedHead
from transclip_fast.cli.options import requested
from transclip_fast.cli.outlook import (
    describe_changes,
    describe_outlook,
    outlook,
    size_changes,
    use_of_classes,
)
from transclip_fast.cli.plan import plan_of, problem_of
from transclip_fast.cli.session import counted
from transclip_fast.data.checks import as_labels
from transclip_fast.errors import InputError
from transclip_fast.estimator import GraphSource, TransCLIP
from transclip_fast.metrics import accuracy, check_assignments, check_class_order
from transclip_fast.progress_bar import progress_bar, shown_on
from transclip_fast.solver.layout import peak_bytes
from transclip_fast.solver.parameters import GAMMAS
from transclip_fast.solver.problem import Problem, Settings
from transclip_fast.store.atomic import beside, new_folder, writing
from transclip_fast.store.checkpoint import FileCheckpoint, files
from transclip_fast.store.features import Features
from transclip_fast.store.results import CONTENTS, prediction_tables, save_result
from transclip_fast.types import NeighborGraph
from transclip_fast.version import __version__

CHECKPOINT_SECONDS = 1.0  # the most work that a crash costs


def solve_features(
    features: Features,
    out: str,
    model: TransCLIP,
    graph: NeighborGraph | GraphSearch,
    stages: session.Stages,
    *,
    make_head: Callable[[Features], FittedHead] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """
    Solve features, write the result folder `out` and return its run.json.

    The same call resumes from the graph and the last checkpoint, which are hidden files next to
    `out` until the folder is complete.

    `graph` has the neighbours, or the search for them; `make_head` fits or reads the head that
    becomes the prior; `quiet` does not print the plan.
    """
    checkpoints = [file for run in range(len(GAMMAS)) for file in files(out, f"solve-{run}")]
    own_graph = beside(out, "graph")
    origins = features.origins | {"X": features.origins["image_features"], out: out}
    origins[str(own_graph)] = out
    with (
        session.collected_warnings(origins) as warnings,
        new_folder(out, CONTENTS, obsolete=[*checkpoints, *leftovers(own_graph)]) as folder,
    ):
        with session.errors_about(origins, features.path):
            head = make_head(features) if make_head else None
            solved = head.features if head else features
            problem = problem_of(solved, model)
            settings = Settings.resolve(model, problem)
            method = graph.method if isinstance(graph, GraphSearch) else None
            plan = plan_of(problem, settings, method)
            n_classes = problem.prior.n_classes
            check_class_names(features, n_classes)
            truth = true_labels(features, n_classes)
            if not quiet:
                found = outlook(problem, model)
                text = describe_outlook(found, n_classes, features.class_names)
                click.echo(f"{plan.line()}\n{text}")
            source: GraphSource = (
                graph
                if isinstance(graph, NeighborGraph)
                else partial(kept_graph, own_graph, solved, graph, stages)
            )
            inputs = {"inputs_sha256": solved.inputs_sha256(), "version": __version__}

            def checkpoint(name: str, identity: dict[str, Any]) -> FileCheckpoint:
                return FileCheckpoint(out, name, identity | inputs, CHECKPOINT_SECONDS)

            with stages.time("solve"), progress_bar("solve", "rows") as show:
                model.fit_problem(
                    problem, settings, source, progress=shown_on(show), checkpoint=checkpoint
                )
        zero_shot = (model.zero_shot_labels_, model.zero_shot_confidences_)
        labels = model.transduction_
        charged = model.class_costs_ is not None
        names = features.class_names
        signs = check_assignments(labels, zero_shot[0], n_classes, names, charged=charged)
        if truth is not None:
            signs += check_class_order(zero_shot[0], truth)
        for sign in signs:
            session.warn(warnings, sign)
        shape = model.means_.shape
        run = run_summary("solve", features, labels, zero_shot[0], truth, shape)
        run |= _solver_summary(model) | {
            "known_labels": _known_summary(problem, labels, zero_shot[0], truth),
            "n_shots": 0 if problem.support is None else len(problem.support[1]),
            "head": head and head.summary(truth),
            "memory": {"planned": plan.peak, "allowed": plan.limit, "peak": peak_bytes()},
            "seconds": stages.seconds,
            "warnings": warnings,
        }
        tables = prediction_tables(model.label_distributions_, zero_shot, features, truth)
        with writing(out):
            save_result(folder, tables, run, model.tensors())
    return run


def _solver_summary(model: TransCLIP) -> dict[str, Any]:
    parameters = requested(model)
    return {
        "device": str(model.device_),
        "n_iter": model.n_iter_,
        "objective": model.objective_.tolist(),
        "graph": {"n_neighbors": model.n_neighbors, **model.graph_.info},
        "backend": model.backend_,
        "truncation": model.truncation_,
        "parameters": parameters,
        "n_effective_classes": model.n_effective_classes_,
        "config": {
            **parameters,
            "kl_weight": model.kl_weight_,
            "gamma": model.gamma_,
            "class_cost": model.class_costs_ is not None,
        },
    }


def _known_summary(
    problem: Problem, labels: np.ndarray, zero_shot: np.ndarray, truth: np.ndarray | None
) -> dict[str, Any] | None:
    """Number of queries of known class, and what is right of the others; None without any."""
    if problem.known is None:
        return None
    others = problem.known.numpy() < 0

    def right(found: np.ndarray) -> float | None:
        if truth is None or not others.any():
            return None
        return accuracy(found[others], truth[others])

    return {
        "n_known": int((~others).sum()),
        "accuracy_of_others": right(labels),
        "zero_shot_accuracy_of_others": right(zero_shot),
    }


def true_labels(features: Features, n_classes: int) -> np.ndarray | None:
    """The checked labels (N,) int64 of the queries, or None if there are none."""
    labels = features.get("labels")
    if labels is None:
        return None
    n_rows = len(features.get("image_features"))
    return as_labels(labels, "labels", rows=n_rows, n_classes=n_classes).cpu().numpy()


def check_class_names(features: Features, n_classes: int) -> None:
    """Raise InputError unless there are no class names, or one for each class."""
    names = features.class_names
    if names is not None and len(names) != n_classes:
        raise InputError(
            f"class_names: {counted(len(names), 'name')} for {counted(n_classes, 'class')}; give "
            "one name a class"
        )


def run_summary(
    kind: str,
    features: Features,
    labels: np.ndarray,
    zero_shot: np.ndarray,
    truth: np.ndarray | None,
    means_shape: tuple[int, ...],
) -> dict[str, Any]:
    """The part of run.json that all commands share which label rows: labels are (N,) int64."""
    return {
        "kind": kind,
        "accuracy": None if truth is None else accuracy(labels, truth),
        "zero_shot_accuracy": None if truth is None else accuracy(zero_shot, truth),
        "n_queries": len(labels),
        "n_classes": means_shape[0],
        "dim": means_shape[1],
        "n_flipped": int((labels != zero_shot).sum()),
        "size_changes": size_changes(labels, zero_shot, means_shape[0]),
        "inputs_sha256": features.inputs_sha256(),
        "maps": features.maps,
        "class_names": features.class_names,
        "versions": session.versions(),
    }


def describe_solution(run: dict[str, Any], out: str) -> str:
    """The run.json of a solve as text."""
    seconds, truncation = run["seconds"], run["truncation"]
    lines = [
        f"{counted(run['n_queries'], 'image')}, {counted(run['n_classes'], 'class')}, "
        f"{counted(run['dim'], 'dimension')}",
        f"{counted(run['n_flipped'], 'label')} changed from zero-shot",
        use_of_classes(run["n_effective_classes"], run["n_classes"], run["config"]["class_cost"]),
        *describe_changes(run["size_changes"], run["class_names"]),
    ]
    if truncation is not None:
        lines.append(
            f"sparse: {counted(truncation['candidates'], 'candidate')} a row, "
            f"{truncation['rank']} kept; mass misplaced at most {truncation['mean_bound']:.1e} "
            f"on average, {truncation['largest_bound']:.1e} in a row"
        )
    if run["config"]["gamma"] is not None:
        source = "as set" if run["parameters"]["gamma"] is not None else "chosen"
        lines.append(f"few-shot, gamma {run['config']['gamma']} {source}")
    elif run.get("n_shots"):
        lines.append(
            f"zero-shot with {counted(run['n_shots'], 'shot')}: too few of some class for few-shot"
        )
    if run["accuracy"] is not None:
        head = run.get("head")
        alone = f", {head['accuracy']:.2f} % {head['name']}" if head else ""
        lines.append(
            f"accuracy {run['zero_shot_accuracy']:.2f} % zero-shot{alone} -> "
            f"{run['accuracy']:.2f} %"
        )
    if (known := run.get("known_labels")) is not None:
        line = f"{counted(known['n_known'], 'label')} known"
        if known["accuracy_of_others"] is not None:
            line += (
                f"; of the others {known['zero_shot_accuracy_of_others']:.2f} % zero-shot -> "
                f"{known['accuracy_of_others']:.2f} %"
            )
        lines.append(line)
    built = f"{seconds['graph']:.1f} s" if "graph" in seconds else "reused"
    graph = f"{describe(run['graph'])}, {built}"
    lines += [
        f"graph {graph}, solve {seconds['solve']:.1f} s on {run['device']}",
        f"written to {out}: predictions.parquet, mixture.safetensors, run.json",
    ]
    return "\n".join(lines)
