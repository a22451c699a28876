"""State of a run: where z, mu and sigma^2 start, and how they are saved."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from transclip_fast.callbacks import SavedState
from transclip_fast.data.feature_rows import Rows, evenly_spaced_rows
from transclip_fast.graph.affinity import affinity
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.ops import backend_class
from transclip_fast.ops.ranked import Operations, RankedBackend, RankedRows
from transclip_fast.solver.class_cost import ClassCost, effective_classes
from transclip_fast.solver.known import KNOWN_WEIGHT
from transclip_fast.solver.mixture import Mixture, Moments
from transclip_fast.solver.prior import LinearPrior
from transclip_fast.solver.problem import PRIOR_SAMPLE_ROWS, Inputs, Settings
from transclip_fast.solver.sharpened import prior_counts, sharpness_of
from transclip_fast.solver.support import SUPPORT_SCALE
from transclip_fast.solver.truncation import needed_candidates
from transclip_fast.types import Affinity, Assignments, Scores

ABSENT_NATS = 5.0  # cost from which a class without mass is left out


@dataclass
class State:
    """
    z, mu and sigma^2 during a run.

    Parameters
    ----------
    inputs, settings, ops
        The problem, how it is solved, and the backend that computes.
    gamma : float, optional
        Weight of the support in few-shot.
    whole : Moments
        Of the queries, as of one class.
    prior_normaliser : Tensor
        Sum over rows of the log-sum-exp that made log y_hat of the prior's logits, float64 scalar.
    prior_best : tuple of Tensor (N,), (N,)
        Label and probability of each row by the prior alone.
    sharpness : float
        T of `class_cost`, 1 unless the text is too soft.
    n_effective : float
        K_eff, the classes over which y_hat^T spreads.
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
    class_cost : ClassCost, optional
        The cost of a class in use; None in the published method.
    in_use : Tensor (K',) int64, optional
        The classes that all of the above is about, where absent ones were dropped.
    all_means : Tensor (K, d) float64, optional
        Means of all classes when some were dropped last.
    """

    inputs: Inputs
    settings: Settings
    ops: Operations
    gamma: float | None
    whole: Moments
    prior_normaliser: torch.Tensor
    prior_best: tuple[torch.Tensor, torch.Tensor]
    sharpness: float
    n_effective: float
    nodes: torch.Tensor | None
    z: Assignments
    spare: Assignments
    base: Scores
    mixture: Mixture
    moments: Moments
    pooled: Moments
    class_cost: ClassCost | None = None
    in_use: torch.Tensor | None = None
    all_means: torch.Tensor | None = None

    @property
    def labelled(self) -> list[tuple[Moments, float]]:
        """Moments of labelled rows and their weights, where a query has weight 1 / N."""
        found, n_rows = [], len(self.inputs.features)
        if (shots := self.inputs.support) is not None:
            weight = KNOWN_WEIGHT / n_rows
            if self.gamma is not None:
                weight = SUPPORT_SCALE * self.gamma / len(shots)
            found.append((shots.moments, weight))
        if self.inputs.known is not None:  # which are among the queries already
            found.append((self.inputs.known.moments, (KNOWN_WEIGHT - 1) / n_rows))
        return found

    def labels(self) -> torch.Tensor:
        """Most likely class of each node, (N,) int64."""
        labels = self.ops.best(self.z)[0]
        return labels if self.in_use is None else self.in_use[labels]

    def count(self, marks: torch.Tensor) -> int:
        """How many of all nodes are marked, by (n,) bool of own ones."""
        (found,) = self.inputs.features.total(lambda rows: (marks[rows].sum().double(),), [()])
        return int(found)

    def means(self) -> torch.Tensor:
        """mu of all classes, (K, d)."""
        if self.in_use is None or self.all_means is None:
            return self.mixture.means
        return self.all_means.index_copy(0, self.in_use, self.mixture.means)

    def counts(self) -> torch.Tensor:
        """n of all classes, (K,)."""
        counts = self.moments.counts
        if self.in_use is None or self.all_means is None:
            return counts
        return counts.new_zeros(len(self.all_means)).index_copy(0, self.in_use, counts)

    @property
    def class_costs(self) -> torch.Tensor | None:
        """The loss of each class's score, (K,) float64; None in the published method."""
        return None if self.class_cost is None else self.class_cost.tangent(self.moments.counts)


@dataclass
class History:
    """L after each outer step, and at the end; and how many labels changed since the one before."""

    objective: list[float] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.objective)

    def append(self, objective: float, changed: int) -> None:
        self.objective.append(objective)
        self.changed.append(changed)


@dataclass(frozen=True)
class Solution:
    """
    Result of a run.

    `history` ends with the last update of z, which follows the outer steps; `tail_mass` is the
    largest mass of a row outside its candidates, `prior_labels` (N,) and `prior_confidences` (N,)
    those of the prior. `class_costs` (K,) float64 lowered the scores of the classes at the end;
    None in the published method. `confidences` (N,) are the calibrated ones of the labels.
    """

    gamma: float | None
    assignments: Assignments
    mixture: Mixture
    history: History
    tail_mass: float
    prior_labels: torch.Tensor
    prior_confidences: torch.Tensor
    n_effective: float
    class_costs: torch.Tensor | None
    confidences: torch.Tensor

    @classmethod
    def of(cls, state: State, history: History, confidences: torch.Tensor) -> Solution:
        """The result at a state, which is not used again; z in the order of the features."""
        z, cost, features = in_row_order(state), state.class_cost, state.inputs.features
        if state.in_use is not None and z.classes is not None:
            names = state.in_use.int().index_select(0, z.classes.flatten())
            z = replace(z, classes=names.view_as(z.classes), n_classes=len(state.means()))
        if state.inputs.known is not None:
            z.bound[state.inputs.known.rows] = 0  # nothing there is misplaced
        return cls(
            state.gamma,
            z,
            replace(state.mixture, means=state.means()),
            history,
            features.largest(state.base.tail),
            *state.prior_best,
            state.n_effective,
            None if cost is None else cost.tangent(state.counts()),
            confidences,
        )

    @property
    def n_iter(self) -> int:
        """Outer steps taken."""
        return len(self.history) - 1

    def accuracy(self, inputs: Inputs) -> float:
        """Share of the validation's queries that have its labels; 0 without any."""
        if inputs.validation is None:
            return 0.0
        queries, labels = inputs.validation
        features = inputs.features
        predicted = features.pick(self.assignments.best()[0], queries)
        return float((predicted == labels).double().mean())


def start(inputs: Inputs, graph: NeighborGraph, settings: Settings, gamma: float | None) -> State:
    """
    z = y_hat; mu of the 8 most confident rows of a class, few-shot its shots; sigma^2 = 1 / d.

    Few-shot is with gamma; without, the support joins all else as it is in zero-shot.
    """
    features, prior, device = inputs.features, inputs.prior, inputs.features.device
    backend, n_classes = _backend(settings, features), prior.n_classes
    z = Assignments.empty(len(features.local()), n_classes, settings.truncation, device)
    normaliser, log_weights, rows = backend.start(
        features, prior.weights, prior.log_probabilities, out=z
    )
    (prior_normaliser,) = features.total(lambda rows: (normaliser[rows].double().sum(),), [()])
    shots = None if inputs.support is None or gamma is None else inputs.support.moments
    mixture = Mixture.start(log_weights, rows, features, shots)
    prior_best, nodes = z.best(), None
    power = sharpness_of(prior, prior_best[0], features, graph)
    n_effective = effective_classes(prior_counts(z, features, prior, power))
    if settings.truncation is not None:
        # Neighbours mostly share a label: sorted by label, their lists are close in memory.
        order = prior_best[0].argsort(stable=True)
        nodes = order.scatter(0, order, torch.arange(len(order), device=device))
        z = z.take(order)
    if inputs.known is not None:
        inputs.known.clamp(z, nodes)
    weights = _affinity(graph, settings, features, nodes)
    ops, zero = backend(weights, nodes), Moments.zero(n_classes, features.shape[1], device)
    total, squares = backend.power_sums(features)
    return State(
        inputs=inputs,
        settings=settings,
        ops=ops,
        gamma=gamma,
        whole=Moments(zero.counts.new_full((1,), len(features)), total[None], squares),
        prior_normaliser=prior_normaliser,
        prior_best=prior_best,
        sharpness=power,
        n_effective=n_effective,
        nodes=nodes,
        z=ops.room(z),
        spare=ops.room(z.empty_like()),
        base=Scores.empty(weights.max_message(), n_classes, settings.truncation),
        mixture=mixture,
        moments=zero,
        pooled=zero,
    )


def _backend(settings: Settings, features: Rows) -> Any:
    """The class of the operations, on rows that processes may share."""
    own = backend_class(settings.backend)
    return RankedBackend(own, features.exchange) if isinstance(features, RankedRows) else own


def _affinity(
    graph: NeighborGraph, settings: Settings, features: Rows, nodes: torch.Tensor | None
) -> Affinity:
    """A between nodes, also those of other processes that share the rows."""
    return affinity(
        graph,
        mode=settings.parameters.graph_mode,
        clamp_similarity=settings.parameters.clamp_similarity,
        nodes=nodes,
        device=features.device,
        exchange=features.exchange if isinstance(features, RankedRows) else None,
    )


def drop_absent_classes(state: State) -> None:
    """
    Leave out the classes without mass once they are half of all: products and lists get smaller.

    They are 9 nats below the best class of every row, and the class cost holds them down.
    """
    cost, truncation = state.class_cost, state.settings.truncation
    linear_scores = isinstance(state.inputs.prior, LinearPrior) and state.inputs.support is None
    if cost is None or cost.weight < ABSENT_NATS or truncation is None or not linear_scores:
        return
    counts = state.moments.counts
    classes = counts.nonzero()[:, 0]
    if 2 * len(classes) <= len(counts):
        candidates = min(state.base.values.shape[1], len(classes))
        if truncation.floor:  # else every entry is to stay
            features = state.inputs.features
            rows = evenly_spaced_rows(len(features), PRIOR_SAMPLE_ROWS, counts.device)
            some = features.pick(state.base.values, rows, state.nodes)
            candidates = needed_candidates(some, len(features), candidates)
        keep_classes(state, classes, candidates)


def keep_classes(state: State, classes: torch.Tensor, candidates: int) -> None:
    """Go on with some classes (K',) of those in use, and so many candidates of a row."""
    prior, known = state.inputs.prior, state.inputs.known
    if not isinstance(prior, LinearPrior) or state.z.classes is None:
        raise TypeError("classes are dropped from lists, under a linear prior")
    state.all_means = state.means()
    state.mixture = replace(state.mixture, means=state.mixture.means[classes])
    state.moments, state.pooled = state.moments.take(classes), state.pooled.take(classes)
    state.inputs = replace(
        state.inputs,
        prior=LinearPrior(prior.weights[classes]),
        known=None if known is None else known.of_classes(classes),
    )
    rank = min(state.z.values.shape[1], candidates)
    state.spare = state.z  # so that there are never more than three lists
    state.base = state.base.lists(len(classes), candidates)
    state.z = state.ops.room(state.z.of_classes(classes, rank))
    state.spare = state.ops.room(state.z.empty_like())
    state.in_use = classes if state.in_use is None else state.in_use[classes]


def in_row_order(state: State) -> Assignments:
    """z in the order of the features; without nodes it is, else it takes the spare's memory."""
    return state.z if state.nodes is None else state.z.take_into(state.nodes, out=state.spare)


def saved(state: State, history: History) -> dict[str, np.ndarray]:
    """The arrays from which `restore` resumes after the last step of the history."""
    tensors = {
        "means": state.means(),
        "variances": state.mixture.variances,
        "masses": state.counts(),
    }
    if state.in_use is not None:
        tensors["in_use"] = state.in_use
        tensors["candidates"] = torch.tensor(state.base.values.shape[1])
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    arrays |= {name: np.array(values) for name, values in vars(history).items()}
    # Rows are the same everywhere. Nodes depend on the number of processes, and on labels that
    # another machine may round otherwise.
    return {**arrays, **in_row_order(state).state()}


def restore(state: State, arrays: SavedState | None) -> History:
    """Resume from `saved` arrays, if there are any; returns the history of the steps taken."""
    if arrays is None or "masses" not in arrays:  # or of a version that saved nodes
        return History()
    device = state.inputs.features.device
    means, variances, counts = (
        torch.from_numpy(arrays[name]).to(device) for name in ("means", "variances", "masses")
    )
    state.mixture = Mixture(means, variances)
    state.moments = replace(state.moments, counts=counts)
    if "in_use" in arrays:
        classes = torch.from_numpy(arrays["in_use"]).to(device)
        keep_classes(state, classes, int(arrays["candidates"]))
    if state.nodes is None:
        state.z.restore(arrays)
    else:
        state.spare.restore(arrays)
        state.spare.take_into(state.nodes.argsort(), out=state.z)
    state.z = state.ops.room(state.z)  # what ranks sent before, at the start, was another z
    return History(arrays["objective"].tolist(), arrays["changed"].tolist())
