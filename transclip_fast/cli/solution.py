"""Solving features into a result folder: checks, fit and files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from transclip_fast.callbacks import Checkpoint
from transclip_fast.cli import session
from transclip_fast.cli.class_outlook import counted_by, describe_outlook, outlook
from transclip_fast.cli.encode import warn_of_random
from transclip_fast.cli.graph import GraphSearch, kept_graph, leftovers
from transclip_fast.cli.head import FittedHead
from transclip_fast.cli.options import path_from
from transclip_fast.cli.plan import Plan, plan_of, problem_of
from transclip_fast.cli.summary import modality_gap, of_others, run_summary, solver_summary
from transclip_fast.cli.truth import check_class_names, true_labels
from transclip_fast.data.feature_rows import Rows
from transclip_fast.estimator import TransCLIP
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.memory import peak_bytes
from transclip_fast.metrics import check_assignments, check_class_order, rejected_rows
from transclip_fast.ops.exchange import Partition
from transclip_fast.ops.ranked import RankedRows
from transclip_fast.progress_bar import progress_bar, shown_on
from transclip_fast.ranks import ALONE, Ranks, check_same, current_ranks
from transclip_fast.solver.parameters import GAMMAS
from transclip_fast.solver.problem import Problem, Settings
from transclip_fast.store.atomic import beside, shared_folder, writing
from transclip_fast.store.checkpoint import checkpoint_of, files
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
    """The parts of a result beside its labels."""

    reject: float | None = None  # share of the rows to mark as none of the classes
    csv: bool = False  # the predictions as .csv, too
    options: Sequence[Mapping[str, str]] = ()  # that solve so again, see `given_options`
    warnings: Sequence[str] = ()  # of earlier stages


@dataclass(frozen=True)
class Solving:
    """
    Solving features into the result folder `out`, by TransCLIP or another method.

    Ranks that share the rows all do it: each writes the predictions of its own, the first one
    everything else.
    """

    features: Features
    out: str
    stages: session.Stages
    output: Output = Output()
    ranks: Ranks = field(default_factory=lambda: current_ranks() or ALONE)

    @property
    def origins(self) -> dict[str, str]:
        """The file of each argument that errors and warnings are about."""
        given = self.features.origins
        ours = {self.out: self.out, str(self._graph_folder): self.out}
        return given | {"X": given["image_features"]} | ours

    @property
    def _graph_folder(self) -> Path:
        """The hidden folder of the graph, until the result is whole."""
        return beside(self.out, "graph")

    @contextmanager
    def folder(self) -> Iterator[tuple[Path, list[str]]]:
        """The folder to fill, published at the end, and the warnings given until then."""
        obsolete = solve_leftovers(self.out)
        with (
            session.collected_warnings(self.origins, shown=self.ranks.leads) as warnings,
            shared_folder(self.out, CONTENTS, self.ranks, obsolete=obsolete) as folder,
        ):
            yield folder, warnings

    def errors(self) -> AbstractContextManager[None]:
        """Errors in the block are about the files of the arguments."""
        return session.errors_about(self.origins, self.features.path)

    def truth(self, n_classes: int) -> np.ndarray | None:
        """As `true_labels`, after the class names are checked."""
        check_class_names(self.features, n_classes)
        return true_labels(self.features, n_classes)

    def source(
        self, graph: NeighborGraph | GraphSearch, features: Features
    ) -> Callable[[Rows], NeighborGraph]:
        """Return a function that gives the graph of features: a given one, or a resumed search."""

        def found(rows: Rows) -> NeighborGraph:
            if isinstance(graph, NeighborGraph):
                return graph
            whole = None if isinstance(rows, RankedRows) else rows
            return kept_graph(self._graph_folder, features, graph, self.stages, whole)

        return found

    def summary(
        self,
        warnings: list[str],
        labels: np.ndarray,
        zero_shot: np.ndarray,
        truth: np.ndarray | None,
        means_shape: tuple[int, ...],
        *,
        charged: bool = False,
    ) -> dict[str, Any]:
        """Entries of run.json that every method has; warns of labels (N,) that look wrong."""
        n_classes, names = means_shape[0], self.features.class_names
        signs = check_assignments(labels, zero_shot, n_classes, names, charged=charged)
        if truth is not None:
            signs += check_class_order(zero_shot, truth)
        for sign in signs:
            session.warn(warnings, sign, shown=self.ranks.leads)
        weights, said = (self.features.encoder or {}).get("weights"), self.output.warnings
        warn_of_random(warnings, weights, "labels", said=said, shown=self.ranks.leads)
        return run_summary("solve", self.features, labels, zero_shot, truth, means_shape) | {
            "features": path_from(self.out, self.features.path),
            "options": [*self.output.options],
            "seconds": self.stages.seconds,
        }

    def save(
        self,
        folder: Path,
        tables: Iterable[pa.Table],
        run: dict[str, Any],
        warnings: list[str],
        tensors: dict[str, torch.Tensor] | None,
    ) -> dict[str, Any]:
        """Write the result's files; run.json, which the first rank alone completes and writes."""
        # All ranks have written their predictions when they say this.
        said = self.ranks.all_gather({"peak": peak_bytes(), "warnings": warnings})
        run["memory"] = run.get("memory", {}) | {"peak": max(found["peak"] for found in said)}
        now = [text for found in said for text in found["warnings"]]
        run["warnings"] = [*dict.fromkeys([*self.output.warnings, *now])]
        if self.ranks.leads:
            run = save_result(folder, tables, run, tensors, csv=self.output.csv)
        return run


@dataclass(frozen=True)
class _Start:
    """Inputs of the fit, checked, and its plan."""

    features: Features  # that are solved: with the head as their prior
    head: FittedHead | None
    problem: Problem
    settings: Settings
    plan: Plan
    truth: np.ndarray | None


def solve_features(
    solving: Solving,
    model: TransCLIP,
    graph: NeighborGraph | GraphSearch,
    *,
    make_head: Callable[[Features], FittedHead] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """
    Solve features by TransCLIP, write the result folder and return its run.json.

    The same call resumes from the graph and the last checkpoint, which are hidden files next to
    the folder until it is complete.

    `graph` has the neighbours, or the search for them; `make_head` fits or reads the head that
    becomes the prior; `quiet` does not print the plan. On ranks other than the first run.json lacks
    what needs the first one's summary.
    """
    with solving.folder() as (folder, warnings):
        with solving.errors():
            start = _prepare(solving, model, graph, make_head)
            if not quiet:
                _say_plan(solving, model, start)
            _fit(solving, model, graph, start)
        problem = start.problem
        labels, before, outlier_score = (
            _of_all_rows(problem, column)
            for column in (model.transduction_, model.zero_shot_labels_, model.outlier_score_)
        )
        compared = labels, before, start.truth
        charged = model.class_costs_ is not None
        run = solving.summary(warnings, *compared, model.means_.shape, charged=charged)
        columns = _columns(problem, outlier_score, solving.output.reject)
        run |= _solver_run(model, graph, start) | {"reject": solving.output.reject}
        for key, name in (("known_labels", "known"), ("rejected", "rejected")):
            run[key] = of_others(name, columns.get(name), *compared)
        tables = _tables(solving.features, model, start.truth, columns)
        with writing(solving.out):
            if problem.exchange is not None:
                write_part(folder, model.rows_.start, tables)
                tables = joined_parts(folder)
            run = solving.save(folder, tables, run, warnings, model.tensors())
    return run


def _prepare(
    solving: Solving,
    model: TransCLIP,
    graph: NeighborGraph | GraphSearch,
    make_head: Callable[[Features], FittedHead] | None,
) -> _Start:
    """Check everything, the same on all ranks, and plan the solve."""
    features = solving.features
    check_same(solving.ranks, {"arrays": json.dumps(features.inputs_sha256(), sort_keys=True)})
    head = make_head(features) if make_head else None
    solved = head.features if head else features
    problem = problem_of(solved, model)
    settings = Settings.resolve(model, problem)
    search = graph.planned if isinstance(graph, GraphSearch) else None
    plan = plan_of(problem, settings, search)
    truth = solving.truth(problem.prior.n_classes)
    return _Start(solved, head, problem, settings, plan, truth)


def _say_plan(solving: Solving, model: TransCLIP, start: _Start) -> None:
    """Print the plan, which needs all ranks."""
    found = outlook(start.problem, model)
    if solving.ranks.leads:
        names = solving.features.class_names
        text = describe_outlook(found, start.problem.prior.n_classes, names)
        session.say(f"{start.plan.line()}\n{text}")


def _fit(
    solving: Solving, model: TransCLIP, graph: NeighborGraph | GraphSearch, start: _Start
) -> None:
    """Solve, from the last checkpoint on."""
    inputs = {"inputs_sha256": start.features.inputs_sha256(), "version": __version__}
    partition = Partition(len(start.problem.features), solving.ranks)

    def checkpoint(name: str, identity: dict[str, Any]) -> Checkpoint:
        return checkpoint_of(solving.out, name, identity | inputs, CHECKPOINT_SECONDS, partition)

    source = solving.source(graph, start.features)
    bar = progress_bar("solve", "rows", shown=solving.ranks.leads)
    with solving.stages.time("solve"), bar as show:
        model.fit_problem(
            start.problem, start.settings, source, progress=shown_on(show), checkpoint=checkpoint
        )


def _columns(
    problem: Problem, outlier_score: np.ndarray, reject: float | None
) -> dict[str, np.ndarray]:
    """Further columns (N,) of the predictions; known rows are never rejected."""
    columns = {"outlier_score": outlier_score}
    known = None if problem.known is None else problem.known.numpy() >= 0
    if known is not None:
        columns["known"] = known
    if reject is not None:
        rejected = rejected_rows(outlier_score, reject)
        columns["rejected"] = rejected if known is None else rejected & ~known
    return columns


def _solver_run(
    model: TransCLIP, graph: NeighborGraph | GraphSearch, start: _Start
) -> dict[str, Any]:
    """Entries of run.json that only TransCLIP has."""
    problem, texts = start.problem, start.features.get("text_features")
    return solver_summary(model) | {
        "graph_sha256": graph.sha256() if isinstance(graph, NeighborGraph) else None,
        "modality_gap": modality_gap(problem.features, texts, problem.exchange),
        "classes_counted_by": counted_by(problem),
        "n_shots": 0 if problem.support is None else len(problem.support),
        "n_validation": 0 if problem.validation is None else len(problem.validation),
        "head": start.head and start.head.summary(start.truth),
        "memory": {"planned": start.plan.peak, "allowed": start.plan.limit},
    }


def _tables(
    features: Features,
    model: TransCLIP,
    truth: np.ndarray | None,
    columns: Mapping[str, np.ndarray],
) -> Iterator[pa.Table]:
    """The predictions of the rows of this rank."""
    rows = model.rows_
    return prediction_tables(
        model.label_distributions_,
        (model.zero_shot_labels_, model.zero_shot_confidences_),
        features,
        None if truth is None else truth[rows],
        first=rows.start,
        columns={
            "calibrated_confidence": model.calibrated_confidences_,
            "neighbors": model.graph_.neighbors,
            **{name: column[rows] for name, column in columns.items()},
        },
    )


def solve_leftovers(out: str) -> Iterator[Path]:
    """The checkpoints and the graph beside a result, which it needs no more once it is whole."""
    for run in range(len(GAMMAS)):
        yield from files(out, f"solve-{run}")
    yield from leftovers(beside(out, "graph"))


def _of_all_rows(problem: Problem, column: np.ndarray) -> np.ndarray:
    """A column (N,) of the rows of all ranks."""
    if problem.exchange is None:
        return column
    found: np.ndarray = problem.exchange.join(torch.from_numpy(column)).numpy()
    return found
