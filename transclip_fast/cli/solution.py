"""Solving features into a result folder: checks, fit and files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from transclip_fast.cli import session
from transclip_fast.cli.graph import GraphSearch, kept_graph, leftovers
from transclip_fast.cli.head import FittedHead
from transclip_fast.cli.outlook import describe_outlook, outlook
from transclip_fast.cli.plan import plan_of, problem_of
from transclip_fast.cli.session import counted
from transclip_fast.cli.summary import of_others, run_summary, solver_summary
from transclip_fast.data.checks import as_labels
from transclip_fast.errors import InputError
from transclip_fast.estimator import GraphSource, TransCLIP
from transclip_fast.metrics import check_assignments, check_class_order, rejected_rows
from transclip_fast.progress_bar import progress_bar, shown_on
from transclip_fast.solver.layout import peak_bytes
from transclip_fast.solver.parameters import GAMMAS
from transclip_fast.solver.problem import Settings
from transclip_fast.store.atomic import beside, new_folder, writing
from transclip_fast.store.checkpoint import FileCheckpoint, files
from transclip_fast.store.features import Features
from transclip_fast.store.results import CONTENTS, prediction_tables, save_result
from transclip_fast.types import NeighborGraph
from transclip_fast.version import __version__

CHECKPOINT_SECONDS = 1.0  # the most work that a crash costs


@dataclass(frozen=True)
class Output:
    """What a result has beside labels: `reject`, the share of rows to mark as none of the classes,
    and `csv`, whether predictions are written as .csv, too."""

    reject: float | None = None
    csv: bool = False


def solve_features(
    features: Features,
    out: str,
    model: TransCLIP,
    graph: NeighborGraph | GraphSearch,
    stages: session.Stages,
    output: Output = Output(),
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
    own_graph = beside(out, "graph")
    origins = features.origins | {"X": features.origins["image_features"], out: out}
    origins[str(own_graph)] = out
    with (
        session.collected_warnings(origins) as warnings,
        new_folder(out, CONTENTS, obsolete=solve_leftovers(out)) as folder,
    ):
        with session.errors_about(origins, features.path):
            head = make_head(features) if make_head else None
            solved = head.features if head else features
            problem = problem_of(solved, model)
            settings = Settings.resolve(model, problem)
            search = graph.planned if isinstance(graph, GraphSearch) else None
            plan = plan_of(problem, settings, search)
            n_classes = problem.prior.n_classes
            check_class_names(features, n_classes)
            truth = true_labels(features, n_classes)
            if not quiet:
                found = outlook(problem, model)
                text = describe_outlook(found, n_classes, features.class_names)
                session.say(f"{plan.line()}\n{text}")
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
        known = None if problem.known is None else problem.known.numpy() >= 0
        columns = {
            "calibrated_confidence": model.calibrated_confidences_,
            "outlier_score": model.outlier_score_,
            "neighbors": model.graph_.neighbors,
        }
        if known is not None:
            columns["known"] = known
        if output.reject is not None:
            columns["rejected"] = rejected_rows(model.outlier_score_, output.reject)
            if known is not None:
                columns["rejected"] &= ~known
        run |= solver_summary(model) | {
            "features": path_from(out, features.path),
            "known_labels": of_others("known", known, labels, zero_shot[0], truth),
            "rejected": of_others("rejected", columns.get("rejected"), labels, zero_shot[0], truth),
            "n_shots": 0 if problem.support is None else len(problem.support[1]),
            "n_validation": 0 if problem.validation is None else len(problem.validation[1]),
            "head": head and head.summary(truth),
            "memory": {"planned": plan.peak, "allowed": plan.limit, "peak": peak_bytes()},
            "seconds": stages.seconds,
            "warnings": warnings,
        }
        z = model.label_distributions_
        tables = prediction_tables(z, zero_shot, features, truth, **columns)
        with writing(out):
            run = save_result(folder, tables, run, model.tensors(), csv=output.csv)
    return run


def solve_leftovers(out: str) -> list[Path]:
    """The checkpoints and the graph beside a result, which it needs no more once it is whole."""
    checkpoints = [file for run in range(len(GAMMAS)) for file in files(out, f"solve-{run}")]
    return [*checkpoints, *leftovers(beside(out, "graph"))]


def true_labels(features: Features, n_classes: int) -> np.ndarray | None:
    """The checked labels (N,) int64 of the queries, -1 where unknown; None if they all are."""
    labels = features.get("labels")
    if labels is None:
        return None
    n_rows = len(features.get("image_features"))
    truth = as_labels(labels, "labels", rows=n_rows, n_classes=n_classes, lowest=-1).cpu().numpy()
    if (truth < 0).all():
        warnings.warn("labels: no row has one, so that there is no accuracy", stacklevel=2)
        return None
    return truth


def path_from(folder: str, path: str) -> str:
    """A path relative to a folder, so that both can move together."""
    return os.path.relpath(os.path.realpath(path), os.path.realpath(folder))


def check_class_names(features: Features, n_classes: int) -> None:
    """Raise InputError unless there are no class names, or one for each class."""
    names = features.class_names
    if names is not None and len(names) != n_classes:
        raise InputError(
            f"class_names: {counted(len(names), 'name')} for {counted(n_classes, 'class')}; give "
            "one name a class"
        )
