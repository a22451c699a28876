"""The parameters of a fit and their checks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch

from transclip_fast.data.checks import check_number
from transclip_fast.errors import InputError
from transclip_fast.graph.affinity import GRAPH_MODES
from transclip_fast.memory import parse_memory
from transclip_fast.ops import BACKENDS
from transclip_fast.solver.layout import FORMS
from transclip_fast.solver.mixture import COVARIANCES

Model = TypeVar("Model", bound="Parameters")

PRECISIONS = ("float32", "float16")
GAMMAS = (0.002, 0.01, 0.02, 0.2)  # the published grid
MINIMUMS = {"n_neighbors": 1, "max_iter": 0, "inner_iter": 1, "candidates": 1, "rank": 1}
WEIGHTS = ("tol", "logit_scale", "likelihood_weight", "kl_weight", "gamma")
OPTIONAL = ("candidates", "rank", "kl_weight", "gamma")  # None leaves them open
FLAGS = ("unit_means", "update_means", "update_variance", "clamp_similarity", "verbose")
CHOICES: dict[str, tuple[str, ...]] = {
    "covariance": COVARIANCES,
    "graph_mode": GRAPH_MODES,
    "assignments": FORMS,
    "precision": PRECISIONS,
    "backend": BACKENDS,
}


@dataclass(frozen=True)
class Chosen:
    """
    The settings of a fit that were left open: `values` by name, the best of so many `runs`.

    A single run has the published defaults.
    """

    values: dict[str, Any]
    runs: int


@dataclass(kw_only=True, eq=False, repr=False)
class Parameters:
    """The parameters of `transclip_fast.TransCLIP`, which documents each of them."""

    n_neighbors: int = 3
    max_iter: int = 10
    inner_iter: int = 5
    tol: float = 0.0
    logit_scale: float = 100.0
    kl_weight: float | None = None
    likelihood_weight: float = 1 / 50
    unit_means: bool = True
    update_means: bool = True
    update_variance: bool = True
    covariance: str = "diagonal"
    graph_mode: str = "symmetric"
    clamp_similarity: bool = False
    gamma: float | None = None
    class_cost: bool | str = "auto"
    device: str = "auto"
    assignments: str = "auto"
    candidates: int | None = None
    rank: int | None = None
    precision: str = "float32"
    memory: str | int | None = None
    backend: str = "auto"
    verbose: bool = False

    def check(self) -> None:
        """Raise InputError for a value outside its range."""
        values = self.get_params()
        left_open = {name for name in OPTIONAL if values[name] is None}
        for name, minimum in MINIMUMS.items():
            if name not in left_open:
                check_number(name, values[name], minimum)
        for name in WEIGHTS:
            if name not in left_open:
                check_weight(name, values[name])
        check_scale(self.logit_scale)
        for name in FLAGS:
            if not isinstance(values[name], bool | np.bool_):
                raise InputError(f"{name} must be True or False, got {values[name]!r}")
        for name, allowed in CHOICES.items():
            if values[name] not in allowed:
                raise InputError(f"{name} must be one of {allowed}, got {values[name]!r}")
        if self.class_cost != "auto" and not isinstance(self.class_cost, bool | np.bool_):
            raise InputError(f"class_cost must be 'auto', True or False, got {self.class_cost!r}")
        parse_memory(self.memory)
        for name in ("candidates", "rank"):
            if name not in left_open and self.assignments == "dense":
                raise InputError(f"{name}: dense assignments keep every class; leave it out")

    def plain(self) -> Parameters:
        """These parameters, checked, as Python's own numbers and booleans, which JSON takes."""
        values = {field.name: getattr(self, field.name) for field in fields(Parameters)}
        for kind, names in ((int, MINIMUMS), (float, WEIGHTS), (bool, (*FLAGS, "class_cost"))):
            given = (name for name in names if values[name] not in (None, "auto"))
            values |= {name: kind(values[name]) for name in given}
        return Parameters(**values)

    @property
    def form(self) -> str:
        """Form of the assignments as far as the parameters decide it: "auto" otherwise."""
        if self.assignments != "auto":
            return self.assignments
        compiled = self.backend in ("numba", "triton") or self.precision == "float16"
        return "sparse" if compiled or self.candidates or self.rank else "auto"

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Parameters by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def set_params(self: Model, **params: Any) -> Model:
        """Set parameters by name."""
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                own = type(self).__name__
                raise ValueError(f"{own} has no parameter {name!r}; it has {', '.join(known)}")
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        # Imported when scikit-learn, which is no dependency, asks for them.
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=False),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(),
        )

    def __repr__(self) -> str:
        changed = (f for f in fields(self) if getattr(self, f.name) != f.default)
        values = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in changed)
        return f"{type(self).__name__}({values})"


def check_scale(logit_scale: float) -> None:
    """Raise InputError if a logit scale makes all classes equally likely."""
    if logit_scale == 0:
        raise InputError("logit_scale must be greater than 0: at 0 all classes are equally likely")


def check_weight(name: str, value: object) -> None:
    """Raise InputError unless a parameter is a number >= 0 that float32 can hold."""
    if not isinstance(value, Real) or not 0 <= float(value) <= torch.finfo(torch.float32).max:
        raise InputError(f"{name} must be a finite number >= 0, got {value!r}")
