"""TransCLIP as a scikit-learn style estimator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from transclip_fast.callbacks import Checkpoint, Meter, Progress
from transclip_fast.data.checks import as_unit_rows, unread_matrix
from transclip_fast.data.feature_rows import Rows
from transclip_fast.device import exact_float32, resolve_device
from transclip_fast.errors import InputError
from transclip_fast.graph.build import build_graph
from transclip_fast.ops import BACKENDS, choose_backend
from transclip_fast.solver.layout import choose_layout, parse_memory
from transclip_fast.solver.loop import Solution, predict, reads, solve
from transclip_fast.solver.parameters import Parameters, check_number, check_weight
from transclip_fast.solver.prior import LinearPrior, Prior
from transclip_fast.solver.problem import make_priors, make_support, make_validation, size_of
from transclip_fast.solver.truncation import FORMS, choose_truncation, losses, sample_ids
from transclip_fast.types import NeighborGraph, Truncation

GAMMAS = (0.002, 0.01, 0.02, 0.2)
CHOICES: dict[str, tuple[object, ...]] = {
    "assignments": FORMS,
    "precision": ("float32", "float16"),
    "backend": BACKENDS,
}


@dataclass(kw_only=True, eq=False)
class TransCLIP(Parameters):
    """
    Transductive classification of the features of a CLIP-like model.

    All queries are classified jointly: a Gaussian mixture over the image features, messages
    between nearest neighbours, and a KL term that ties the assignments to the text prediction.

    Parameters
    ----------
    gamma : float, optional
        Few-shot only: weight of the labelled rows. Where it is not given, the best of 0.002,
        0.01, 0.02 and 0.2 on a validation set.
    device : str
        "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
    assignments : {"auto", "dense", "sparse"}
        Keep z whole, or of each row only the largest entries: memory and time of a sweep then do
        not grow with K. "auto" is dense for small problems, and on a GPU for few classes.
    candidates : int, optional
        Sparse only: classes of a row that messages can reach. Where it is not given, what a
        sample of the prior needs and memory allows.
    rank : int, optional
        Sparse only: entries of z that a row keeps; as many as candidates where not given.
        With both at K nothing is left out.
    backend : {"auto", "torch", "triton", "numba"}
        Who computes; triton does on a GPU, numba does sparse assignments on a CPU.
    precision : {"float32", "float16"}
        Of the features in products; sums are float32 and more. float16 needs backend triton.
    memory : str or int, optional
        How much may be used, "8GiB" or a number of bytes: by the process, and on a GPU by what
        is there. It decides whether features are held on the device or read in every pass, and
        how many candidates there are at most; what is free, where not given.
    **
        All other parameters are those of `transclip_fast.solver.parameters.Parameters`.

    Attributes
    ----------
    transduction_ : ndarray (N,) int64
        Label of each query.
    label_distributions_ : ndarray or scipy.sparse.csr_array (N, K) float32
        Assignments z; in CSR when sparse, rows then sum to 1 less what was dropped.
    truncation_ : dict or None
        Of a sparse fit: `candidates`, `rank` and `floor`; `mean_dropped`, the mean mass of z that
        was left out, and `tail_mass`, the largest mass of a row outside its candidates;
        `largest_bound` and `mean_bound`, over the rows, of the mass that the last sweep misplaced
        because messages reached classes that are no candidates.
    backend_ : str
        Who computed.
    means_ : ndarray (K, d) float32
    variances_ : ndarray (d,) float32
    n_iter_ : int
        Outer steps taken.
    objective_ : ndarray (n_iter_ + 1,) float64
        L after each outer step, and at the end.
    gamma_ : float or None
        The gamma used; None in zero-shot.
    kl_weight_ : float
        The lambda used.
    device_ : torch.device
        The device used.
    layout_ : transclip_fast.solver.layout.Layout
        What was held in memory.
    graph_ : NeighborGraph
        The graph used.
    zero_shot_labels_ : ndarray (N,) int64
    zero_shot_confidences_ : ndarray (N,) float32
        What the text features alone predict; without text features, what the prior does.

    References
    ----------
    Zanella, Gerin, Ben Ayed. Boosting Vision-Language Models with Transduction. NeurIPS 2024.
    """

    gamma: float | None = None
    device: str = "auto"
    assignments: str = "auto"
    candidates: int | None = None
    rank: int | None = None
    precision: str = "float32"
    memory: str | int | None = None
    backend: str = "auto"

    @exact_float32()
    def fit(
        self,
        X: Any,
        text_features: Any = None,
        *,
        prior: Any = None,
        prior_logits: Any = None,
        prototypes: Any = None,
        support_features: Any = None,
        support_labels: Any = None,
        validation_features: Any = None,
        validation_labels: Any = None,
        graph: NeighborGraph | Callable[[Rows], NeighborGraph] | None = None,
        progress: Callable[[Progress], None] | None = None,
        checkpoint: Callable[[str, dict[str, Any]], Checkpoint] | None = None,
    ) -> TransCLIP:
        """
        Classify the rows of X. Arrays are numpy or torch, of any float type, and never modified.

        Parameters
        ----------
        X : array_like (N, d)
            Image features of the queries; rows off the unit sphere are normalised. A
            `numpy.memmap` or `transclip_fast.data.npy_shards.StoredRows` may be larger than memory.
        text_features : array_like (K, d), optional
            Text embedding of each class: the prior, unless another is given; then only the
            zero-shot attributes come from it.
        prior : array_like or scipy sparse array (N, K), optional
            Probabilities of another method; what a sparse row leaves of its mass, but at least
            1e-6, is spread evenly over the classes it leaves out; or
        prior_logits : array_like (N, K), optional
            its logits, on the scale that a softmax takes; or
        prototypes : array_like (K, d), optional
            its class prototypes, used like text features.
        support_features, support_labels : array_like (M, d), (M,), optional
            Labelled rows: few-shot.
        validation_features, validation_labels : array_like (V, d), (V,), optional
            Labelled rows that choose gamma where it is not given: the value is taken with which
            most of them have the label of their most similar query, the first of equal ones.
        graph : NeighborGraph or callable, optional
            Neighbour lists of X, or what makes them from its unit rows, a
            `transclip_fast.data.feature_rows.Rows`; `build_graph` where not given.
        progress : callable, optional
            Called with a `transclip_fast.callbacks.Progress` after every block of rows that is
            read, from any thread, and after every outer step.
        checkpoint : callable, optional
            Makes the `transclip_fast.callbacks.Checkpoint` that keeps a run's state after its
            outer steps, from a name and from what the fit has decided.

        Raises
        ------
        InputError
            Input that cannot be used: which, where, and what to do.
        """
        self.check()
        device = self.device_ = resolve_device(self.device)
        matrix = unread_matrix(X, "X")
        prior_, zero_shot = make_priors(
            (matrix.shape[0], matrix.shape[1]),
            device,
            self.logit_scale,
            text_features=text_features,
            prior=prior,
            prior_logits=prior_logits,
            prototypes=prototypes,
        )
        tried = GAMMAS if self.gamma is None else (self.gamma,)
        gammas: Sequence[float] = (0.0,) if support_features is None else tried
        linear = isinstance(prior_, LinearPrior)
        self.layout_ = choose_layout(
            size_of(X, prior_.n_classes, self, device, linear=linear, runs=len(gammas)),
            device,
            form=self.form(),
            candidates=self.candidates,
            memory=parse_memory(self.memory),
        )
        features = Rows(matrix, "X", device, held=self.layout_.held)
        support = make_support(features, prior_, support_features, support_labels, self)
        validation = make_validation(features, prior_, validation_features, validation_labels)
        if support is not None and self.gamma is None and validation is None:
            raise InputError(
                "few-shot needs gamma, or validation_features and validation_labels to choose it"
            )
        self.kl_weight_ = (0.5 if support else 1.0) if self.kl_weight is None else self.kl_weight
        truncation = self._truncation(features, prior_)
        anchors = text_features if prototypes is None else prototypes
        self.graph_ = self._graph(graph, features, anchors)

        meter = None
        if progress is not None:
            meter = Meter(len(features), reads(prior_), self.max_iter, len(gammas), progress)
            features.on_read = meter.rows
        factors = features if self.precision == "float32" else features.half()

        def run(position: int) -> Solution:
            return solve(
                factors,
                prior_,
                self.graph_,
                self,
                kl_weight=self.kl_weight_,
                support=support,
                gamma=gammas[position],
                truncation=truncation,
                backend=self.backend_,
                progress=meter.run(position) if meter else None,
                checkpoint=checkpoint
                and checkpoint(f"solve-{position}", self._identity(gammas[position], truncation)),
            )

        runs = ((gamma, run(position)) for position, gamma in enumerate(gammas))
        gamma, solution = _most_accurate(runs, validation)
        features.on_read = None
        self.gamma_ = gamma if support else None
        self._keep(solution, prior_, zero_shot)
        self.truncation_ = truncation and losses(
            truncation, solution.assignments, solution.tail_mass
        )
        if zero_shot is not prior_:
            self.zero_shot_labels_, self.zero_shot_confidences_ = zero_shot.predict(features)
        return self

    def _truncation(self, features: Rows, prior: Prior) -> Truncation | None:
        """What is kept of a row, and with it who computes."""
        ids = sample_ids(len(features), features.device)
        truncation = choose_truncation(
            prior.at(ids, features[ids]),
            len(features),
            kl_weight=self.kl_weight_,
            most=self.layout_.candidates,
            candidates=self.candidates,
            rank=self.rank,
        )
        self.backend_ = choose_backend(self.backend, features.device, truncation)
        if self.precision == "float16" and self.backend_ != "triton":
            raise InputError(
                f"precision='float16' is for backend='triton', here {self.backend_} computes; "
                "leave precision out"
            )
        return truncation

    def _graph(
        self,
        graph: NeighborGraph | Callable[[Rows], NeighborGraph] | None,
        features: Rows,
        anchors: Any,
    ) -> NeighborGraph:
        if graph is None:
            graph = build_graph(features, self.n_neighbors, anchors=anchors, device=features.device)
        elif not isinstance(graph, NeighborGraph):
            if not callable(graph):
                raise InputError(f"graph: expected a NeighborGraph, got {type(graph).__name__}")
            graph = graph(features)
        return graph.check(len(features), self.n_neighbors)

    def form(self) -> str:
        """Of the assignments, as far as the parameters decide it."""
        if self.assignments != "auto":
            return self.assignments
        compiled = self.backend in ("numba", "triton") or self.precision == "float16"
        only_sparse = compiled or self.candidates or self.rank
        return "sparse" if only_sparse else "auto"

    def _identity(self, gamma: float, truncation: Truncation | None) -> dict[str, Any]:
        """What the result of a run depends on beside the arrays given to `fit`."""
        parameters = asdict(self)
        del parameters["memory"]
        return parameters | {
            "kl_weight": self.kl_weight_,
            "gamma": gamma,
            "truncation": truncation and asdict(truncation),
            "backend": self.backend_,
            "device": self.device_.type,
            "graph_sha256": self.graph_.sha256(),
        }

    def _keep(self, solution: Solution, prior: Prior, zero_shot: Prior) -> None:
        """Set the attributes, and what `predict_proba` and `tensors` need of the fit."""
        self._mixture = solution.mixture
        # A given prior (N, K) is of these rows only.
        self._prior = prior if isinstance(prior, LinearPrior) else None
        self._zero_shot = zero_shot if isinstance(zero_shot, LinearPrior) else None
        self.zero_shot_labels_ = solution.prior_labels.cpu().numpy()
        self.zero_shot_confidences_ = solution.prior_confidences.cpu().numpy()
        self.label_distributions_ = solution.assignments.numpy()
        self.transduction_ = solution.assignments.best()[0].cpu().numpy()
        self.means_ = solution.mixture.means.float().cpu().numpy()
        self.variances_ = solution.mixture.variances.float().cpu().numpy()
        self.n_iter_ = solution.n_iter
        self.objective_ = np.array(solution.objective)

    @exact_float32()
    def predict_proba(self, X: Any, *, prior: Any = None, prior_logits: Any = None) -> np.ndarray:
        """
        Class probabilities of new rows from the fitted mixture and the prior, without neighbours.

        Parameters
        ----------
        X : array_like (N, d)
        prior, prior_logits : array_like (N, K), optional
            Of the new rows; needed after a fit with `prior` or `prior_logits`, and only then.

        Returns
        -------
        ndarray (N, K) float32

        Raises
        ------
        InputError
            As `fit`; a prior that is missing, or given where the fit was linear.
        """
        if not hasattr(self, "_mixture"):
            raise InputError("predict_proba: call fit first")
        device, (n_classes, d) = self._mixture.means.device, self._mixture.means.shape
        features = as_unit_rows(X, "X", columns=d).to(device)
        given = prior is not None or prior_logits is not None
        if given == (self._prior is not None):
            raise InputError(
                "predict_proba: the fit took its prior from prototypes; give no prior here"
                if given
                else "predict_proba: the fit was given a prior; give prior or prior_logits again"
            )
        new_prior = (
            self._prior
            or make_priors(
                (len(features), d),
                device,
                self.logit_scale,
                prior=prior,
                prior_logits=prior_logits,
            )[0]
        )
        if new_prior.n_classes != n_classes:
            raise InputError(f"prior: has {new_prior.n_classes} classes, the fit {n_classes}")
        z = predict(
            features,
            self._mixture,
            new_prior,
            likelihood_weight=self.likelihood_weight,
            kl_weight=self.kl_weight_,
        )
        return z.cpu().numpy()

    def tensors(self) -> dict[str, torch.Tensor]:
        """
        All that labels new rows later, on the CPU.

        `means` (K, d) and `variances` (d,) float64; `prior_weights` (K, d) float32, tau times the
        prototypes of a linear prior, centred; `zero_shot_weights`, the same of text features
        beside another prior.
        """
        found = {"means": self._mixture.means, "variances": self._mixture.variances}
        if self._prior is not None:
            found["prior_weights"] = self._prior.weights
        if self._zero_shot is not None and self._zero_shot is not self._prior:
            found["zero_shot_weights"] = self._zero_shot.weights
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}

    def check(self) -> None:
        """Raise InputError for a parameter outside its range."""
        super().check()
        parse_memory(self.memory)
        if self.gamma is not None:
            check_weight("gamma", self.gamma)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name}={getattr(self, name)!r} is not available in this version; "
                    f"choose {' or '.join(map(repr, allowed))}"
                )
        for name in ("candidates", "rank"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value, 1)
                if self.assignments == "dense":
                    raise InputError(f"{name}: dense assignments keep every class; leave it out")


def _most_accurate(
    runs: Iterable[tuple[float, Solution]], validation: tuple[np.ndarray, np.ndarray] | None
) -> tuple[float, Solution]:
    """The first of the runs that label the validation rows' most similar queries best."""

    def accuracy(run: tuple[float, Solution]) -> float:
        if validation is None:
            return 0.0
        queries, labels = validation
        predicted = run[1].assignments.best()[0].cpu().numpy()
        return float((predicted[queries] == labels).mean())

    return max(runs, key=accuracy)
