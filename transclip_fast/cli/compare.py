"""`transclip-fast compare`: every method on the same rows and graph, in one table."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np

from transclip_fast.cli import options, session
from transclip_fast.cli.comparison import SUFFIXES, KeptRows, as_text, write_table
from transclip_fast.cli.graph import kept_graph, leftovers, search_of
from transclip_fast.cli.method import (
    FIT_ARRAYS,
    NAMES,
    USED_ARRAYS,
    anchors_option,
    arguments_of,
)
from transclip_fast.cli.solution import check_class_names, true_labels
from transclip_fast.cli.summary import TRANSCLIP
from transclip_fast.data.feature_rows import Rows
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.graph.build import build_graph
from transclip_fast.heads.task import as_fit_arguments
from transclip_fast.methods import METHODS, Method
from transclip_fast.methods.task import Arrays
from transclip_fast.metrics import accuracy, check_class_order
from transclip_fast.progress_bar import progress_bar, shown_on
from transclip_fast.protocols.data import draw_shots, labelled_pools, load_splits
from transclip_fast.solver.layout import peak_bytes, reset_peak
from transclip_fast.solver.prior import LinearPrior
from transclip_fast.store.atomic import beside, locked
from transclip_fast.store.features import Features
from transclip_fast.store.foreign import is_cache
from transclip_fast.store.graphs import load_graph
from transclip_fast.types import NeighborGraph
from transclip_fast.version import __version__

ARRAYS = (*FIT_ARRAYS, "labels", "class_names")
# Options on which a row depends, beside the arrays.
IDENTITY = ("anchors", "gamma", "logit_scale", "device", "search", "index", "recall")


@click.command("compare", cls=options.SectionedCommand)
@click.argument("path", metavar="FEATURES", type=click.Path())
@click.option(
    "--methods",
    metavar="NAME,...",
    help=f"Some of {', '.join(NAMES)}.  [default: all that FEATURES allow]",
)
@click.option(
    "--out",
    type=click.Path(),
    help=f"File of the table, {', '.join(SUFFIXES)}. Methods done earlier are not run again.",
)
@click.option(
    "--shots", type=click.IntRange(min=0), help="Labelled rows drawn of a class.  [default: all]"
)
@click.option("--seed", default=0, help="Of the draw.")
@anchors_option
@click.option("--graph", "graph_folder", type=click.Path(), help="Graph folder of these features.")
@options.search_options
@options.device_option
@options.json_option
@options.array_options(*ARRAYS)
@options.parameter_option("logit_scale")
@options.parameter_option("gamma")
@options.parameter_option("memory")
def command(path: str, methods: str | None, out: str | None, as_json: bool, **values: Any) -> None:
    """Label FEATURES with every method, on the same rows and graph, and show one table.

    FEATURES are those of `solve`, or a folder of the feature folders test/, train/ and val/.
    Settings left open are chosen on the validation rows, over the published grids; the table
    has how many runs that took, and which methods assume that all classes are equally frequent.
    Methods that learn from shots take the texts as shots where there are none; --anchors changes
    that for those that can do otherwise, and the column "text" has what each took.
    Accuracy is of the rows with a true label, "changed" the labels that differ from zero-shot,
    time that of all runs without the graph, and memory the peak of the process.

    With --out, run the same command again after a crash, or with more methods: those that are
    done are kept, in a hidden file beside the table. With many rows and classes name fast methods:
    tim-adm takes 150 passes over the features, alpha-tim and tim-gd 1,000, and validation rows
    multiply all passes by the runs.

    \b
    Examples:
      transclip-fast compare features.npz --out table.md
      transclip-fast compare pets --shots 4 --methods transclip,tim-adm,laplacianshot
    """
    names = _names(methods)
    if out is not None and (Path(out).suffix not in SUFFIXES or Path(out).is_dir()):
        raise InputError(f"{out}: name a file that ends in {', '.join(SUFFIXES)}")
    TransCLIP(**{k: values[k] for k in ("logit_scale", "gamma", "memory")}).check()
    stages, shots = session.Stages(), values["shots"]
    with stages.time("load"), session.collected_warnings({}) as noted:
        arrays = {array: values[array] for array in ARRAYS}
        features = load_splits(path, arrays, shots=shots if is_cache(path) else None)
    if values["gamma"] is not None and features.get("support_features") is None:
        raise InputError("gamma: is the weight of the support, and there is none; leave it out")
    origins = features.origins | {"X": features.origins["image_features"], str(out): str(out)}
    with ExitStack() as stack:
        messages = stack.enter_context(session.collected_warnings(origins))
        if out is not None:
            stack.enter_context(locked(out))
            stack.enter_context(_said_to_resume())
        stack.enter_context(session.errors_about(origins, features.path))
        if shots is not None and not is_cache(path):
            features = drawn(features, shots, values["seed"], messages)
        run = Comparison(features, values, out, stages)
        summary = run.compare(names, named=methods is not None, warnings=messages)
        summary["warnings"] = [*noted, *messages]
        if out is not None:
            write_table(out, summary)
            _remove(leftovers(beside(out, "graph")))
    text = as_text(summary)
    session.print_summary(summary, text if out is None else f"{text}\nwritten to {out}", as_json)


def _names(methods: str | None) -> list[str]:
    """The methods of a list with commas, each once; all without one."""
    if methods is None:
        return list(NAMES)
    names = [name.strip() for name in methods.split(",")]
    for name in names:
        if name not in NAMES:
            raise InputError(f"method {name!r} is not known; choose of {', '.join(NAMES)}")
    return list(dict.fromkeys(names))


@contextmanager
def _said_to_resume() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        click.echo("stopped: the same command goes on from here", err=True)
        raise


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def drawn(features: Features, shots: int, seed: int, warnings: list[str]) -> Features:
    """Features with so many of their labelled rows of each class; 0 for none of them."""
    if features.get("support_features") is None:
        raise InputError("shots: there are no support_features to draw them from")
    labelled = {name for name in FIT_ARRAYS if name != "text_features"}
    kept = {name: array for name, array in features.arrays.items() if name not in labelled}
    if not shots:
        return features.with_arrays(kept)
    n_classes = _arrays(features).n_classes
    pools = labelled_pools(features, features.dim, n_classes)
    if (shortage := pools["support"].shortage(shots)) is not None:
        session.warn(warnings, f"{features.origins['support_features']}: {shortage}")
    rows = draw_shots(pools, shots, seed)
    return features.with_arrays({**kept, **as_fit_arguments(rows, patches=False)})


def _arrays(features: Features) -> Arrays:
    """The checked arrays of every method."""
    found = [features.get(name) for name in ("image_features", *FIT_ARRAYS)]
    X, texts, shots, labels, validation, validation_labels = found
    return Arrays.check(X, texts, (shots, labels), (validation, validation_labels))


@dataclass
class Comparison:
    """Methods on the same rows."""

    features: Features
    values: Mapping[str, Any]
    out: str | None
    stages: session.Stages

    def compare(self, names: list[str], *, named: bool, warnings: list[str]) -> dict[str, Any]:
        """The table as JSON; InputError if one of the `named` methods, or none at all, can run."""
        features, arrays = self.features, _arrays(self.features)
        for array in features.arrays.keys() - USED_ARRAYS:
            session.warn(warnings, f"{array}: no method of a comparison uses it")
        check_class_names(features, arrays.n_classes)
        truth, zero_shot = true_labels(features, arrays.n_classes), self._zero_shot(arrays)
        if truth is not None and zero_shot is not None:
            for sign in check_class_order(zero_shot, truth):
                session.warn(warnings, sign)
        kept, not_run = KeptRows(self.out, self._identity(), warnings), {}
        for name in names:
            if name in kept.rows:
                continue
            try:
                kept.add(name, self._row(name, truth, zero_shot))
            except InputError as error:
                not_run[name] = str(error) if name in str(error) else f"{name}: {error}"
                if named:
                    raise InputError(not_run[name]) from error
        rows = [kept.rows[name] for name in names if name in kept.rows]
        if not rows:
            raise InputError(f"no method can run: {not_run[names[0]]}")
        return {
            "kind": "compare",
            "rows": rows,
            "not_run": not_run,
            "n_queries": len(self._rows),
            "n_classes": arrays.n_classes,
            "dim": features.dim,
            "n_labelled": 0 if truth is None else int((truth >= 0).sum()),
            "n_shots": 0 if arrays.shots is None else len(arrays.shots),
            "n_validation": 0 if arrays.validation is None else len(arrays.validation),
            "options": self._identity(),
            "seconds": self.stages.seconds,
            "versions": session.versions(),
        }

    def _identity(self) -> dict[str, Any]:
        """All that decides a row."""
        graph = self.values["graph_folder"]
        return {
            **{name: self.values[name] for name in IDENTITY},
            "graph_sha256": None if graph is None else self._given_graph.sha256(),
            "inputs_sha256": self.features.inputs_sha256(),
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
        shared = {option: values[option] for option in ("device", "memory", "logit_scale")}
        if name == TRANSCLIP:
            return TransCLIP(gamma=values["gamma"], **shared)
        cls = METHODS[name]
        texts, shots = (
            self.features.get(f"{use}_features") is not None for use in ("text", "support")
        )
        anchors = values["anchors"] if values["anchors"] in cls.kinds else None
        return cls(anchors=anchors or cls.possible_anchors(texts=texts, shots=shots), **shared)

    def _row(
        self, name: str, truth: np.ndarray | None, zero_shot: np.ndarray | None
    ) -> dict[str, Any]:
        """Fit a method: its row of the table."""
        model = self._model(name)
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
        searched = chosen.values
        if isinstance(model, Method):
            searched = {k: v for k, v in searched.items() if k in model.open_settings}
        return {
            "method": name,
            "anchors": self._anchors(model),
            "accuracy": None if truth is None else accuracy(labels, truth),
            "changed": None if zero_shot is None else int((labels != zero_shot).sum()),
            "seconds": round(time.perf_counter() - start, 3),
            "peak_bytes": peak_bytes() if reset else None,
            "chosen": chosen.values,
            "searched": searched if chosen.runs > 1 else {},
            "runs": chosen.runs,
            "n_iter": model.n_iter_,
            "assumes_balanced": isinstance(model, Method) and model.balanced,
        }

    def _anchors(self, model: TransCLIP | Method) -> str:
        """What text means to a method."""
        if isinstance(model, Method):
            return model.anchors
        return "texts" if self.features.get("support_features") is None else "both"
