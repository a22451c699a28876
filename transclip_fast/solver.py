"""
TransCLIP's block majorise-minimise solver (Zanella, Gerin, Ben Ayed, NeurIPS 2024).

Three blocks in turn, each in closed form: the assignments z, the means mu, the variance sigma^2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from transclip_fast.assignments import Assignments, Scores
from transclip_fast.device import exact_float32
from transclip_fast.errors import InputError
from transclip_fast.graph import Affinity, NeighborGraph, affinity
from transclip_fast.graph.affinity import GRAPH_MODES
from transclip_fast.mixture import COVARIANCES, Mixture, Moments
from transclip_fast.ops import Operations, operations
from transclip_fast.prior import Prior
from transclip_fast.support import Support
from transclip_fast.truncation import Truncation

# The likelihood term of M shots, relative to that of N queries, is 50 gamma N / M.
SUPPORT_SCALE = 50.0
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
        results; see `transclip_fast.support.Support.published`.
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


@dataclass(frozen=True)
class Progress:
    """State after an outer step: its number, the last one's, the objective per query."""

    step: int
    last: int
    objective: float


@dataclass(frozen=True)
class Solution:
    """
    What a run ends with.

    `objective` is L after each outer step and at the end, `tail_mass` the largest mass of a row
    outside its candidates, `prior_labels` (N,) and `prior_confidences` (N,) what the prior alone
    predicts.
    """

    assignments: Assignments
    mixture: Mixture
    n_iter: int
    objective: list[float]
    tail_mass: float
    prior_labels: torch.Tensor
    prior_confidences: torch.Tensor


def solve(
    features: torch.Tensor,
    prior: Prior,
    graph: NeighborGraph,
    parameters: Parameters,
    *,
    kl_weight: float,
    support: Support | None = None,
    gamma: float = 0.0,
    truncation: Truncation | None = None,
    backend: str = "torch",
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
    truncation : Truncation, optional
        Keep only the largest entries of each row; all of them where not given.
    backend : str
        Whose operations, one of those that `ops.choose_backend` returns.
    progress : callable, optional
        Called after every outer step.
    """
    if support is not None and parameters.published_support_rows:
        graph, support = support.published(graph, clamp_similarity=parameters.clamp_similarity)
    ops = operations(backend)
    with exact_float32(), ops.session():
        run = _Run(
            ops,
            features,
            prior,
            graph,
            parameters,
            kl_weight=kl_weight,
            support=support,
            gamma=gamma,
            truncation=truncation,
        )
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
    tail_mass = float(run.base.tail.max())
    return Solution(run.finish(), run.mixture, n_iter, history, tail_mass, *run.prior_best)


class _Run:
    """z, mu and sigma^2 on their way, and the three block updates."""

    def __init__(
        self,
        ops: Operations,
        features: torch.Tensor,
        prior: Prior,
        graph: NeighborGraph,
        parameters: Parameters,
        *,
        kl_weight: float,
        support: Support | None,
        gamma: float,
        truncation: Truncation | None,
    ) -> None:
        self.ops, self.features, self.prior, self.parameters = ops, features, prior, parameters
        self.kl_weight, self.support = kl_weight, support
        self.support_weight = SUPPORT_SCALE * gamma / len(support) if support else 0.0  # w
        self.z = Assignments.empty(len(features), prior.n_classes, truncation, features.device)
        self.prior_normaliser, log_weights, rows = ops.start(
            features, prior.weights, prior.log_probabilities, out=self.z
        )
        self.mixture = Mixture.start(
            log_weights, rows, features, support.moments if support else None
        )
        self.prior_best = self.z.best()
        # Most neighbours share a label: side by side, their short rows are read from the cache.
        self.nodes: torch.Tensor | None = None
        if truncation is not None:
            order = self.prior_best[0].argsort(stable=True)
            self.nodes = torch.empty_like(order)
            self.nodes[order] = torch.arange(len(order), device=order.device)
            self.z = self.z.take(order)
        self.affinity: Affinity = affinity(
            graph,
            mode=parameters.graph_mode,
            clamp_similarity=parameters.clamp_similarity,
            nodes=self.nodes,
            device=features.device,
        )
        self.spare = self.z.empty_like()  # the Jacobi sweep writes here, then the two swap
        self.base = Scores.empty(self.affinity.reach(), prior.n_classes, truncation)
        self.squares = ops.sum_of_squares(features)
        self.moments: Moments  # of the z that update_assignments leaves

    def update_assignments(self) -> None:
        """z <- softmax_k(likelihood_weight g + A z + lambda log y_hat), several sweeps."""
        weights, offset = linear_score(
            self.mixture,
            self.prior,
            likelihood_weight=self.parameters.likelihood_weight,
            kl_weight=self.kl_weight,
        )
        self.ops.score(
            self.features,
            weights,
            offset,
            log_prior=self.prior.log_probabilities if self.kl_weight else None,
            prior_weight=self.kl_weight,
            messages=self.support.messages if self.support else None,
            nodes=self.nodes,
            out=self.base,
        )
        for _ in range(self.parameters.inner_iter):
            new = self.ops.sweep(self.base, self.affinity, self.z, out=self.spare)
            self.z, self.spare = new, self.z
        sums, counts = self.ops.class_sums(self.z, self.features, self.nodes)
        self.moments = Moments(counts, sums, self.squares)

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
        """
        L at the present z, mu and sigma^2 (paper, equation 1), a sum over all queries.

        L = KL - 1/2 sum_ij A_ij z_i.z_j - likelihood_weight * mixture, where KL is sum_ik z_ik
        (log z_ik - lambda log y_hat_ik) and mixture is sum_ik z_ik (g_ik - 1/2 sum_d log
        sigma_d^2). Few-shot adds w N times the support's mixture term, and its messages.
        """
        pairwise, entropy = self.ops.energies(self.z, self.affinity)
        likelihood = self.mixture.log_likelihood(self.moments)
        value = entropy - 0.5 * pairwise
        if self.kl_weight and self.prior.log_probabilities is not None:
            log_prior = self.ops.expectation(self.z, self.prior.log_probabilities, self.nodes)
            value = value - self.kl_weight * log_prior
        elif self.kl_weight and self.prior.weights is not None:
            # Linear in the features: the moments say it without touching a row.
            log_prior = (self.prior.weights * self.moments.sums).sum()
            value = value - self.kl_weight * (log_prior - self.prior_normaliser.double().sum())
        if self.support is not None:
            shots = self.mixture.log_likelihood(self.support.moments)
            likelihood = likelihood + self.support_weight * len(self.features) * shots
            value = value - self.support.received(self.z, self.nodes)
        return float(value - self.parameters.likelihood_weight * likelihood)

    def finish(self) -> Assignments:
        """z in the order of the features, once nothing else is needed."""
        del self.spare, self.base
        return self.z if self.nodes is None else self.z.take(self.nodes)

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
        weights, offset = linear_score(
            mixture, prior, likelihood_weight=likelihood_weight, kl_weight=kl_weight
        )
        out = Scores.empty(features.new_zeros(len(features)), prior.n_classes, None)
        log_prior = prior.log_probabilities if kl_weight else None
        score = operations("torch").score
        score(features, weights, offset, log_prior=log_prior, prior_weight=kl_weight, out=out)
        return torch.softmax(out.values, 1)


def linear_score(
    mixture: Mixture, prior: Prior, *, likelihood_weight: float, kl_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    P (K, d) and c (K,) float32: likelihood_weight g + lambda log y_hat = F P^T + c.

    Up to a constant per row. P = likelihood_weight mu / sigma^2 + lambda tau V for a linear
    prior; a given one is added to the scores.
    """
    weights, offset = mixture.linear_score()
    weights, offset = likelihood_weight * weights, likelihood_weight * offset
    if prior.weights is not None:
        weights = weights + kl_weight * prior.weights
    # What all classes share cancels in the softmax; without it float32 keeps more digits.
    return (weights - weights.mean(0)).float(), (offset - offset.mean()).float()
