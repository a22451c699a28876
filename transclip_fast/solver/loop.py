"""
TransCLIP's block majorise-minimise solver (Zanella, Gerin, Ben Ayed, NeurIPS 2024).

Three blocks in turn, each in closed form: the assignments z, the means mu, the variance sigma^2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from transclip_fast.callbacks import Checkpoint, NoCheckpoint, State, Step
from transclip_fast.data.feature_rows import UnitRows
from transclip_fast.device import exact_float32
from transclip_fast.graph.affinity import affinity
from transclip_fast.ops import backend_class
from transclip_fast.ops.blocks import blocks, gemm_rows
from transclip_fast.ops.torch_backend import TorchOps, block_scores
from transclip_fast.parallel import parallel_map, single_threaded_torch
from transclip_fast.solver.mixture import Mixture, Moments
from transclip_fast.solver.parameters import Parameters
from transclip_fast.solver.prior import Prior
from transclip_fast.solver.support import Support
from transclip_fast.types import Assignments, LinearScore, NeighborGraph, Scores, Truncation

# The likelihood term of M shots, relative to that of N queries, is 50 gamma N / M.
SUPPORT_SCALE = 50.0


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
    features: UnitRows,
    prior: Prior,
    graph: NeighborGraph,
    parameters: Parameters,
    *,
    kl_weight: float,
    support: Support | None = None,
    gamma: float = 0.0,
    truncation: Truncation | None = None,
    backend: str = "torch",
    progress: Callable[[Step], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Solution:
    """
    Classify all queries jointly.

    The features are read `reads(prior)` times before the first step (and once more when `Rows`
    checks them), twice in every outer step and twice at the end: new means need the assignments
    of all rows, and those the scores of all rows under the means before.

    Parameters
    ----------
    features : Tensor or Rows (N, d)
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
    checkpoint : Checkpoint, optional
        Where the state after an outer step is kept, and found.
    """
    if support is not None and parameters.published_support_rows:
        graph, support = support.published(graph, clamp_similarity=parameters.clamp_similarity)
    checkpoint = checkpoint or NoCheckpoint()
    with exact_float32(), single_threaded_torch():
        run = _Run(
            backend_class(backend),
            features,
            prior,
            graph,
            parameters,
            kl_weight=kl_weight,
            support=support,
            gamma=gamma,
            truncation=truncation,
        )
        history = run.resume(checkpoint.load())
        labels = None if progress is None else run.z.best()[0]
        if progress is not None and history:
            progress(Step(len(history), history[-1] / len(features), 0))
        while not _finished(history, parameters, len(features)):
            run.step()
            history.append(run.objective())
            checkpoint.keep(partial(run.state, history))
            if progress is not None:
                labels, before = run.z.best()[0], labels
                changed = int((labels != before).sum())
                progress(Step(len(history), history[-1] / len(features), changed))
        n_iter = len(history)
        run.update_assignments()
        history.append(run.objective())
    tail_mass = float(run.base.tail.max())
    return Solution(run.finish(), run.mixture, n_iter, history, tail_mass, *run.prior_best)


def reads(prior: Prior) -> int:
    """How often the features are read before the first step: for squares, and a linear prior."""
    return 1 if prior.weights is None else 2


def _finished(history: list[float], parameters: Parameters, n_rows: int) -> bool:
    """Whether that was the last outer step."""
    if len(history) >= parameters.max_iter:
        return True
    return len(history) > 1 and abs(history[-1] - history[-2]) < parameters.tol * n_rows


class _Run:
    """z, mu and sigma^2 on their way, and the three block updates."""

    def __init__(
        self,
        operations: type[TorchOps],
        features: UnitRows,
        prior: Prior,
        graph: NeighborGraph,
        parameters: Parameters,
        *,
        kl_weight: float,
        support: Support | None,
        gamma: float,
        truncation: Truncation | None,
    ) -> None:
        self.features, self.prior, self.parameters = features, prior, parameters
        self.kl_weight, self.support = kl_weight, support
        self.support_weight = SUPPORT_SCALE * gamma / len(support) if support else 0.0  # w
        self.z = Assignments.empty(len(features), prior.n_classes, truncation, features.device)
        self.prior_normaliser, log_weights, rows = operations.start(
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
        near = affinity(
            graph,
            mode=parameters.graph_mode,
            clamp_similarity=parameters.clamp_similarity,
            nodes=self.nodes,
            device=features.device,
        )
        self.spare = self.z.empty_like()  # the Jacobi sweep writes here, then the two swap
        self.base = Scores.empty(near.max_message(), prior.n_classes, truncation)
        self.ops = operations(near, self.nodes)
        self.squares = operations.sum_of_squares(features)
        # Of the z that update_assignments leaves: of the queries, and with the support's, where
        # the queries' mass is 1.
        self.moments: Moments
        self.pooled: Moments

    def step(self) -> None:
        """One outer step: z, mu, sigma^2."""
        self.update_assignments()
        self.update_means()
        self.update_variance()

    def update_assignments(self) -> None:
        """z <- softmax_k(likelihood_weight g + A z + lambda log y_hat), several sweeps."""
        weights, offset = linear_score(
            self.mixture,
            self.prior,
            likelihood_weight=self.parameters.likelihood_weight,
            kl_weight=self.kl_weight,
        )
        score = LinearScore(
            weights,
            offset,
            log_prior=self.prior.log_probabilities if self.kl_weight else None,
            prior_weight=self.kl_weight,
            messages=self.support.messages if self.support else None,
        )
        self.ops.score(self.features, score, out=self.base)
        for _ in range(self.parameters.inner_iter):
            new = self.ops.sweep(self.base, self.z, out=self.spare)
            self.z, self.spare = new, self.z
        sums, counts = self.ops.class_sums(self.z, self.features)
        self.moments = Moments(counts, sums, self.squares)
        self.pooled = self.moments * (1 / len(self.features))
        if self.support is not None:
            self.pooled = self.pooled + self.support.moments * self.support_weight

    def update_means(self) -> None:
        """mu_k <- unit(Z^T F / N + w Y^T S)."""
        if self.parameters.update_means:
            self.mixture = self.mixture.update_means(self.pooled, unit=self.parameters.unit_means)

    def update_variance(self) -> None:
        """sigma^2 <- the mean squared distance to the new means, under the new z."""
        if self.parameters.update_variance:
            self.mixture = self.mixture.update_variance(
                self.pooled, covariance=self.parameters.covariance
            )

    def objective(self) -> float:
        """
        L at the present z, mu and sigma^2 (paper, equation 1), a sum over all queries.

        L = KL - 1/2 sum_ij A_ij z_i.z_j - likelihood_weight * mixture, where KL is sum_ik z_ik
        (log z_ik - lambda log y_hat_ik) and mixture is sum_ik z_ik (g_ik - 1/2 sum_d log
        sigma_d^2). Few-shot adds w N times the support's mixture term, and its messages.
        """
        pairwise, entropy = self.ops.energies(self.z)
        likelihood = self.mixture.log_likelihood(self.moments)
        value = entropy - 0.5 * pairwise
        if self.kl_weight and self.prior.log_probabilities is not None:
            log_prior = self.ops.expectation(self.z, self.prior.log_probabilities)
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

    def state(self, history: list[float]) -> dict[str, np.ndarray]:
        """What `resume` needs to go on after the last step of the history."""
        mixture = {"means": self.mixture.means, "variances": self.mixture.variances}
        arrays = {name: tensor.cpu().numpy() for name, tensor in mixture.items()}
        return {"objective": np.array(history), **arrays, **self.z.state()}

    def resume(self, state: State | None) -> list[float]:
        """Go on from an earlier `state`; the objective after each step that was taken."""
        if state is None:
            return []
        self.z.restore(state)
        device = self.features.device
        means, variances = (torch.from_numpy(state[x]).to(device) for x in ("means", "variances"))
        self.mixture = Mixture(means, variances)
        history: list[float] = state["objective"].tolist()
        return history

    def finish(self) -> Assignments:
        """z in the order of the features, once nothing else is needed."""
        del self.spare, self.base
        return self.z if self.nodes is None else self.z.take(self.nodes)


def predict(
    features: UnitRows,
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
        log_prior = prior.log_probabilities if kl_weight else None
        score = LinearScore(weights, offset, log_prior, kl_weight)
        out = weights.new_empty(len(features), prior.n_classes)

        def part(rows: slice) -> None:
            block_scores(features, score, rows, out=out[rows])

        size = gemm_rows(features.device, prior.n_classes)
        parallel_map(part, blocks(len(features), size), features.device)
        return torch.softmax(out, 1)


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
