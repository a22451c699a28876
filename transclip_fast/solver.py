"""
TransCLIP's block majorise-minimise solver (Zanella, Gerin, Ben Ayed, NeurIPS 2024).

Three blocks in turn, each in closed form: the assignments z, the means mu, the variance sigma^2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from transclip_fast import ops
from transclip_fast.assignments import Assignments
from transclip_fast.device import exact_float32
from transclip_fast.errors import InputError
from transclip_fast.graph import Affinity, NeighborGraph, affinity
from transclip_fast.graph.affinity import GRAPH_MODES
from transclip_fast.mixture import COVARIANCES, Mixture, Moments
from transclip_fast.objective import objective
from transclip_fast.prior import Prior
from transclip_fast.support import Support

# The likelihood term of M shots, relative to that of N queries, is 50 gamma N / M.
SUPPORT_SCALE = 50.0


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

    def check(self) -> None:
        """Raise InputError for a value outside its range."""
        for name, least in (("n_neighbors", 1), ("max_iter", 0), ("inner_iter", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise InputError(f"{name} must be a whole number >= {least}, got {value!r}")
        for name in ("tol", "logit_scale", "likelihood_weight"):
            check_weight(name, getattr(self, name))
        if self.kl_weight is not None:
            check_weight("kl_weight", self.kl_weight)
        for name in ("unit_means", "update_means", "update_variance", "clamp_similarity"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, allowed in (("covariance", COVARIANCES), ("graph_mode", GRAPH_MODES)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")


def check_weight(name: str, value: object) -> None:
    """Raise InputError unless a parameter is a number >= 0 that float32 can hold."""
    if not isinstance(value, Real) or not 0 <= float(value) <= torch.finfo(torch.float32).max:
        raise InputError(f"{name} must be a finite number >= 0, got {value!r}")


@dataclass(frozen=True)
class Progress:
    """State after an outer step: its number, the last one's, the objective per query."""

    step: int
    last: int
    objective: float


@dataclass(frozen=True)
class Solution:
    """Assignments, fitted mixture, outer steps taken, and L after each step and at the end."""

    assignments: Assignments
    mixture: Mixture
    n_iter: int
    objective: list[float]


def solve(
    features: torch.Tensor,
    prior: Prior,
    graph: NeighborGraph,
    parameters: Parameters,
    *,
    kl_weight: float,
    support: Support | None = None,
    gamma: float = 0.0,
    progress: Callable[[Progress], None] | None = None,
) -> Solution:
    """
    Classify all queries jointly.

    Parameters
    ----------
    features : Tensor (N, d) float32
        Unit rows, on the device that does the work.
    prior : Prior
        y_hat, on the same device.
    graph : NeighborGraph
        Lists of k neighbours of the N rows.
    kl_weight : float
        lambda.
    support : Support, optional
        Labelled rows, weighted by `gamma`.
    progress : callable, optional
        Called after every outer step.
    """
    with exact_float32():
        run = _Run(features, prior, graph, parameters, kl_weight, support, gamma)
        history: list[float] = []
        n_iter = 0
        for n_iter in range(1, parameters.max_iter + 1):
            run.update_assignments()
            run.update_means()
            run.update_variance()
            history.append(run.objective())
            if progress is not None:
                progress(Progress(n_iter, parameters.max_iter, history[-1] / len(features)))
            if len(history) > 1 and abs(history[-1] - history[-2]) < parameters.tol * len(features):
                break
        run.update_assignments()
        history.append(run.objective())
    return Solution(run.z, run.mixture, n_iter, history)


class _Run:
    """z, mu and sigma^2 on their way, and the three block updates."""

    def __init__(
        self,
        features: torch.Tensor,
        prior: Prior,
        graph: NeighborGraph,
        parameters: Parameters,
        kl_weight: float,
        support: Support | None,
        gamma: float,
    ) -> None:
        self.features, self.prior, self.parameters = features, prior, parameters
        self.kl_weight, self.support = kl_weight, support
        self.support_weight = SUPPORT_SCALE * gamma / support.n_rows if support else 0.0  # w
        self.affinity: Affinity = affinity(
            graph,
            mode=parameters.graph_mode,
            clamp_similarity=parameters.clamp_similarity,
            device=features.device,
        )
        log_prior, self.prior_normaliser = prior.evaluate(features)
        self.mixture = Mixture.start(log_prior, features, support.moments if support else None)
        self.z = Assignments(log_prior.exp())
        del log_prior  # (N, K), of which there are three at most
        self.spare = self.z.empty_like()  # the Jacobi sweep writes here, then the two swap
        self.base = torch.empty_like(self.z.dense())
        self.squares = ops.sum_of_squares(features)
        self.moments: Moments  # of the z that update_assignments leaves

    def update_assignments(self) -> None:
        """z <- softmax_k(likelihood_weight g + A z + lambda log y_hat), several sweeps."""
        base = linear_score(
            self.features,
            self.mixture,
            self.prior,
            likelihood_weight=self.parameters.likelihood_weight,
            kl_weight=self.kl_weight,
            out=self.base,
        )
        if self.support is not None:
            self.support.add_messages(base)
        for _ in range(self.parameters.inner_iter):
            new = ops.sweep(base, self.affinity, self.z, out=self.spare)
            self.z, self.spare = new, self.z
        self.moments = Moments.of(self.z, self.features, self.squares)

    def update_means(self) -> None:
        """mu_k <- unit(Z^T F / N + w Y^T S)."""
        if self.parameters.update_means:
            self.mixture = self.mixture.update_means(
                self._pooled(), unit=self.parameters.unit_means
            )

    def update_variance(self) -> None:
        """sigma^2 <- the mean squared distance to the new means, under the new z."""
        if self.parameters.update_variance:
            self.mixture = self.mixture.update_variance(
                self._pooled(), covariance=self.parameters.covariance
            )

    def objective(self) -> float:
        """L at the present z, mu and sigma^2."""
        return objective(
            self.z,
            self.mixture,
            self.moments,
            self.affinity,
            self.prior,
            self.prior_normaliser,
            likelihood_weight=self.parameters.likelihood_weight,
            kl_weight=self.kl_weight,
            support=self.support,
            support_weight=self.support_weight * len(self.features),
        )

    def _pooled(self) -> Moments:
        """Moments of queries and support together, the queries' mass being 1."""
        pooled = self.moments * (1 / len(self.features))
        return pooled + self.support.moments * self.support_weight if self.support else pooled


def predict(
    features: torch.Tensor,
    mixture: Mixture,
    prior: Prior,
    *,
    likelihood_weight: float,
    kl_weight: float,
) -> torch.Tensor:
    """z (N, K) of rows outside the graph: the mixture and the prior, no messages."""
    with exact_float32():
        base = linear_score(
            features, mixture, prior, likelihood_weight=likelihood_weight, kl_weight=kl_weight
        )
        return torch.softmax(base, 1)


def linear_score(
    features: torch.Tensor,
    mixture: Mixture,
    prior: Prior,
    *,
    likelihood_weight: float,
    kl_weight: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    likelihood_weight g + lambda log y_hat (N, K) up to a constant per row: one GEMM F P^T + c.

    P = likelihood_weight mu / sigma^2 + lambda tau V for a linear prior; a given one is added.
    """
    weights, offset = mixture.linear_score()
    weights, offset = likelihood_weight * weights, likelihood_weight * offset
    if prior.weights is not None:
        weights = weights + kl_weight * prior.weights
    # What all classes share cancels in the softmax; without it float32 keeps more digits.
    weights, offset = weights - weights.mean(0), offset - offset.mean()
    return ops.score(
        features,
        weights.float(),
        offset.float(),
        prior.log_probabilities if kl_weight else None,
        kl_weight,
        out=out,
    )
