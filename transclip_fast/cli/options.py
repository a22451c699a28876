"""The options that say what is solved, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import click

from transclip_fast.cli.common import Command
from transclip_fast.device import resolve_device
from transclip_fast.estimator import TransCLIP
from transclip_fast.graph.affinity import GRAPH_MODES
from transclip_fast.ops import BACKENDS
from transclip_fast.solver.layout import FORMS
from transclip_fast.solver.mixture import COVARIANCES
from transclip_fast.store.features import ARRAYS

CHOICES = {
    "covariance": COVARIANCES,
    "graph_mode": GRAPH_MODES,
    "assignments": FORMS,
    "backend": BACKENDS,
}
PARAMETERS = {
    "n_neighbors": "Neighbours of each query in the graph.",
    "max_iter": "Outer steps.",
    "inner_iter": "Sweeps over the assignments in each step.",
    "tol": "Stop when a step changes the objective by less than this, per query.",
    "logit_scale": "Temperature of the text prediction.",
    "kl_weight": "Lambda, the tie to the prior.  [default: 1, few-shot 0.5]",
    "likelihood_weight": "Weight of the mixture.",
    "unit_means": "Keep class means on the unit sphere.",
    "update_means": "Update the means.",
    "update_variance": "Update the variance.",
    "covariance": "Shape of the shared covariance.",
    "graph_mode": "Messages both ways along an edge, or only towards its start.",
    "clamp_similarity": "Edge weights are max(0, cosine).",
    "gamma": "Few-shot: weight of the support.  [default: chosen on the validation set]",
}
COMPUTATION = {
    "assignments": "All classes of a row, or only its largest.",
    "candidates": "Sparse: classes of a row that messages reach.  [default: measured]",
    "rank": "Sparse: classes kept of a row.  [default: as many as candidates]",
    "backend": "Who computes.",
    "memory": "What may be used, as 8GiB.  [default: what is free]",
}


def array_options(command: Command, names: Sequence[str] = ARRAYS[1:]) -> Command:
    """A file for each array of FEATURES, or for some."""
    for name in reversed(names):
        flag = f"--{name.replace('_', '-')}"
        also = " or a text file, one name a line" if name == "class_names" else ""
        text = f"{name} from this array file{also}, not from FEATURES."
        command = click.option(flag, name, type=click.Path(), help=text)(command)
    return command


def parameter_options(command: Command) -> Command:
    """The parameters of TransCLIP."""
    for field in reversed(fields(TransCLIP)):
        help_text = (PARAMETERS | COMPUTATION).get(field.name)
        if help_text is None:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        kind: Any = type(field.default) if field.default is not None else float
        kind = {"candidates": int, "rank": int, "memory": str}.get(field.name, kind)
        if kind is bool:
            flag, kind = f"{flag}/--no-{flag[2:]}", None
        if field.name in CHOICES:
            kind = click.Choice(CHOICES[field.name])
        command = click.option(
            flag,
            field.name,
            default=field.default,
            type=kind,
            show_default=field.default is not None,
            help=help_text,
        )(command)
    return command


def model_of(options: Mapping[str, Any], device: str) -> TransCLIP:
    """The estimator that the parameters ask for, checked."""
    model = TransCLIP(
        device=device, **{name: options[name] for name in (*PARAMETERS, *COMPUTATION)}
    )
    model.check()
    resolve_device(device)
    return model


def requested(model: TransCLIP) -> dict[str, Any]:
    """The parameters as given, before data decided what was left open."""
    return {name: getattr(model, name) for name in PARAMETERS | COMPUTATION if name != "memory"}
