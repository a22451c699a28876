"""Methods on the same rows and graph: a fit for each row of a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from transclip_fast.cli import session
from transclip_fast.cli.comparison_table import KIND, KeptTable
from transclip_fast.cli.graph import index_file, kept_graph, search_of
from transclip_fast.cli.method import (
    FOR_ALL,
    NAMES,
    USED_ARRAYS,
    arguments_of,
    checked_arrays,
    make_method,
)
from transclip_fast.cli.truth import check_class_names, true_labels
from transclip_fast.data.feature_rows import Rows
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.graph.build import build_graph
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.memory import peak_bytes, reset_peak
from transclip_fast.methods import METHODS, Method
from transclip_fast.methods.task import Arrays
from transclip_fast.metrics import accuracy, check_class_order
from transclip_fast.progress_bar import progress_bar, shown_on
from transclip_fast.solver.prior import LinearPrior
from transclip_fast.store.atomic import beside
from transclip_fast.store.features import Features
from transclip_fast.store.graphs import load_graph
from transclip_fast.store.results import TRANSCLIP
from transclip_fast.version import __version__

# Options on which all rows depend, beside the arrays; a row has its anchors. Not --memory: who
# allows more for a method that was refused keeps the rows of the others.
IDENTITY = ("gamma", "logit_scale", "device", "search", "index", "recall")


@dataclass
class Comparison:
    """Methods on the same rows."""

    features: Features
    values: Mapping[str, Any]
    out: str | None
    stages: session.Stages

    def compare(self, names: list[str], *, named: bool, warnings: list[str]) -> dict[str, Any]:
        """The table as JSON; InputError if one of the `named` methods, or none at all, can run."""
        features, arrays = self.features, checked_arrays(self.features)
        for array in features.arrays.keys() - USED_ARRAYS:
            session.warn(warnings, f"{array}: no method of a comparison uses it")
        check_class_names(features, arrays.n_classes)
        truth, zero_shot = true_labels(features, arrays.n_classes), self._zero_shot(arrays)
        if truth is not None and zero_shot is not None:
            for sign in check_class_order(zero_shot, truth):
                session.warn(warnings, sign)
        kept, not_run = KeptTable(self.out, self._identity(), warnings), {}
        for name in names:
            try:
                model, row = self._model(name), kept.rows.get(name)
                if row is None or row["anchors"] != self._anchors(model):
                    kept.add(name, self._row(name, model, truth, zero_shot))
            except InputError as error:
                not_run[name] = str(error) if name in str(error) else f"{name}: {error}"
                if named:
                    raise InputError(not_run[name]) from error
        shown = dict.fromkeys([*names, *NAMES])  # those asked for, and others that are kept
        rows = [kept.rows[name] for name in shown if name in kept.rows]
        if not rows:
            raise InputError(f"no method can run: {not_run[names[0]]}")
        return {
            "kind": KIND,
            "rows": rows,
            "not_run": not_run,
            "n_queries": len(self._rows),
            "n_classes": arrays.n_classes,
            "dim": features.dim,
            "n_labelled": 0 if truth is None else int((truth >= 0).sum()),
            "n_shots": 0 if arrays.shots is None else len(arrays.shots),
            "n_validation": 0 if arrays.validation is None else len(arrays.validation),
            "options": {"anchors": self.values["anchors"], **self._identity()},
            "seconds": self.stages.seconds,
            "versions": session.versions(),
        }

    def _identity(self) -> dict[str, Any]:
        """All that decides a row."""
        graph = self.values["graph_folder"]
        return {
            **{name: self.values[name] for name in IDENTITY},
            "index_file": index_file(self.values["index"]),
            "graph_sha256": None if graph is None else self._given_graph.sha256(),
            "inputs_sha256": self.features.inputs_sha256(),
            "maps": self.features.maps,
            "version": __version__,
        }

    @cached_property
    def _rows(self) -> Rows:
        """The features, checked."""
        return Rows(self.features.get("image_features"), "X")

    def _zero_shot(self, arrays: Arrays) -> np.ndarray | None:
        """The labels (N,) of the texts."""
        if arrays.texts is None:
            return None
        prior = LinearPrior.from_prototypes(arrays.texts, self.values["logit_scale"])
        return prior.predict(self._rows)[0]

    @cached_property
    def _given_graph(self) -> NeighborGraph:
        return load_graph(self.values["graph_folder"], self.features.sha256())

    @cached_property
    def _graph(self) -> NeighborGraph:
        """The graph of all methods, with as many neighbours as any of them may need."""
        if self.values["graph_folder"] is not None:
            return self._given_graph
        searched = self.features.get("validation_features") is not None
        needed = [cls().neighbors_needed(searched=searched) for cls in METHODS.values()]
        search = search_of(self.values, max(TransCLIP.n_neighbors, *needed))
        if self.out is not None:
            folder = beside(self.out, "graph")
            return kept_graph(folder, self.features, search, self.stages, self._rows)
        with self.stages.time("graph"), progress_bar("graph", "rows") as show:
            return build_graph(self._rows, progress=show, **vars(search))

    def _model(self, name: str) -> TransCLIP | Method:
        """The method of that name."""
        values = self.values
        if name == TRANSCLIP:
            return TransCLIP(**{option: values[option] for option in ("gamma", *FOR_ALL)})
        anchors = values["anchors"] if values["anchors"] in METHODS[name].kinds else None
        return make_method(name, anchors, values, self.features)

    def _row(
        self,
        name: str,
        model: TransCLIP | Method,
        truth: np.ndarray | None,
        zero_shot: np.ndarray | None,
    ) -> dict[str, Any]:
        """Fit a method: its row of the table."""
        if isinstance(model, TransCLIP) or model.neighbors_needed(searched=False):
            self._graph  # noqa: B018  # made once, outside of the time of a method
        reset, start = reset_peak(), time.perf_counter()
        with self.stages.time("methods"), progress_bar(name, "steps") as show:
            report: Callable[..., None] = show
            if isinstance(model, TransCLIP):
                report = shown_on(show)
            with arguments_of(self.features, self._rows) as arguments:
                model.fit(**arguments, graph=lambda rows: self._graph, progress=report)
        labels, chosen = model.transduction_, model.chosen_
        searched = {}  # what depends on the shots and the validation rows
        if isinstance(model, TransCLIP) and model.gamma_ is not None:
            searched = {"gamma": model.gamma_}
        elif isinstance(model, Method) and chosen.runs > 1:
            searched = {name: chosen.values[name] for name in model.open_settings}
        return {
            "method": name,
            "anchors": self._anchors(model),
            "accuracy": None if truth is None else accuracy(labels, truth),
            "changed": None if zero_shot is None else int((labels != zero_shot).sum()),
            "seconds": round(time.perf_counter() - start, 3),
            "peak_bytes": peak_bytes() if reset else None,
            "chosen": chosen.values,
            "searched": searched,
            "runs": chosen.runs,
            "n_iter": model.n_iter_,
            "assumes_balanced": isinstance(model, Method) and model.assumes_balanced,
        }

    def _anchors(self, model: TransCLIP | Method) -> str:
        """The anchors of a method; of TransCLIP its texts, or these and the shots."""
        if isinstance(model, Method):
            return model.anchors
        return "texts" if self.features.get("support_features") is None else "both"
