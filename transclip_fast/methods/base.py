"""The interface of every method: settings, their choice on validation rows, and attributes."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from numbers import Integral, Real
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

import torch

from transclip_fast.callbacks import Count
from transclip_fast.data.checks import first_row
from transclip_fast.data.feature_rows import Rows
from transclip_fast.data.labelled_rows import LabelledRows
from transclip_fast.data.texts import texts_of_fit
from transclip_fast.device import current_device, exact_float32, resolve_device
from transclip_fast.errors import InputError
from transclip_fast.graph.exact import nearest
from transclip_fast.graph.given import given_graph
from transclip_fast.graph.neighbor_graph import GraphSource, NeighborGraph
from transclip_fast.memory import limit_of, parse_memory, show_bytes
from transclip_fast.methods.task import ANCHORS, Arrays, Task
from transclip_fast.parallel import flushed_denormals, single_threaded_torch
from transclip_fast.solver.layout import PROCESS_BYTES
from transclip_fast.solver.parameters import Chosen, check_scale, check_weight

Fitted = TypeVar("Fitted", bound="Method")
Values = SimpleNamespace  # settings by name, all of them set
EDGE_BYTES = 128  # of a neighbour in a graph: both ends of the edge, and copies of sorting them
LEARNED_COPIES = 6  # float64, of the rows that classes are learned from


@dataclass(frozen=True)
class Setting:
    """
    A setting of a method.

    Parameters
    ----------
    default : float
        As published.
    values : tuple
        The published grid, in the order in which the first of equal ones wins; () for none.
    least, most : float
        The smallest and the largest value allowed.
    whole : bool
        Whether it is a whole number.
    """

    default: float
    values: tuple[float, ...] = ()
    least: float = 0.0
    most: float = math.inf
    whole: bool = False

    def check(self, name: str, value: Any) -> float:
        """The value as an int or a float; InputError if it is no such number."""
        number = float(value) if isinstance(value, Real) else math.nan
        right = Integral if self.whole else Real
        if isinstance(value, bool) or not isinstance(value, right) or not math.isfinite(number):
            raise InputError(f"{name} must be a {'whole ' * self.whole}number, got {value!r}")
        if not self.least <= number <= self.most:
            most = "" if self.most == math.inf else f" and at most {self.most:g}"
            raise InputError(f"{name} must be at least {self.least:g}{most}, got {value!r}")
        return int(number) if self.whole else number


Grid = Mapping[str, Setting]  # the settings of a method by name


@dataclass(frozen=True)
class Answer:
    """z (N, K) float32 of a run, and the steps that it took."""

    z: torch.Tensor
    n_iter: int


class Method(ABC):
    """
    A classifier of all rows at once, fitted as `transclip_fast.TransCLIP` is.

    `fit` takes the same rows, texts, shots, validation rows and graph, and the attributes below
    mean the same. There is no other prior, and no prediction for new rows.

    Parameters
    ----------
    anchors : {"shots", "texts", "both", "probabilities"}, optional
        What text means to the method, by default as it was published, the first of `kinds`. The
        labelled rows are the shots, the texts, or both together; "probabilities" replaces all rows
        by softmax(30 x T^T), and takes the shots, without any the texts, as labelled.
    device : str
        "auto" (CUDA if there is a GPU), "cpu", "cuda", ...
    logit_scale : float
        tau of zero-shot.
    memory : str or int, optional
        Memory of the process, or its part of a GPU, as "8GiB"; by default what is free. A fit that
        needs more is refused.
    **settings
        Of `grid`. Those left out are chosen on the validation rows, the first best of their grid,
        or have their published defaults if there are no such rows or no grid.

    Attributes
    ----------
    label_distributions_ : ndarray (N, K) float32
    transduction_ : ndarray (N,) int64
    n_iter_ : int
        Steps of the run that was chosen.
    chosen_ : Chosen
        The settings, and the number of runs that they are the best of.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ANCHORS  # that make sense, the published one first
    grid: ClassVar[Grid] = {}
    balanced: ClassVar[bool] = False  # assumes that all classes are equally frequent
    needs_graph: ClassVar[bool] = True  # where it has the setting n_neighbors
    every_class: ClassVar[bool] = True  # needs a labelled row of every class
    # Arrays that are held at a time, of N rows and of M that classes are learned from,
    matrices: ClassVar[int] = 2  # (N, K) float32,
    class_arrays: ClassVar[int] = 10  # (K, d) float64,
    learned_arrays: ClassVar[int] = 0  # and (M, K) float64.

    def __init__(
        self,
        /,  # a user may call a setting anything
        *,
        anchors: str | None = None,
        device: str = "auto",
        logit_scale: float = 100.0,
        memory: str | int | None = None,
        **settings: Any,
    ) -> None:
        anchors = anchors or self.kinds[0]
        if anchors not in ANCHORS:
            raise InputError(f"anchors must be one of {', '.join(ANCHORS)}, got {anchors!r}")
        if anchors not in self.kinds:
            raise InputError(f"{self.name} takes anchors {', '.join(self.kinds)}, not {anchors}")
        for name in settings:
            if name not in self.grid:
                known = ", ".join(self.grid) or "none"
                raise InputError(f"{self.name} has no setting {name!r}; its settings: {known}")
        check_weight("logit_scale", logit_scale)
        check_scale(logit_scale)
        parse_memory(memory)
        self.anchors, self.device = anchors, device
        self.logit_scale, self.memory = logit_scale, memory
        self.settings = {k: self.grid[k].check(k, value) for k, value in settings.items()}

    def __repr__(self) -> str:
        shown = {"anchors": self.anchors, **self.settings}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in shown.items())})"

    @classmethod
    def possible_anchors(cls, *, texts: bool, shots: bool) -> str | None:
        """The anchors nearest to the published ones with what there is; None if nothing will do."""
        for kind in cls.kinds:
            wants_texts, wants_shots = kind != "shots", kind in ("shots", "both")
            if texts >= wants_texts and shots >= wants_shots:
                return kind
        return None

    @property
    def assumes_balanced(self) -> bool:
        """Whether it assumes that all classes are equally frequent."""
        return self.balanced

    @abstractmethod
    def solve(self, task: Task, s: Values) -> Answer:
        """One run on the anchored task."""

    def neighbors_needed(self, *, searched: bool) -> int:
        """Neighbours of a row in the graph, the most of all runs; 0 if it needs no graph."""
        if not self.needs_graph or "n_neighbors" not in self.grid:
            return 0
        return max(int(run["n_neighbors"]) for run in self.runs(searched=searched))

    @property
    def open_settings(self) -> dict[str, Setting]:
        """The settings that validation rows choose."""
        return {k: s for k, s in self.grid.items() if s.values and k not in self.settings}

    def runs(self, *, searched: bool) -> Iterator[dict[str, Any]]:
        """All settings of every run; `searched` where there are validation rows."""
        choices = []
        for name, setting in self.grid.items():
            value = self.settings.get(name, setting.default)
            open_ = searched and name in self.open_settings
            choices.append(setting.values if open_ else (value,))
        for values in itertools.product(*choices):
            yield dict(zip(self.grid, values, strict=True))

    @exact_float32()
    def fit(
        self: Fitted,
        X: Any,
        y: Any = None,
        *,
        text_features: Any = None,
        support_features: Any = None,
        support_labels: Any = None,
        validation_features: Any = None,
        validation_labels: Any = None,
        graph: GraphSource = None,
        progress: Count | None = None,
    ) -> Fitted:
        """
        Label the rows of X; arrays as those of `TransCLIP.fit`.

        Parameters
        ----------
        X : array_like (N, d)
        y : array_like, optional
            As in `TransCLIP.fit`: labels, from which nothing is learned, or texts.
        text_features : array_like (K, d) or (P, K, d), optional
            Without texts K is that of the shots' labels.
        support_features, support_labels : array_like (M, d), (M,), optional
        validation_features, validation_labels : array_like (V, d), (V,), optional
            They choose the settings left open: most of them have the label of their most similar
            query.
        graph : NeighborGraph or callable, optional
            By default `build_graph`, if the method needs one.
        progress : callable, optional
            Called with the steps done and the steps in all.

        Raises
        ------
        InputError
            Arrays that cannot be used, a class without labelled rows, or too little memory.
        """
        instead = "those rows as support_features and support_labels"
        text_features = texts_of_fit(text_features, y, X, instead)
        shots = support_features, support_labels
        arrays = Arrays.check(X, text_features, shots, (validation_features, validation_labels))
        runs = list(self.runs(searched=arrays.validation is not None))
        device = resolve_device(self.device)
        with current_device(device), flushed_denormals(), single_threaded_torch(device):
            held = self._check_memory(arrays, runs, device)
            features = Rows(X, "X", device, held=held)
            task = self._task(arrays, features, graph)
            on_validation = _accuracy(arrays.validation, features)
            best = -math.inf
            for number, settings in enumerate(runs):
                run = replace(task, progress=_of_run(progress, number, len(runs)))
                found = self.solve(run, SimpleNamespace(**settings))
                self._check_finite(found.z, settings)
                if (score := on_validation(found.z)) > best:
                    best, solution, chosen = score, found, settings
        self.label_distributions_ = solution.z.cpu().numpy()
        self.transduction_ = solution.z.argmax(1).cpu().numpy()
        self.n_iter_, self.chosen_ = solution.n_iter, Chosen(chosen, len(runs))
        return self

    def _task(self, arrays: Arrays, features: Rows, graph: GraphSource) -> Task:
        """The task of every run."""
        most = self.neighbors_needed(searched=arrays.validation is not None)

        @cache
        def whole() -> NeighborGraph:
            return given_graph(graph, features, most)

        device = features.device
        task = Task(
            rows=features,
            features=features,
            texts=None if arrays.texts is None else arrays.texts.to(device),
            shots=None if arrays.shots is None else arrays.shots.to(device),
            n_classes=arrays.n_classes,
            logit_scale=self.logit_scale,
            graph=lambda k: whole().check(len(features), k),
        )
        return task.anchored(self.anchors, self.name, every_class=self.every_class)

    def _check_finite(self, z: torch.Tensor, settings: Mapping[str, Any]) -> None:
        """Raise InputError if a row of z (N, K) is not finite."""
        if (row := first_row(~z.sum(1).isfinite())) is not None:
            shown = ", ".join(f"{name} {value:g}" for name, value in settings.items())
            raise InputError(
                f"{self.name}: row {row} has no finite answer with {shown}; choose others"
            )

    def learned_rows(self, arrays: Arrays, run: Mapping[str, Any]) -> int:
        """Rows that the classes of a run are learned from."""
        return arrays.n_labelled(self.anchors)

    def other_bytes(self, arrays: Arrays, run: Mapping[str, Any]) -> int:
        """The most bytes of a run beside the features and its (N, K) arrays."""
        (n_rows, dim), n_classes = arrays.features.shape, arrays.n_classes
        dim = n_classes if self.anchors == "probabilities" else dim
        one = LEARNED_COPIES * dim + self.learned_arrays * n_classes
        entries = self.class_arrays * n_classes * dim + self.learned_rows(arrays, run) * one
        edges: int = n_rows * run.get("n_neighbors", 0)
        return 8 * entries + EDGE_BYTES * edges

    def _check_memory(
        self, arrays: Arrays, runs: list[dict[str, Any]], device: torch.device
    ) -> bool:
        """Whether the features are held on the device; InputError if nothing fits."""
        (n_rows, dim), n_classes = arrays.features.shape, arrays.n_classes
        on_cpu = device.type == "cpu"
        matrices = self.matrices + (len(runs) > 1)  # the best run is kept
        own = 0 if arrays.in_file else n_rows * dim * arrays.features.dtype.itemsize
        needed = 4 * matrices * n_rows * n_classes + (PROCESS_BYTES + own if on_cpu else 0)
        needed += max(self.other_bytes(arrays, run) for run in runs)
        limit = limit_of(device, parse_memory(self.memory))
        if needed > limit:
            raise InputError(
                f"memory: {self.name} keeps {matrices} arrays of {n_rows:,} rows and "
                f"{n_classes:,} classes, with all else {show_bytes(needed)}; there are "
                f"{show_bytes(limit)}: allow more, or take fewer rows at a time"
            )
        return needed + 4 * n_rows * dim <= limit


def _accuracy(validation: LabelledRows | None, features: Rows) -> Callable[[torch.Tensor], float]:
    """Return a function of z (N, K): the share of validation rows whose nearest query is right."""
    if validation is None:
        return lambda z: 0.0
    labelled = validation.to(features.device)
    queries = nearest(labelled.features, features, 1)[0][:, 0]
    return lambda z: float((z[queries].argmax(1) == labelled.labels).double().mean())


def _of_run(progress: Count | None, number: int, n_runs: int) -> Count:
    """Return a function that reports the steps of one of the runs."""
    if progress is None:
        return lambda done, steps: None
    return lambda done, steps: progress(number * steps + done, n_runs * steps)
