"""TransCLIP as a scikit-learn estimator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from transclip_fast.callbacks import Checkpoint, Progress
from transclip_fast.data.checks import as_labels, as_row_weights, as_unit_rows
from transclip_fast.data.feature_rows import Rows, evenly_spaced_rows
from transclip_fast.data.texts import texts_of_fit
from transclip_fast.device import current_device, exact_float32
from transclip_fast.errors import InputError, not_fitted
from transclip_fast.graph.build import COMPARED_ROWS, build_graph, whole_rows
from transclip_fast.graph.given import given_graph
from transclip_fast.graph.neighbor_graph import GraphSource, NeighborGraph
from transclip_fast.metrics import outlier_scores
from transclip_fast.ops.ranked import RankedRows, neighbor_places
from transclip_fast.progress_bar import progress_bar, shown_on
from transclip_fast.ranks import check_same, current_ranks
from transclip_fast.solver.loop import predict
from transclip_fast.solver.parameters import Chosen, Parameters
from transclip_fast.solver.prior import LinearPrior, Prior, given_prior, most_likely
from transclip_fast.solver.problem import Inputs, Problem, Settings
from transclip_fast.solver.runs import solve_each
from transclip_fast.solver.state import Solution
from transclip_fast.solver.truncation import losses


@dataclass(kw_only=True, eq=False, repr=False)
class TransCLIP(Parameters):
    """
    Transductive classification of the features of a CLIP-like model.

    All queries are classified jointly: a Gaussian mixture over the image features, messages
    between nearest neighbours, and a KL term that ties the assignments to the text prediction. By
    default this is the published method, but where few of the classes occur: see `class_cost`.

    Parameters
    ----------
    n_neighbors : int, default 3
        k, neighbours of each query in the graph.
    max_iter : int, default 10
        Outer steps: assignments, means, variance. One last update of z follows them.
    inner_iter : int, default 5
        Sweeps over the assignments in each step.
    tol : float, default 0
        Stop when a step changes the objective by less than `tol` per query; 0 takes every step.
    logit_scale : float, default 100
        tau, 1 / temperature: the text prediction is the softmax of tau times the cosines.
    kl_weight : float, optional
        lambda, the tie to the prior; by default 0.5 few-shot, where there is a gamma, and else 1.
    likelihood_weight : float, default 1 / 50
        Weight of the mixture term.
    unit_means, update_means, update_variance : bool, default True
        Keep the means on the unit sphere; update them at all; update the variance.
    covariance : {"diagonal", "isotropic"}, default "diagonal"
        Shape of the covariance that all classes share.
    graph_mode : {"symmetric", "directed"}, default "symmetric"
        Messages through (W + W^T) / 2k, or through W / k; those of shots always through W / 2k.
    clamp_similarity : bool, default False
        Edge weights are max(0, cosine).
    gamma : float, optional
        Few-shot only, without shots it has no effect: weight of the labelled rows. By default the
        best of 0.002, 0.01, 0.02 and 0.2 on a validation set; without one 0.00125 for each shot of
        a class; with few or uneven shots none: see `support_features` of `fit`.
    class_cost : {"auto", True, False}, default "auto"
        Charge for each class in use, so that absent classes take no rows. "auto" does so where the
        prior spreads over less than a quarter of the classes, up to 0.8 of them if its labels are
        more plausible than those without (`solver.class_cost`), and with a gamma never.
    device : str, default "auto"
        "auto" (CUDA if there is a GPU), "cpu", "cuda", "cuda:1", ...
    assignments : {"auto", "dense", "sparse"}, default "auto"
        Keep z whole, or of each row only the largest entries: memory and time of a sweep then do
        not grow with K. "auto" takes the faster one that fits into memory.
    candidates : int, optional
        Sparse only: classes of a row that messages can reach; by default as many as a sample of
        the prior needs and memory allows.
    rank : int, optional
        Sparse only: entries of z that a row keeps, by default all candidates. With both at K, all.
    precision : {"float32", "float16"}, default "float32"
        Of the features in products; sums are float32 and more. float16 needs backend triton.
    memory : str or int, optional
        Memory that may be used, "8GiB" or a number of bytes: by the process, and on a GPU by what
        is on it; by default what is free. It decides whether features are held on the device or
        read in every pass, and how many candidates there are at most.
    backend : {"auto", "torch", "triton", "numba"}, default "auto"
        Implementation: triton on a GPU, numba for sparse assignments on a CPU, torch for the rest.
    verbose : bool, default False
        Show a progress bar, in a terminal or a notebook.

    Attributes
    ----------
    transduction_ : ndarray (N,) int64
        Label of each query.
    label_distributions_ : ndarray or scipy.sparse.csr_array (N, K) float32
        Assignments z; in CSR when sparse; rows then sum to 1 less the dropped mass.
    classes_ : ndarray (K,) int64
        0 .. K - 1, the labels: positions in the list of classes.
    n_features_in_ : int
        d.
    truncation_ : dict or None
        Of a sparse fit: `candidates`, `rank` and `floor`; `mean_dropped`, the mean mass of z that
        was left out, and `tail_mass`, the largest mass of a row outside its candidates;
        `largest_bound` and `mean_bound`, over the rows, of the mass that the last sweep misplaced
        because messages reached classes that are no candidates.
    means_ : ndarray (K, d) float32
    variances_ : ndarray (d,) float32
    n_iter_ : int
        Outer steps taken.
    objective_ : ndarray (n_iter_ + 1,) float64
        L after each outer step, and at the end.
    changed_ : ndarray (n_iter_ + 1,) int64
        Labels that each of these steps changed.
    gamma_ : float or None
        The gamma used; None in zero-shot, also with few or uneven shots.
    kl_weight_ : float
        The lambda used.
    chosen_ : Chosen
        Both, and how many values of gamma they are the best of.
    n_effective_classes_ : float
        Classes over which the prior spreads, made as confident as neighbours agree on its labels:
        exp of the entropy of its mean over the queries.
    class_costs_ : ndarray (K,) float64 or None
        Nats by which a class's score is lowered, at its mass in z; None in the published method.
    device_ : torch.device
        The device used.
    backend_ : str
        The backend used.
    layout_ : transclip_fast.solver.layout.Layout
        The memory layout of the solve.
    graph_ : NeighborGraph
        The graph used.
    calibrated_confidences_ : ndarray (N,) float32
        How likely each label is right, between 0 and 1, which its z overrates: see
        `transclip_fast.solver.confidence`. 1 for known labels.
    outlier_score_ : ndarray (N,) float32
        How little each query and its neighbours look like any class, from 0 to 1: what zero-shot
        leaves of their probability beside the first class. 0 for known labels.
    rows_ : slice
        The rows of X that the attributes of shape (N, ...) are about: all, unless the processes of
        a group share them.
    zero_shot_labels_ : ndarray (N,) int64
    zero_shot_confidences_ : ndarray (N,) float32
        Prediction of the text features alone; without text features, that of the prior.

    References
    ----------
    Zanella, Gerin, Ben Ayed. Boosting Vision-Language Models with Transduction. NeurIPS 2024.

    Examples
    --------
    Two classes, images around either text:

    >>> import numpy as np
    >>> from transclip_fast import TransCLIP
    >>> texts = np.eye(2, 16)
    >>> images = texts[[0, 0, 0, 1, 1, 1]] + 0.1 * np.random.default_rng(0).normal(size=(6, 16))
    >>> images /= np.linalg.norm(images, axis=1, keepdims=True)
    >>> model = TransCLIP(device="cpu").fit(images, text_features=texts)
    >>> model.transduction_
    array([0, 0, 0, 1, 1, 1])
    >>> model.label_distributions_.shape
    (6, 2)
    >>> model.predict(images[:2])
    array([0, 0])
    """

    @exact_float32()
    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        text_features: Any = None,
        prior: Any = None,
        prior_logits: Any = None,
        prototypes: Any = None,
        support_features: Any = None,
        support_labels: Any = None,
        validation_features: Any = None,
        validation_labels: Any = None,
        known_labels: Any = None,
        graph: GraphSource = None,
        progress: Callable[[Progress], None] | None = None,
        checkpoint: Callable[[str, dict[str, Any]], Checkpoint] | None = None,
    ) -> TransCLIP:
        """
        Label the rows of X jointly. Arrays are numpy or torch, of any float type, never modified.

        In an initialised process group of torch.distributed all processes call this with the same
        arguments and share the work: each holds some consecutive rows, `rows_`, and what it fits
        of rows is about those.

        Parameters
        ----------
        X : array_like (N, d)
            Image features of the queries; rows off the unit sphere are normalised. A
            `numpy.memmap` or `transclip_fast.data.npy_shards.StoredRows` may be larger than memory.
        y : array_like (N,), optional
            Labels for scikit-learn's scores, from which nothing is learned: see `known_labels`.
            Without `text_features`, a (K, d) array here is taken as these.
        text_features : array_like (K, d) or (P, K, d), optional
            Text embedding of each class, or those of P templates, of which the mean counts: the
            prior, unless another is given; then only the zero-shot attributes come from it.
        prior : array_like or scipy sparse array (N, K), optional
            Probabilities of another method; what a sparse row leaves of its mass, but at least
            1e-6, is spread evenly over the classes it leaves out; or
        prior_logits : array_like (N, K), optional
            its logits, on the scale that a softmax takes; or
        prototypes : array_like (K, d), optional
            its class prototypes, used like text features.
        support_features, support_labels : array_like (M, d), (M,), optional
            Labelled rows. Few-shot, if gamma is set, or if all classes have equally many shots or
            at least four. Otherwise they leave all else as in zero-shot: each counts three times,
            as known labels do, and joins its most similar queries.
        validation_features, validation_labels : array_like (V, d), (V,), optional
            Labelled rows that choose gamma, few-shot and unless it is set: the one with which most
            of them have the label of their nearest query; of equal ones the first.
        known_labels : array_like (N,), optional
            Class of each query where it is known, -1 or NaN elsewhere: z is one-hot there, and the
            row counts three times in the means and the variance. Unlike shots, such rows may be few
            and of some classes only.
        graph : NeighborGraph or callable, optional
            Neighbour lists of X, by default of `build_graph`; or a function that makes them from
            its unit `transclip_fast.data.feature_rows.Rows`. A graph of other rows gives a warning.
        progress : callable, optional
            Called with a `transclip_fast.callbacks.Progress` after every block of rows that is
            read, from any thread, and after every outer step.
        checkpoint : callable, optional
            Returns a `transclip_fast.callbacks.Checkpoint` for a run, from its name and from the
            settings that its result depends on.

        Raises
        ------
        InputError
            Input that cannot be used: which, where, and the remedy.
        """
        self.check()
        instead = "known_labels=y" if known_labels is None else None
        text_features = texts_of_fit(text_features, y, X, instead)
        problem = Problem.check(
            X,
            text_features,
            logit_scale=self.logit_scale,
            prior=prior,
            prior_logits=prior_logits,
            prototypes=prototypes,
            support_features=support_features,
            support_labels=support_labels,
            validation_features=validation_features,
            validation_labels=validation_labels,
            known_labels=known_labels,
            ranks=current_ranks(),
        )
        settings = Settings.resolve(self, problem)
        return self.fit_problem(problem, settings, graph, progress=progress, checkpoint=checkpoint)

    @exact_float32()
    def fit_problem(
        self,
        problem: Problem,
        settings: Settings,
        graph: GraphSource = None,
        *,
        progress: Callable[[Progress], None] | None = None,
        checkpoint: Callable[[str, dict[str, Any]], Checkpoint] | None = None,
    ) -> TransCLIP:
        """`fit`, with its arrays checked and its settings resolved."""
        bar = progress_bar("solve", "rows") if self.verbose else nullcontext()
        with current_device(settings.device):
            inputs, gammas = problem.load(settings), problem.gammas(settings.parameters)
            graph = self._graph(graph, inputs.features, problem)
            with bar as show:
                report = progress if show is None else shown_on(show, progress)
                solutions = solve_each(inputs, graph, settings, gammas, report, checkpoint)
                solution = max(solutions, key=lambda run: run.accuracy(inputs))
            values = {"gamma": solution.gamma, "kl_weight": settings.kl_weight}
            self.chosen_ = Chosen(values, len(gammas))
            return self._keep(solution, inputs, settings, graph)

    def _graph(self, graph: GraphSource, features: Rows, problem: Problem) -> NeighborGraph:
        """The lists of own rows, checked."""
        if graph is None and isinstance(features, RankedRows):
            rows = whole_rows(problem.features, "X", features.device, held=not problem.in_file)
            return build_graph(rows, self.n_neighbors, own_rows=True)
        graph = given_graph(graph, features, self.n_neighbors)
        if not isinstance(features, RankedRows):
            return graph
        some = evenly_spaced_rows(len(graph), COMPARED_ROWS).numpy()
        sample = NeighborGraph(graph.neighbors[some], graph.similarities[some])
        check_same(features.exchange.ranks, {"graph": sample.sha256()})
        return graph.check(len(features), self.n_neighbors, features.own)

    def _keep(
        self, solution: Solution, inputs: Inputs, settings: Settings, graph: NeighborGraph
    ) -> TransCLIP:
        """Set the fitted attributes."""
        z, self._mixture = solution.assignments, solution.mixture
        self.rows_ = inputs.features.own
        # A prior (N, K) describes these rows only.
        self._prior = inputs.prior if isinstance(inputs.prior, LinearPrior) else None
        self._zero_shot = inputs.zero_shot if isinstance(inputs.zero_shot, LinearPrior) else None
        self.label_distributions_ = z.numpy()
        self.transduction_ = z.best()[0].cpu().numpy()
        self.truncation_ = settings.truncation and losses(
            settings.truncation, z, solution.tail_mass, inputs.features
        )
        self.means_ = self._mixture.means.float().cpu().numpy()
        self.variances_ = self._mixture.variances.float().cpu().numpy()
        self.n_iter_, self.objective_ = solution.n_iter, np.array(solution.history.objective)
        self.changed_ = np.array(solution.history.changed)
        self.classes_, self.n_features_in_ = np.arange(z.n_classes), self.means_.shape[1]
        self.gamma_, self.n_effective_classes_ = solution.gamma, solution.n_effective
        costs = self._class_costs = solution.class_costs
        self.class_costs_ = None if costs is None else costs.cpu().numpy().copy()
        self.kl_weight_, self.layout_ = settings.kl_weight, settings.layout
        self._likelihood_weight = settings.parameters.likelihood_weight
        self.device_, self.backend_, self.graph_ = settings.device, settings.backend, graph
        if inputs.zero_shot is inputs.prior:
            self.zero_shot_labels_ = solution.prior_labels.cpu().numpy()
            self.zero_shot_confidences_ = solution.prior_confidences.cpu().numpy()
        else:
            predicted = inputs.zero_shot.predict(inputs.features.local())
            self.zero_shot_labels_, self.zero_shot_confidences_ = predicted
        self.calibrated_confidences_ = solution.confidences.cpu().numpy()
        neighbors, extend = neighbor_places(inputs.features, graph.neighbors)
        self.outlier_score_ = outlier_scores(self.zero_shot_confidences_, neighbors, extend)
        if inputs.known is not None:
            self.outlier_score_[inputs.known.rows.cpu().numpy()] = 0
        return self

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
            As `fit`; a prior missing, twice or superfluous; no fit: sklearn's `NotFittedError`.
        """
        return torch.cat([*self._posteriors(X, prior, prior_logits)]).cpu().numpy()

    def predict(self, X: Any, *, prior: Any = None, prior_logits: Any = None) -> np.ndarray:
        """Most likely class (N,) int64 of new rows: see `predict_proba`."""
        return most_likely(self._posteriors(X, prior, prior_logits))[0]

    @exact_float32()
    def _posteriors(self, X: Any, prior: Any, prior_logits: Any) -> Iterator[torch.Tensor]:
        """z (n, K) of block after block of new rows."""
        if not hasattr(self, "_mixture"):
            raise not_fitted("predict_proba: call fit first")
        device, (n_classes, d) = self._mixture.means.device, self._mixture.means.shape
        given = prior is not None or prior_logits is not None
        if given == (self._prior is not None):
            had = "took its prior from texts or prototypes; give none here"
            lacks = "was given a prior; give prior or prior_logits again"
            raise InputError(f"predict_proba: the fit {had if given else lacks}")
        features = as_unit_rows(X, "X", columns=d).to(device)
        new_prior: Prior | None = self._prior
        if new_prior is None:
            new_prior = given_prior(prior, prior_logits, rows=len(features)).to(device)
        if new_prior.n_classes != n_classes:
            raise InputError(f"prior: has {new_prior.n_classes} classes, the fit {n_classes}")
        return predict(
            features,
            self._mixture,
            new_prior,
            likelihood_weight=self._likelihood_weight,
            kl_weight=self.kl_weight_,
            class_costs=self._class_costs,
        )

    def fit_predict(self, X: Any, y: Any = None, **arrays: Any) -> np.ndarray:
        """Labels (N,) int64 of the rows of X, solved jointly: `fit(X, ...).transduction_`."""
        return self.fit(X, y, **arrays).transduction_

    def score(self, X: Any, y: Any, sample_weight: Any = None, **prior: Any) -> float:
        """Accuracy of `predict(X, **prior)` for classes y (N,), from 0 to 1; weights (N,)."""
        predicted = self.predict(X, **prior)
        labels = as_labels(y, "y", rows=len(predicted), n_classes=len(self.classes_))
        weights = as_row_weights(sample_weight, "sample_weight", len(predicted))
        return float(np.average(predicted == labels.numpy(), weights=weights))

    def tensors(self) -> dict[str, torch.Tensor]:
        """
        The tensors that `predict_proba` needs later, on the CPU.

        `means` (K, d) and `variances` (d,) float64; `prior_weights` (K, d) float32, tau times the
        prototypes of a linear prior, centred; `zero_shot_weights`, the same of text features
        beside another prior; `class_costs` (K,) float64, if classes in use were charged.
        """
        if not hasattr(self, "_mixture"):
            raise not_fitted("tensors: call fit first")
        found = {"means": self._mixture.means, "variances": self._mixture.variances}
        if self._prior is not None:
            found["prior_weights"] = self._prior.weights
        if self._zero_shot is not None and self._zero_shot is not self._prior:
            found["zero_shot_weights"] = self._zero_shot.weights
        if self._class_costs is not None:
            found["class_costs"] = self._class_costs
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_mixture")
