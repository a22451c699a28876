"""`solve --method`: another method of the literature instead of TransCLIP."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

from transclip_fast.cli import options, session
from transclip_fast.cli.class_outlook import describe_changes
from transclip_fast.cli.graph import GraphSearch, describe
from transclip_fast.cli.session import counted
from transclip_fast.cli.solution import Solving
from transclip_fast.cli.summary import (
    describe_accuracy,
    describe_files,
    describe_sizes,
    modality_gap,
)
from transclip_fast.data.checks import unread_matrix
from transclip_fast.data.feature_rows import Rows
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.methods import METHODS, Method
from transclip_fast.methods.task import ANCHORS, Arrays
from transclip_fast.progress_bar import progress_bar
from transclip_fast.solver.prior import LinearPrior
from transclip_fast.store.atomic import writing
from transclip_fast.store.features import LABELLED, Features
from transclip_fast.store.results import TRANSCLIP, prediction_tables

NAMES = (TRANSCLIP, *METHODS)
FOR_ALL = ("device", "memory", "logit_scale")  # options that every method takes
# Of `solve`, what is there for every method.
SHARED = {
    *("path", "out", "method", "anchors", "settings", "graph_folder", "search", "index", "recall"),
    *FOR_ALL,
    *("csv", "as_json", "shots", "text_map", "image_map"),
}
METHOD_ARRAYS = ("text_features", *LABELLED)
USED_ARRAYS = {*METHOD_ARRAYS, "image_features", "labels", "class_names", "keys"}

anchors_option = click.option(
    "--anchors",
    type=click.Choice(ANCHORS),
    help="What methods other than transclip learn classes from: shots, texts as shots, or both; "
    "probabilities, softmax(30 x T'), of all rows.  [default: as published; texts without shots]",
)
method_options = options.options_of(
    click.option(
        "--method", default=TRANSCLIP, type=click.Choice(NAMES), help="Method that labels the rows."
    ),
    anchors_option,
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="NAME=VALUE",
        help="A setting of a method other than transclip; others are chosen on validation rows, or "
        "as published.",
    ),
)


def method_of(values: Mapping[str, Any], features: Features) -> Method | None:
    """
    The method that the options of `solve` name, None for TransCLIP.

    InputError if it would have to ignore options, settings or arrays.
    """
    name, context = values["method"], click.get_current_context()
    if name == TRANSCLIP:
        for option in ("anchors", "settings"):
            if values[option]:
                flag = "--set" if option == "settings" else "--anchors"
                raise InputError(f"{flag} is for methods other than {TRANSCLIP}; leave it out")
        return None
    for parameter in context.command.params:
        if options.is_given(parameter) and parameter.name not in SHARED | USED_ARRAYS:
            raise InputError(f"{parameter.opts[0]} is for method {TRANSCLIP}, not for {name}")
    for array in features.arrays:
        if array not in USED_ARRAYS:
            raise InputError(f"{array}: method {name} takes none; leave it out")
    settings = _settings(values["settings"])
    if twice := settings.keys() & {"anchors", *FOR_ALL}:
        flag = options.flag_of(min(twice))
        raise InputError(f"--set {min(twice)}: is no setting; the option for it is {flag}")
    return make_method(name, values["anchors"], values, features, **settings)


def make_method(
    name: str,
    anchors: str | None,
    values: Mapping[str, Any],
    features: Features,
    /,  # a user may call a setting anything
    **settings: Any,
) -> Method:
    """A method with the options `FOR_ALL`; its anchors are by default those that features allow."""
    texts, shots = (features.get(f"{use}_features") is not None for use in ("text", "support"))
    anchors = anchors or METHODS[name].possible_anchors(texts=texts, shots=shots)
    shared: dict[str, Any] = {option: values[option] for option in FOR_ALL}
    return METHODS[name](anchors=anchors, **shared, **settings)


def neighbors_of(model: Method | TransCLIP, features: Features) -> int:
    """Neighbours of a row that the model needs in its graph; 0 if it needs none."""
    if isinstance(model, TransCLIP):
        return model.n_neighbors
    return model.neighbors_needed(searched=features.get("validation_features") is not None)


def _settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """The settings of NAME=VALUE, by name."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = None
        if not equals or number is None:
            raise InputError(f"--set {pair}: expected NAME=VALUE with a number")
        if name in found:
            raise InputError(f"--set {pair}: {name} is set twice")
        found[name] = int(number) if number.is_integer() else number
    return found


def checked_arrays(features: Features) -> Arrays:
    """The checked arrays of every method."""
    found = [features.get(name) for name in ("image_features", *METHOD_ARRAYS)]
    X, texts, shots, labels, validation, validation_labels = found
    return Arrays.check(X, texts, (shots, labels), (validation, validation_labels))


@contextmanager
def arguments_of(features: Features, rows: Rows) -> Iterator[dict[str, Any]]:
    """The arguments of a method's `fit`; `rows` are the features, with their warnings given."""
    X = rows[:] if rows.held else features.get("image_features")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "X: .* rows were not unit vectors")
        yield {"X": X, **{name: features.get(name) for name in METHOD_ARRAYS}}


def solve_with_method(
    solving: Solving, method: Method, graph: NeighborGraph | GraphSearch
) -> dict[str, Any]:
    """
    Label features, write the result folder, without a mixture, and return its run.json.

    Without texts the zero-shot columns have the nearest mean of the shots.
    """
    features = solving.features
    with solving.folder() as (folder, messages):
        with solving.errors():
            rows = Rows(features.get("image_features"), "X")
            arrays = checked_arrays(features)
            truth = solving.truth(arrays.n_classes)
            used = _fit(solving, method, graph, rows)
        prototypes = arrays.prototypes
        zero_shot = LinearPrior.from_prototypes(prototypes, method.logit_scale).predict(rows)
        if arrays.texts is None:
            text = "text_features: none; zero-shot here is the nearest mean of the shots"
            session.warn(messages, text)
        compared = method.transduction_, zero_shot[0], truth
        run = solving.summary(messages, *compared, tuple(prototypes.shape))
        run |= {
            "method": method.name,
            "anchors": method.anchors,
            "chosen": method.chosen_.values,
            "runs": method.chosen_.runs,
            "assumes_balanced": method.assumes_balanced,
            "zero_shot_from": "shots" if arrays.texts is None else "texts",
            "modality_gap": modality_gap(
                unread_matrix(features.get("image_features"), "X"), arrays.texts
            ),
            "n_iter": method.n_iter_,
            "graph": None if used is None else {"n_neighbors": used.n_neighbors, **used.info},
            "config": {"method": method.name, "anchors": method.anchors, **method.chosen_.values},
        }
        columns = {} if used is None else {"neighbors": used.neighbors}
        tables = prediction_tables(
            method.label_distributions_, zero_shot, features, truth, columns=columns
        )
        with writing(solving.out):
            run = solving.save(folder, tables, run, messages, None)
    return run


def _fit(
    solving: Solving, method: Method, graph: NeighborGraph | GraphSearch, rows: Rows
) -> NeighborGraph | None:
    """Fit the method to rows; the graph that it asked for."""
    source, used = solving.source(graph, solving.features), []

    def recorded(rows: Rows) -> NeighborGraph:
        used.append(source(rows))
        return used[0]

    with (
        solving.stages.time("solve"),
        progress_bar(method.name, "steps") as show,
        arguments_of(solving.features, rows) as arguments,
    ):
        method.fit(**arguments, graph=recorded, progress=show)
    return used[0] if used else None


def describe_result(run: Mapping[str, Any], out: str) -> str:
    """The run.json of `solve_with_method` as text."""
    settings = ", ".join(f"{name} {value:g}" for name, value in run["chosen"].items())
    tried = (
        f"the best of {counted(run['runs'], 'run')}" if run["runs"] > 1 else "as set or published"
    )
    before = "zero-shot" if run["zero_shot_from"] == "texts" else "the nearest mean of the shots"
    lines = [
        describe_sizes(run),
        f"{run['method']} from {run['anchors']}" + (f": {settings}, {tried}" if settings else ""),
        f"{counted(run['n_flipped'], 'label')} changed from {before}",
        *describe_changes(run),
    ]
    if run["assumes_balanced"]:
        lines.append(f"{run['method']} assumes equally many images of every class")
    if run["accuracy"] is not None:
        lines.append(describe_accuracy(run, before))
    if run["graph"] is not None:
        lines.append(f"graph {describe(run['graph'])}")
    lines += [f"solve {run['seconds']['solve']:.1f} s", describe_files(out)]
    return "\n".join(lines)
