"""The parameters of the method."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real

import torch

from transclip_fast.errors import InputError
from transclip_fast.graph.affinity import GRAPH_MODES
from transclip_fast.solver.mixture import COVARIANCES

FLAGS = (
    "unit_means",
    "update_means",
    "update_variance",
    "clamp_similarity",
    "published_support_rows",
)


@dataclass(kw_only=True)
class Parameters:
    """
    The parameters of the method; the defaults reproduce the published results.

    Parameters
    ----------
    n_neighbors : int
        k, neighbours of each query in the graph.
    max_iter : int
        Outer steps: assignments, means, variance. One last update of z follows them.
    inner_iter : int
        Sweeps over the assignments in each step.
    tol : float
        Stop when a step changes the objective by less than `tol` per query; 0 takes every step.
    logit_scale : float
        tau, the temperature of the text prediction.
    kl_weight : float, optional
        lambda; 1 zero-shot and 0.5 few-shot where it is not given.
    likelihood_weight : float
        Weight of the mixture term.
    unit_means, update_means, update_variance : bool
        Keep the means on the unit sphere; update them at all; update the variance.
    covariance : {"diagonal", "isotropic"}
    graph_mode : {"symmetric", "directed"}
        Messages through (W + W^T) / 2k, or through W / k.
    clamp_similarity : bool
        Edge weights are max(0, cosine).
    published_support_rows : bool
        Few-shot: repeat two errors of the published code in the graph, to compare with its
        results; see `transclip_fast.solver.support.Support.published`.
    """

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
    published_support_rows: bool = False

    def check(self) -> None:
        """Raise InputError for a value outside its range."""
        for name, least in (("n_neighbors", 1), ("max_iter", 0), ("inner_iter", 1)):
            check_number(name, getattr(self, name), least)
        for name in ("tol", "logit_scale", "likelihood_weight"):
            check_weight(name, getattr(self, name))
        if self.kl_weight is not None:
            check_weight("kl_weight", self.kl_weight)
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, allowed in (("covariance", COVARIANCES), ("graph_mode", GRAPH_MODES)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.published_support_rows and self.graph_mode != "symmetric":
            raise InputError("published_support_rows needs graph_mode='symmetric'")


def check_number(name: str, value: object, least: int) -> None:
    """Raise InputError unless a parameter is a whole number of at least that."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"{name} must be a whole number >= {least}, got {value!r}")


def check_weight(name: str, value: object) -> None:
    """Raise InputError unless a parameter is a number >= 0 that float32 can hold."""
    if not isinstance(value, Real) or not 0 <= float(value) <= torch.finfo(torch.float32).max:
        raise InputError(f"{name} must be a finite number >= 0, got {value!r}")
