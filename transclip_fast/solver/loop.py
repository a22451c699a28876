"""
TransCLIP: block majorise-minimise (Zanella, Gerin, Ben Ayed, NeurIPS 2024).

Minimises the objective L (equation 1 of the paper, 4 with labelled support rows) over three blocks
in turn, each in closed form: the assignments z (equation 5), the means mu (6) and the variance
sigma^2 (7). The operations on all N rows are in `transclip_fast.ops`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from transclip_fast.callbacks import Checkpoint, NoCheckpoint, Step
from transclip_fast.data.feature_rows import UnitRows
from transclip_fast.device import exact_float32
from transclip_fast.errors import InputError
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.ops.block_scores import block_scores
from transclip_fast.ops.blocks import blocks, product_rows
from transclip_fast.ops.ranked import neighbor_places
from transclip_fast.parallel import flushed_denormals, single_threaded_torch
from transclip_fast.solver.class_cost import (
    ClassCost,
    effective_classes,
    is_charged,
    is_undecided,
)
from transclip_fast.solver.confidence import calibrated_confidences
from transclip_fast.solver.mixture import Mixture, Moments, by_classes
from transclip_fast.solver.prior import Prior
from transclip_fast.solver.problem import Inputs, Settings
from transclip_fast.solver.sharpened import sharpen
from transclip_fast.solver.state import (
    History,
    Solution,
    State,
    drop_absent_classes,
    restore,
    saved,
    start,
)
from transclip_fast.types import LinearScore, Messages


def solve(
    inputs: Inputs,
    graph: NeighborGraph,
    settings: Settings,
    gamma: float | None = None,
    *,
    progress: Callable[[Step], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Solution:
    """
    Classify all queries jointly; without a class cost where "auto" is undecided.

    The features are read `passes_before` times before the first step, and twice in every
    outer step and at the end: once for the scores, and once for the class sums, which need z of all
    rows. The start of a class cost reads them once more, or twice if there is a support.

    Parameters
    ----------
    inputs : Inputs
        The problem on the device that solves it.
    graph : NeighborGraph
        Lists of k neighbours of the N rows.
    settings : Settings
    gamma : float, optional
        Weight of the support in few-shot; without it shots weigh as queries of known class.
    progress : callable, optional
        Called after every outer step.
    checkpoint : Checkpoint, optional
        Saves the state after every outer step; a saved state is where the run resumes.

    Raises
    ------
    InputError
        Scores that are too large for float32.
    """
    checkpoint = checkpoint or NoCheckpoint()
    features, n_classes = inputs.features, inputs.prior.n_classes
    with exact_float32(), flushed_denormals(), single_threaded_torch(features.device):
        state = start(inputs, graph, settings, gamma)
        few_shot, asked = gamma is not None, (settings.parameters.class_cost, state.n_effective)
        charged = is_charged(*asked, n_classes, few_shot=few_shot)
        charged = charged and not is_undecided(*asked, n_classes, few_shot=few_shot)
        if charged and few_shot:
            start_from_shots(state)
        elif charged:
            start_from_neighbors(state)
        history = restore(state, checkpoint.load())
        labels = state.labels()
        _report(progress, history, state, labels)
        while not _finished(history, settings, len(features)):
            update_assignments(state)
            update_means(state)
            update_variance(state)
            before, labels = labels, state.labels()
            history.append(objective(state), state.count(labels != before))
            drop_absent_classes(state)
            checkpoint.keep(partial(saved, state, history))
            _report(progress, history, state, labels)
        update_assignments(state, bounded=True)
        history.append(objective(state), state.count(state.labels() != labels))
        _check_finite(state, history)
        neighbors, _ = neighbor_places(features, graph.neighbors)
        confidences = calibrated_confidences(state.ops, state.base, state.z, neighbors, state.nodes)
    return Solution.of(state, history, confidences)


def update_assignments(state: State, *, bounded: bool = False) -> None:
    """
    z <- softmax_k(likelihood_weight g + A z + lambda log y_hat - class costs), some sweeps.

    Equation 5; the class costs (`class_cost`) are not in the paper. `bounded` sets z's bound.
    """
    _score(
        state,
        likelihood_weight=state.settings.parameters.likelihood_weight,
        kl_weight=state.settings.kl_weight,
    )
    _sweeps(state, bounded=bounded)
    update_moments(state)


def _score(state: State, *, likelihood_weight: float, kl_weight: float) -> None:
    """Set the base scores; those of known rows make z one-hot."""
    inputs, support = state.inputs, state.inputs.support
    score = linear_score(
        state.mixture,
        inputs.prior,
        likelihood_weight=likelihood_weight,
        kl_weight=kl_weight,
        class_costs=state.class_costs,
        messages=None if support is None else support.messages,
    )
    state.ops.score(inputs.features, score, out=state.base)
    if inputs.known is not None:
        inputs.known.clamp(state.base, state.nodes)


def _sweeps(state: State, *, bounded: bool = False) -> None:
    """
    Sweep the assignments `inner_iter` times, all rows at once (Jacobi).

    The bound of the last sweep is only computed if it is read: on a GPU it costs as much again.
    """
    last = state.settings.parameters.inner_iter - 1
    for i in range(last + 1):
        state.ops.sweep(state.base, state.z, out=state.spare, bounded=bounded and i == last)
        state.z, state.spare = state.spare, state.z


def update_means(state: State) -> None:
    """mu_k <- unit(Z^T F / N + w Y^T S) (equation 6)."""
    parameters = state.settings.parameters
    if parameters.update_means:
        state.mixture = state.mixture.update_means(state.pooled, unit=parameters.unit_means)


def update_variance(state: State) -> None:
    """sigma^2 <- the mean squared distance to the new means, under the new z (equation 7)."""
    parameters = state.settings.parameters
    if parameters.update_variance:
        state.mixture = state.mixture.update_variance(
            state.pooled, covariance=parameters.covariance
        )


def update_moments(state: State) -> None:
    """n = Z^T 1 and Z^T F of the queries; and of all rows, queries scaled to a mass of 1."""
    features = state.inputs.features
    sums, counts = state.ops.class_sums(state.z, features)
    state.moments = Moments(counts, sums, state.whole.squares)
    if state.z.classes is not None:
        state.moments = state.moments.with_dropped(state.whole)
    state.pooled = state.moments * (1 / len(features))
    for moments, weight in state.labelled:
        state.pooled = state.pooled + moments * weight


def objective(state: State) -> float:
    """
    L at the present z, mu and sigma^2 (equation 1; 4 with support), a sum over all queries.

    L = KL - 1/2 sum_ij A_ij z_i.z_j - likelihood_weight * mixture, where KL is sum_ik z_ik
    (log z_ik - lambda log y_hat_ik) and mixture is sum_ik z_ik (g_ik - 1/2 sum_d log sigma_d^2).
    Labelled rows add w N times their mixture term, the support also its messages, the class cost
    its own. Queries of known class have a constant KL, of which an infinite one is left out.
    """
    inputs, kl_weight, mixture = state.inputs, state.settings.kl_weight, state.mixture
    n_rows = len(inputs.features)
    pairwise, entropy = state.ops.energies(state.z)
    value = entropy - 0.5 * pairwise
    if kl_weight and inputs.prior.log_probabilities is not None:
        value = value - kl_weight * state.ops.expectation(state.z, inputs.prior.log_probabilities)
    elif kl_weight and inputs.prior.weights is not None:
        # Linear in the features, so the moments suffice and no row is read.
        log_prior = state.moments.dot(inputs.prior.weights)
        value = value - kl_weight * (log_prior - state.prior_normaliser)
    likelihood = mixture.log_likelihood(state.moments)
    for moments, weight in state.labelled:
        likelihood = likelihood + weight * n_rows * mixture.log_likelihood(moments)
    if inputs.support is not None:
        value = value - state.ops.received(state.z, inputs.support.messages)
    if state.class_cost is not None:
        value = value + state.class_cost.total(state.moments.counts)
    return float(value - state.settings.parameters.likelihood_weight * likelihood)


def start_from_neighbors(state: State) -> None:
    """
    z <- softmax_k(T log y_hat + A z + messages of the support), some sweeps; mu <- unit(Z^T F).

    Where few classes occur, the 8 rows that are most confident of an absent class are not its own.
    T is that of `class_cost`, and the cost that of the classes over which z then spreads.
    """
    sharpen(state.z, state.sharpness)
    if state.inputs.support is None:
        state.base.set_log(state.z)
    else:
        _score(state, likelihood_weight=0.0, kl_weight=state.sharpness)
    _sweeps(state)
    update_moments(state)
    state.mixture = state.mixture.update_means(state.moments)
    state.class_cost = _cost(state)


def start_from_shots(state: State) -> None:
    """
    Few-shot: update z without a cost, then set the cost of the classes over which it spreads.

    The means stay at the shots. The cost is scaled as the prior is, by lambda.
    """
    update_assignments(state)
    cost = _cost(state)
    state.class_cost = replace(cost, weight=cost.weight * state.settings.kl_weight)


def _cost(state: State) -> ClassCost:
    """The class cost where z is that of the last `update_moments`."""
    n_classes, (n_rows, dim) = state.z.n_classes, state.inputs.features.shape
    return ClassCost.of(effective_classes(state.moments.counts), n_rows, n_classes, dim)


def linear_score(
    mixture: Mixture,
    prior: Prior,
    *,
    likelihood_weight: float,
    kl_weight: float,
    class_costs: torch.Tensor | None = None,
    messages: Messages | None = None,
) -> LinearScore:
    """
    likelihood_weight g + lambda log y_hat - costs = F P^T + c, up to a constant per row.

    P = likelihood_weight mu / sigma^2 + lambda tau V for a linear prior, V its prototypes; a prior
    (N, K) is added to the scores.
    """
    offset = mixture.means.new_empty(len(mixture.means))
    weights = torch.empty_like(mixture.means, dtype=torch.float32)
    # What all classes share cancels in the softmax; without it float32 is more exact.
    shared = likelihood_weight * mixture.means.mean(0) / mixture.variances
    if prior.weights is not None:
        shared += kl_weight * prior.weights.mean(0)

    def part(classes: slice) -> None:
        found, g_offset = mixture.linear_score(classes)
        found.mul_(likelihood_weight).sub_(shared)
        if prior.weights is not None:
            found.add_(prior.weights[classes], alpha=kl_weight)
        weights[classes], offset[classes] = found, likelihood_weight * g_offset

    by_classes(part, weights)
    if class_costs is not None:
        offset = offset - class_costs
    return LinearScore(
        weights,
        (offset - offset.mean()).float(),
        prior.log_probabilities if kl_weight else None,
        kl_weight,
        messages,
    )


def predict(
    features: UnitRows,
    mixture: Mixture,
    prior: Prior,
    *,
    likelihood_weight: float,
    kl_weight: float,
    class_costs: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """
    z (n, K) float32 of block after block of rows outside the graph.

    The mixture, the prior and class costs decide it, without messages.
    """
    n_rows, n_classes = len(features), prior.n_classes
    with exact_float32():
        score = linear_score(
            mixture,
            prior,
            likelihood_weight=likelihood_weight,
            kl_weight=kl_weight,
            class_costs=class_costs,
        )
    for rows in blocks(n_rows, product_rows(features.device, n_rows, n_classes)):
        with exact_float32():
            z = score.weights.new_empty(rows.stop - rows.start, n_classes)
            z = torch.softmax(block_scores(features, score, rows, out=z), 1)
        yield z


def passes_before(*, linear: bool) -> int:
    """
    Passes over the features before the first step: for squares, and a linear prior.

    Without those of a class cost, which the start of `solve` decides on.
    """
    return 1 + linear


def _check_finite(state: State, history: History) -> None:
    """InputError where scores left float32: L is no number, or some row has no class."""
    without = state.count(~(state.ops.best(state.z)[1] > 0))  # NaN is not greater
    if without or not math.isfinite(history.objective[-1]):
        raise InputError(
            "the scores of the classes are too large for float32: lower logit_scale, kl_weight, "
            "likelihood_weight, gamma or the similarities of the graph"
        )


def _finished(history: History, settings: Settings, n_rows: int) -> bool:
    """Whether the last outer step was the last one needed."""
    parameters = settings.parameters
    if len(history) >= parameters.max_iter:
        return True
    last = history.objective[-2:]
    return len(last) > 1 and abs(last[1] - last[0]) < parameters.tol * n_rows


def _report(
    progress: Callable[[Step], None] | None, history: History, state: State, labels: torch.Tensor
) -> None:
    """Report the last outer step, if there was one; its labels (n,) are of the nodes."""
    if progress is not None and len(history):
        objective = history.objective[-1] / len(state.inputs.features)
        rows = labels if state.nodes is None else labels[state.nodes]
        progress(Step(len(history), objective, history.changed[-1], rows))
