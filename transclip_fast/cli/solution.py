"""Solving features into a result folder: checks, fit and files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transclip_fast.callbacks import Checkpoint
from transclip_fast.cli import session
from transclip_fast.cli.graph import GraphSearch, kept_graph, leftovers
from transclip_fast.cli.head import FittedHead
from transclip_fast.cli.options import path_from
from transclip_fast.cli.outlook import describe_outlook, outlook
from transclip_fast.cli.plan import plan_of, problem_of
from transclip_fast.cli.session import counted
from transclip_fast.cli.summary import modality_gap, of_others, run_summary, solver_summary
from transclip_fast.data.checks import as_labels
from transclip_fast.data.feature_rows import Rows
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.graph.neighbor_graph import GraphSource, NeighborGraph
from transclip_fast.metrics import check_assignments, check_class_order, rejected_rows
from transclip_fast.ops.ranked import RankedRows
from transclip_fast.progress_bar import progress_bar, shown_on
from transclip_fast.ranks import ALONE, check_same, current_ranks
from transclip_fast.solver.layout import peak_bytes
from transclip_fast.solver.parameters import GAMMAS
from transclip_fast.solver.problem import Problem, Settings
from transclip_fast.store.atomic import beside, shared_folder, writing
from transclip_fast.store.checkpoint import FileCheckpoint, RankedCheckpoint, files, ranked_files
from transclip_fast.store.features import Features
from transclip_fast.store.results import (
    CONTENTS,
    joined_parts,
    prediction_tables,
    save_result,
    write_part,
)
from transclip_fast.version import __version__

CHECKPOINT_SECONDS = 1.0  # the most work that a crash costs


@dataclass(frozen=True)
class Output:
    """
    What a result has beside labels.

    Parameters
    ----------
    reject : float, optional
        Share of the rows to mark as none of the classes.
    csv : bool
        Write the predictions as .csv, too.
    options : list of dict
        Of the command that solves so again, see `given_options`.
    warnings : list of str
        Of what went before.
    """

    reject: float | None = None
    csv: bool = False
    options: Sequence[Mapping[str, str]] = ()
    warnings: Sequence[str] = ()


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

    Ranks that share the rows all call this: each writes the predictions of its own, the first one
    everything else. On the others run.json lacks what needs the first one's summary.
    """
    ranks = current_ranks() or ALONE
    own_graph = beside(out, "graph")
    origins = features.origins | {"X": features.origins["image_features"], out: out}
    origins[str(own_graph)] = out
    with (
        session.collected_warnings(origins, shown=ranks.leads) as warnings,
        shared_folder(out, CONTENTS, ranks, obsolete=solve_leftovers(out)) as folder,
    ):
        with session.errors_about(origins, features.path):
            check_same(ranks, {"arrays": json.dumps(features.inputs_sha256(), sort_keys=True)})
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
                if ranks.leads:
                    session.say(f"{plan.line()}\n{text}")
            source: GraphSource = (
                graph
                if isinstance(graph, NeighborGraph)
                else partial(_searched, own_graph, solved, graph, stages)
            )
            inputs = {"inputs_sha256": solved.inputs_sha256(), "version": __version__}

            def checkpoint(name: str, identity: dict[str, Any]) -> Checkpoint:
                arguments = out, name, identity | inputs, CHECKPOINT_SECONDS
                if problem.exchange is None:
                    return FileCheckpoint(*arguments)
                rows = problem.exchange.partition.rows
                return RankedCheckpoint(*arguments, ranks=ranks, rows=rows)

            bar = progress_bar("solve", "rows", shown=ranks.leads)
            with stages.time("solve"), bar as show:
                model.fit_problem(
                    problem, settings, source, progress=shown_on(show), checkpoint=checkpoint
                )
        labels, before, outlier_score = (
            _of_all_rows(problem, column)
            for column in (model.transduction_, model.zero_shot_labels_, model.outlier_score_)
        )
        charged = model.class_costs_ is not None
        names = features.class_names
        signs = check_assignments(labels, before, n_classes, names, charged=charged)
        if truth is not None:
            signs += check_class_order(before, truth)
        for sign in signs:
            session.warn(warnings, sign, shown=ranks.leads)
        shape = model.means_.shape
        run = run_summary("solve", features, labels, before, truth, shape)
        known = None if problem.known is None else problem.known.numpy() >= 0
        columns = {"outlier_score": outlier_score}
        if known is not None:
            columns["known"] = known
        if output.reject is not None:
            columns["rejected"] = rejected_rows(outlier_score, output.reject)
            if known is not None:
                columns["rejected"] &= ~known
        run |= solver_summary(model) | {
            "features": path_from(out, features.path),
            "options": [*output.options],
            "graph_sha256": graph.sha256() if isinstance(graph, NeighborGraph) else None,
            "modality_gap": modality_gap(
                problem.features, solved.get("text_features"), problem.exchange
            ),
            "known_labels": of_others("known", known, labels, before, truth),
            "rejected": of_others("rejected", columns.get("rejected"), labels, before, truth),
            "n_shots": 0 if problem.support is None else len(problem.support[1]),
            "n_validation": 0 if problem.validation is None else len(problem.validation[1]),
            "head": head and head.summary(truth),
            "seconds": stages.seconds,
        }
        tables = prediction_tables(
            model.label_distributions_,
            (model.zero_shot_labels_, model.zero_shot_confidences_),
            features,
            None if truth is None else truth[model.rows_],
            first=model.rows_.start,
            columns={
                "calibrated_confidence": model.calibrated_confidences_,
                "neighbors": model.graph_.neighbors,
                **{name: column[model.rows_] for name, column in columns.items()},
            },
        )
        with writing(out):
            if problem.exchange is not None:
                write_part(folder, model.rows_.start, tables)
                tables = joined_parts(folder)
            # All ranks have written theirs when they say this.
            said = ranks.all_gather({"peak": peak_bytes(), "warnings": warnings})
            peak = max(found["peak"] for found in said)
            run["memory"] = {"planned": plan.peak, "allowed": plan.limit, "peak": peak}
            now = [text for found in said for text in found["warnings"]]
            run["warnings"] = [*dict.fromkeys([*output.warnings, *now])]
            if ranks.leads:
                run = save_result(folder, tables, run, model.tensors(), csv=output.csv)
    return run


def solve_leftovers(out: str) -> Iterator[Path]:
    """
    The checkpoints and the graph beside a result, which it needs no more once it is whole.

    They are looked for when they are asked for.
    """
    for run in range(len(GAMMAS)):
        yield from files(out, f"solve-{run}")
        yield from ranked_files(out, f"solve-{run}")
    yield from leftovers(beside(out, "graph"))


def _searched(
    folder: Path, features: Features, search: GraphSearch, stages: session.Stages, rows: Rows
) -> NeighborGraph:
    """The graph in `folder`, which is searched unless it is there; by all ranks together."""
    whole = None if isinstance(rows, RankedRows) else rows
    return kept_graph(folder, features, search, stages, whole)


def _of_all_rows(problem: Problem, column: np.ndarray) -> np.ndarray:
    """A column (N,) of the rows of all ranks."""
    if problem.exchange is None:
        return column
    found: np.ndarray = problem.exchange.join(torch.from_numpy(column)).numpy()
    return found


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


def check_class_names(features: Features, n_classes: int) -> None:
    """Raise InputError unless there are no class names, or one for each class."""
    names = features.class_names
    if names is not None and len(names) != n_classes:
        raise InputError(
            f"class_names: {counted(len(names), 'name')} for {counted(n_classes, 'class')}; give "
            "one name a class"
        )
