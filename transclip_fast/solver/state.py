"""State of a run: where z, mu and sigma^2 start, and how they are saved."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from transclip_fast.callbacks import SavedState
from transclip_fast.data.feature_rows import Rows, evenly_spaced_rows
from transclip_fast.graph.affinity import affinity
from transclip_fast.ops import backend_class
from transclip_fast.ops.torch_backend import TorchOps
from transclip_fast.solver.class_cost import FEW_CLASSES, ClassCost, effective_classes
from transclip_fast.solver.known import KNOWN_WEIGHT
from transclip_fast.solver.mixture import Mixture, Moments
from transclip_fast.solver.prior import Prior
from transclip_fast.solver.problem import PRIOR_SAMPLE_ROWS, Inputs, Settings
from transclip_fast.types import Assignments, NeighborGraph, Scores

# The likelihood term of M shots weighs 50 gamma N / M times that of N queries.
SUPPORT_SCALE = 50.0


@dataclass
class State:
    """
    z, mu and sigma^2 during a run.

    Parameters
    ----------
    inputs, settings, ops
        The problem, how it is solved, and the backend that computes.
    labelled : list of (Moments, float)
        Moments that join those of the queries, and their weights.
    squares : Tensor (d,) float64
        sum_i f_i^2.
    prior_normaliser : Tensor (N,) float32
        The log-sum-exp that made log y_hat of the prior's logits.
    prior_best : tuple of Tensor (N,), (N,)
        Label and probability of each row by the prior alone.
    n_effective : float
        K_eff, the classes over which y_hat spreads.
    class_cost : ClassCost, optional
        What classes in use cost; None in the published method.
    nodes : Tensor (N,) int64, optional
        Row of z, its scores and the affinity for each row of the features.
    z, spare : Assignments
        A sweep reads z and writes the spare; then the two swap (Jacobi).
    base : Scores
        likelihood_weight g + lambda log y_hat.
    mixture : Mixture
        mu and sigma^2.
    moments, pooled : Moments
        Moments of z over the queries; and the same scaled to a mass of 1, plus the support's. Both
        are zero before the first update, or start.
    """

    inputs: Inputs
    settings: Settings
    ops: TorchOps
    labelled: list[tuple[Moments, float]]
    squares: torch.Tensor
    prior_normaliser: torch.Tensor
    prior_best: tuple[torch.Tensor, torch.Tensor]
    n_effective: float
    class_cost: ClassCost | None
    nodes: torch.Tensor | None
    z: Assignments
    spare: Assignments
    base: Scores
    mixture: Mixture
    moments: Moments
    pooled: Moments

    @property
    def class_costs(self) -> torch.Tensor | None:
        """What the score of each class loses, (K,) float64; None in the published method."""
        return None if self.class_cost is None else self.class_cost.tangent(self.moments.counts)


@dataclass(frozen=True)
class Solution:
    """
    Result of a run.

    `objective` is L after each outer step and at the end, `tail_mass` the largest mass of a row
    outside its candidates, `prior_labels` (N,) and `prior_confidences` (N,) those of the prior.
    `class_costs` (K,) float64 lowered the scores of the classes at the end; None in the published
    method.
    """

    gamma: float | None
    assignments: Assignments
    mixture: Mixture
    n_iter: int
    objective: list[float]
    tail_mass: float
    prior_labels: torch.Tensor
    prior_confidences: torch.Tensor
    n_effective: float
    class_costs: torch.Tensor | None

    @classmethod
    def of(cls, state: State, gamma: float | None, n_iter: int, objective: list[float]) -> Solution:
        """The result at a state, which is not used again; z in the order of the features."""
        z = state.z
        if state.nodes is not None:
            z = z.take_into(state.nodes, out=state.spare)
        if state.inputs.known is not None:
            z.bound[state.inputs.known.rows] = 0  # nothing there is misplaced
        tail_mass = float(state.base.tail.max())
        return cls(
            gamma,
            z,
            state.mixture,
            n_iter,
            objective,
            tail_mass,
            *state.prior_best,
            state.n_effective,
            state.class_costs,
        )

    def accuracy(self, validation: tuple[np.ndarray, np.ndarray] | None) -> float:
        """Share of queries (V,) that have their labels (V,); 0 without any."""
        if validation is None:
            return 0.0
        queries, labels = validation
        predicted = self.assignments.best()[0].cpu().numpy()
        return float((predicted[queries] == labels).mean())


def start(inputs: Inputs, graph: NeighborGraph, settings: Settings, gamma: float | None) -> State:
    """
    z = y_hat; mu of the 8 most confident rows of a class, few-shot its shots; sigma^2 = 1 / d.

    Few-shot is with gamma; without, the support joins all else as it is in zero-shot.
    """
    features, prior, support = inputs.features, inputs.prior, inputs.support
    n_rows, n_classes, device = len(features), prior.n_classes, features.device
    backend, parameters = backend_class(settings.backend), settings.parameters
    z = Assignments.empty(n_rows, n_classes, settings.truncation, device)
    normaliser, log_weights, rows = backend.start(
        features, prior.weights, prior.log_probabilities, out=z
    )
    shots = None if support is None or gamma is None else support.moments
    mixture = Mixture.start(log_weights, rows, features, shots)
    prior_best, nodes = z.best(), None
    n_effective = effective_classes(_prior_counts(z, features, prior))
    charged = parameters.class_cost
    if charged == "auto":
        charged = gamma is None and n_effective < FEW_CLASSES * n_classes
    if settings.truncation is not None:
        # Neighbours mostly share a label: sorted by label, their lists are close in memory.
        order = prior_best[0].argsort(stable=True)
        nodes = torch.empty_like(order)
        nodes[order] = torch.arange(n_rows, device=device)
        z = z.take(order)
    if inputs.known is not None:
        inputs.known.clamp(z, nodes)
    weights = affinity(
        graph,
        mode=parameters.graph_mode,
        clamp_similarity=parameters.clamp_similarity,
        nodes=nodes,
        device=device,
    )
    zero = Moments.zero(n_classes, features.shape[1], device)
    return State(
        inputs=inputs,
        settings=settings,
        ops=backend(weights, nodes),
        labelled=_labelled(inputs, gamma),
        squares=backend.sum_of_squares(features),
        prior_normaliser=normaliser,
        prior_best=prior_best,
        n_effective=n_effective,
        class_cost=ClassCost.of(n_effective, *z.shape, features.shape[1]) if charged else None,
        nodes=nodes,
        z=z,
        spare=z.empty_like(),
        base=Scores.empty(weights.max_message(), n_classes, settings.truncation),
        mixture=mixture,
        moments=zero,
        pooled=zero,
    )


def _labelled(inputs: Inputs, gamma: float | None) -> list[tuple[Moments, float]]:
    """Moments of labelled rows and their weights, where a query has weight 1 / N."""
    found, n_rows = [], len(inputs.features)
    if (support := inputs.support) is not None:
        weight = KNOWN_WEIGHT / n_rows if gamma is None else SUPPORT_SCALE * gamma / len(support)
        found.append((support.moments, weight))
    if inputs.known is not None:  # which are among the queries already
        found.append((inputs.known.moments, (KNOWN_WEIGHT - 1) / n_rows))
    return found


def _prior_counts(z: Assignments, features: Rows, prior: Prior) -> torch.Tensor:
    """sum_i y_hat_ik (K,) float64; z is y_hat, of which sparse rows lack the smallest entries."""
    counts = z.counts()
    if z.classes is None:
        return counts
    # All entries of some rows tell among which classes the dropped mass is spread.
    ids = evenly_spaced_rows(len(z), PRIOR_SAMPLE_ROWS, z.values.device)
    whole = prior.at(ids, features[ids].float()).exp()
    dropped = (whole - z.take(ids).dense()).clamp_min(0).sum(0, dtype=torch.float64)
    share = dropped / dropped.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return counts + (len(z) - counts.sum()).clamp_min(0) * share


def saved(state: State, history: list[float]) -> dict[str, np.ndarray]:
    """The arrays from which `restore` resumes after the last step of the history."""
    mixture = {"means": state.mixture.means, "variances": state.mixture.variances}
    arrays = {name: tensor.cpu().numpy() for name, tensor in mixture.items()}
    arrays["counts"] = state.moments.counts.cpu().numpy()
    return {"objective": np.array(history), **arrays, **state.z.state()}


def restore(state: State, arrays: SavedState | None) -> list[float]:
    """Resume from `saved` arrays, if there are any; returns the objective of each step taken."""
    if arrays is None:
        return []
    state.z.restore(arrays)
    means, variances = (torch.from_numpy(arrays[name]) for name in ("means", "variances"))
    state.mixture = Mixture(means, variances).to(state.inputs.features.device)
    counts = torch.from_numpy(arrays["counts"]).to(state.inputs.features.device)
    state.moments = replace(state.moments, counts=counts)
    history: list[float] = arrays["objective"].tolist()
    return history
