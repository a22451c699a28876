"""The click options that commands share."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from fractions import Fraction
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from transclip_fast.device import resolve_device
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.graph.build import SEARCHES
from transclip_fast.solver.parameters import CHOICES

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
THOUSANDS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
POSITIVE = click.IntRange(min=1)
PATH = click.Path(readable=False)  # why a file cannot be read is known, in one line, on reading it
FILE_OR_NAME = ("index", "head", "pretrained")  # options that take a file, too

ARRAYS = {
    "text_features": "Text embeddings (K, d), or of several templates (P, K, d).",
    "labels": "True labels (N,), to report the accuracy: positions or class names, in a .npy, "
    ".csv, .parquet or .txt (one a line); a column key, path or row tells the rows.",
    "class_names": "Class names (K,): a .txt (one a line), .json, .csv, .parquet or .npy.",
    "keys": "Names of the rows (N,), such as paths of the images: a .txt (one a line), .csv, "
    ".parquet or .npy.",
    "support_features": "Labelled rows (M, d): few-shot.",
    "support_labels": "Their labels (M,), in a file as of --labels.",
    "validation_features": "Labelled rows (V, d) that choose hyperparameters.",
    "validation_labels": "Their labels (V,), in a file as of --labels.",
    "known_labels": "Classes (N,) of FEATURES' rows where they are known, in a file as of "
    "--labels; -1 or nothing elsewhere.",
    "prior": "Probabilities (N, K) of another method.",
    "prior_logits": "Logits (N, K) of another method.",
    "prototypes": "Class prototypes (K, d) of another method.",
}
PARAMETERS = {
    "n_neighbors": "Neighbours of each query in the graph.",
    "max_iter": "Outer steps.",
    "inner_iter": "Sweeps over the assignments in each step.",
    "tol": "Stop when a step changes the objective by less than this, per query.",
    "logit_scale": "CLIP's logit scale, 1 / temperature: cosines are multiplied by it.",
    "kl_weight": "Lambda, the weight of the KL term to the prior.  [default: 1, few-shot 0.5]",
    "likelihood_weight": "Weight of the mixture.",
    "unit_means": "Keep class means on the unit sphere.",
    "update_means": "Update the means.",
    "update_variance": "Update the variance.",
    "covariance": "Shape of the shared covariance.",
    "graph_mode": "Messages both ways along an edge, or only towards its start.",
    "clamp_similarity": "Edge weights are max(0, cosine).",
    "gamma": "Few-shot: weight of the support.  [default: chosen on the validation rows; without "
    "any 0.00125 for each shot of a class]",
    "class_cost": "Charge for each class in use: auto where few of the classes seem to occur.",
}
COMPUTATION = {
    "assignments": "dense keeps every class of a row, sparse the likeliest.",
    "candidates": "Sparse: classes of a row that messages reach.  [default: measured]",
    "rank": "Sparse: classes kept of a row.  [default: as many as candidates]",
    "backend": "Library that computes.",
    "memory": "Most memory that the process may use (on a GPU: GPU memory), as 8GiB.  [default: "
    "what is free]",
}
TYPES = {"kl_weight": float, "gamma": float, "candidates": int, "rank": int, "memory": str}
ESTIMATOR = PARAMETERS | COMPUTATION  # all but the device


class AutoSwitch(click.Choice):  # type: ignore[type-arg]
    """A parameter that is "auto", True or False."""

    def __init__(self) -> None:
        super().__init__(["auto", "on", "off"])

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> bool | str:
        choice: str = super().convert(value, param, ctx)
        return choice if choice == "auto" else choice == "on"


class CountType(click.ParamType):  # type: ignore[type-arg]
    """A positive number as people write large ones: 10000000, 10,000,000 or 10M."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).replace(",", "").replace("_", "")
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kKMG]?)", text, re.ASCII)
        number = Fraction(found[1]) * THOUSANDS[found[2].upper()] if found else Fraction(0)
        if number < 1 or number.denominator != 1:
            self.fail(f"{value!r} is no number of them; write 10000000, 10,000,000 or 10M")
        return int(number)


class FiniteRange(click.FloatRange):
    """A range that has neither NaN, which click takes to be in any, nor infinity."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        found: float = super().convert(value, param, ctx)
        if not math.isfinite(found):
            share = f"a share between {self.min:g} and {self.max:g}" if self.max else None
            what = f"must be {share or 'a finite number'}, got {value}"
            raise InputError(what if param is None else f"{param.opts[0]}: {what}")
        return found


class SeedType(click.ParamType):  # type: ignore[type-arg]
    """A number that every source of random numbers takes."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number: int = click.INT.convert(value, param, ctx)
        if not 0 <= number < 2**63:
            self.fail(f"{value!r} is no seed; they are whole numbers from 0 to 2**63 - 1")
        return number


COUNT = CountType()
SEED = SeedType()


def options_of(*options: Callable[..., Any]) -> Callable[[Decorated], Decorated]:
    """A decorator that adds options to a command, in this order."""

    def add(command: Decorated) -> Decorated:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def array_options(*names: str) -> Callable[[Decorated], Decorated]:
    """A file for each of these arrays of FEATURES."""
    return options_of(
        *(
            click.option(flag_of(name), type=PATH, metavar="FILE", help=ARRAYS[name])
            for name in names
        )
    )


def parameter_option(name: str) -> Callable[[Decorated], Decorated]:
    """A parameter of TransCLIP, with its default."""
    default, flag = inspect.signature(TransCLIP).parameters[name].default, flag_of(name)
    kind: Any = TYPES[name] if default is None else type(default)
    if name in CHOICES:
        kind = click.Choice(CHOICES[name])
    elif default == "auto":
        kind = AutoSwitch()
    elif kind is bool:
        flag, kind = f"{flag}/--no-{flag[2:]}", None
    return click.option(flag, name, default=default, type=kind, help=ESTIMATOR[name])


def flag_of(name: str) -> str:
    """The option for a parameter."""
    return f"--{name.replace('_', '-')}"


parameter_options = options_of(*map(parameter_option, ESTIMATOR))
out_option = click.option(
    "--out",
    required=True,
    type=PATH,
    help="Folder to write. An earlier result is replaced, a killed run resumed.",
)
tensors_out_option = click.option(
    "--out", required=True, type=PATH, help="The .safetensors file to write."
)
graph_option = click.option(
    "--graph", "graph_folder", type=PATH, help="Graph folder of these features."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the summary as JSON on standard output."
)
csv_option = click.option(
    "--csv",
    is_flag=True,
    help="Also write predictions.csv, without the lists; ' goes before what spreadsheets run.",
)
sort_option = click.option(
    "--sort-into",
    type=PATH,
    help="Also write a folder for each class with links to its images, copies of those in tars.",
)


reject_option = click.option(
    "--reject",
    type=FiniteRange(0, 1),
    help="Share of the rows to mark as none of the classes: those with the highest outlier score.",
)
device_option = click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
search_options = options_of(
    click.option(
        "--search",
        default="auto",
        type=click.Choice(SEARCHES),
        help="How neighbours are searched; auto is exact up to 20,000 rows, on a GPU 1,500,000.",
    ),
    click.option(
        "--index",
        metavar="FILE|FACTORY",
        help="FAISS index of the same rows, or a factory string such as IVF1024,Flat.",
    ),
    click.option(
        "--recall",
        default=0.99,
        type=FiniteRange(0, 1),
        help="Least recall of an approximate graph, measured on 1,000 rows.",
    ),
)
shots_option = click.option(
    "--shots", type=int, help="Which support of a folder of caches; 0 for none."
)
text_map_option = click.option(
    "--text-map", type=PATH, help="Matrix (d, d) that maps the text features."
)
image_map_option = click.option(
    "--image-map",
    type=PATH,
    help="Matrix (d, d) that maps the image features; `predict` needs that of the solve.",
)


def model_of(options: Mapping[str, Any]) -> TransCLIP:
    """The estimator with these options as its parameters, checked."""
    model = TransCLIP(**{name: options[name] for name in ("device", *ESTIMATOR)})
    model.check()
    resolve_device(model.device)
    return model


def requested(model: TransCLIP) -> dict[str, Any]:
    """The parameters but memory, before data decide those left open."""
    return {name: getattr(model, name) for name in ESTIMATOR if name != "memory"}


def path_from(folder: str, path: str) -> str:
    """A path relative to a folder, so that both can move together."""
    above, name = os.path.split(path)  # a link's own name: its target may lack the suffix
    return os.path.relpath(os.path.join(os.path.realpath(above), name), os.path.realpath(folder))


def is_given(option: click.Parameter) -> bool:
    """Whether the command was given this option or argument."""
    source = click.get_current_context().get_parameter_source(str(option.name))
    return source is ParameterSource.COMMANDLINE


def refuse_unused(names: Collection[str], why: str) -> None:
    """Raise InputError if the command was given one of these, which it would ignore."""
    for option in click.get_current_context().command.params:
        if option.name in names and is_given(option):
            argument = isinstance(option, click.Argument)
            shown = option.human_readable_name if argument else option.opts[0]
            raise InputError(f"{shown}: {why}; leave it out")


def _is_path(name: str, value: Any) -> bool:
    """Whether the value of an option that takes a name, too, is a file or a model's folder."""
    from transclip_fast.encode.architectures import FOLDER_CONFIG  # needs pyarrow

    if name == "model":
        return os.path.isfile(os.path.join(value, FOLDER_CONFIG))
    return name in FILE_OR_NAME and os.path.isfile(value)


def given_options(out: str, names: Collection[str]) -> Iterator[dict[str, str]]:
    """
    Those of the options with these names that the command was given, for run.json.

    Each has its flag, and a "value"; or a "file", relative to the folder `out`.
    """
    context = click.get_current_context()
    for option in context.command.params:
        name = str(option.name)
        if not is_given(option) or not isinstance(option, click.Option) or name not in names:
            continue
        value = context.params[name]
        if option.is_flag:
            yield {"option": (option.opts if value else option.secondary_opts)[0]}
            continue
        for one in value if option.multiple else [value]:
            if option.type is PATH or _is_path(name, one):
                yield {"option": option.opts[0], "file": path_from(out, one)}
            else:
                text = ("on" if one else "off") if isinstance(one, bool) else str(one)
                yield {"option": option.opts[0], "value": text}
