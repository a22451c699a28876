"""The input of a method: checked rows on their device, and the texts and shots of classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from transclip_fast.callbacks import Count
from transclip_fast.data.checks import POSITIONS, as_tensor, unread_matrix
from transclip_fast.data.feature_rows import Rows, unit
from transclip_fast.data.labelled_rows import LabelledRows, as_labelled_rows
from transclip_fast.data.npy_shards import StoredRows
from transclip_fast.data.texts import ensemble
from transclip_fast.errors import InputError, user_level
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.metrics import check_class_order
from transclip_fast.solver.mixture import Moments

ANCHORS = ("shots", "texts", "both", "probabilities")  # most methods were published with the first
Pair = tuple[Any, Any]  # rows and labels as given, or None and None
PROBABILITY_SCALE = 30.0  # of EM-Dirichlet's softmax


def moments_of(labelled: LabelledRows, n_classes: int) -> Moments:
    """Sums and numbers of the rows of each class."""
    return Moments.of(labelled.features, labelled.labels, n_classes)


def class_means(moments: Moments) -> torch.Tensor:
    """Mean row of each class, (K, d) float64, not scaled to unit norm."""
    return moments.sums / moments.counts[:, None]


@dataclass(frozen=True)
class Arrays:
    """The checked arrays of a fit, on the CPU; the features (N, d) are not read yet."""

    features: torch.Tensor | StoredRows
    in_file: bool
    texts: torch.Tensor | None  # (K, d), unit rows
    shots: LabelledRows | None
    validation: LabelledRows | None
    n_classes: int

    @property
    def prototypes(self) -> torch.Tensor:
        """Unit rows of the classes (K, d): the texts, or without any the mean shots."""
        if self.texts is not None:
            return self.texts
        if self.shots is None:
            raise TypeError("there are neither texts nor shots")
        return unit(class_means(moments_of(self.shots, self.n_classes)))

    def n_labelled(self, anchors: str) -> int:
        """Rows that a method with these anchors, one of ANCHORS, learns the classes from."""
        texts, shots = (0 if x is None else len(x) for x in (self.texts, self.shots))
        both = {"texts": texts, "both": texts + shots}
        return both.get(anchors, shots or texts)

    @classmethod
    def check(cls, X: Any, text_features: Any, shots: Pair, validation: Pair) -> Arrays:
        """
        Check arrays; `shots` and `validation` are pairs of rows and labels, or of None and None.

        Raises
        ------
        InputError
            As `TransCLIP.fit`, and for less than two classes or neither texts nor shots.
        """
        matrix = unread_matrix(X, "X")
        dim = matrix.shape[1]
        texts = None if text_features is None else ensemble(text_features, columns=dim).cpu()
        n_classes = _classes_of(shots[1]) if texts is None else len(texts)
        if n_classes < 2:
            name = "support_labels" if texts is None else "text_features"
            raise InputError(f"{name}: a method chooses between classes, and there is only one")
        return cls(
            matrix,
            isinstance(X, np.memmap | StoredRows),
            texts,
            _labelled("support", *shots, texts, dim, n_classes),
            _labelled("validation", *validation, texts, dim, n_classes),
            n_classes,
        )


def _labelled(
    name: str, rows: Any, labels: Any, texts: torch.Tensor | None, dim: int, n_classes: int
) -> LabelledRows | None:
    """Checked rows of "support" or "validation", with a warning if texts contradict them."""
    labelled = as_labelled_rows(name, rows, labels, dim, n_classes)
    if labelled is not None and texts is not None:
        zero_shot = (labelled.features @ texts.T).argmax(1).numpy()
        for message in check_class_order(zero_shot, labelled.labels.numpy()):
            warnings.warn(f"{name}_labels: {message}", stacklevel=user_level())
    return labelled


def _classes_of(labels: Any) -> int:
    """K, where nothing but the labels of the shots tells it."""
    if labels is None:
        raise InputError("no text features and no shots: give text_features or support_features")
    tensor = as_tensor(labels, "support_labels", POSITIONS)
    if tensor.ndim == 2 and tensor.shape[1] > 1:  # one-hot
        return int(tensor.shape[1])
    n_classes = int(tensor.double().nan_to_num(0.0).max()) + 1 if tensor.numel() else 0
    if n_classes > tensor.numel() > 0:
        raise InputError(
            f"support_labels: {tensor.numel()} shots and labels up to {n_classes - 1}: some class "
            "has no shot; give one of every class, or text_features"
        )
    return n_classes


@dataclass(frozen=True)
class Task:
    """
    One fit of a method.

    Parameters
    ----------
    rows, features : Rows (N, d)
        Unit rows, and what `anchored` made of them.
    texts : Tensor (K, d), optional
        Unit rows.
    shots, labelled : LabelledRows, optional
        The shots, and the rows that the method learns classes from: what `anchored` chose.
    n_classes : int
        K.
    logit_scale : float
        tau of zero-shot.
    graph : callable
        Returns the graph with so many neighbours of each row.
    progress : callable
        Called with the steps done and the steps in all.
    """

    rows: Rows
    features: Rows
    texts: torch.Tensor | None
    shots: LabelledRows | None
    n_classes: int
    logit_scale: float
    graph: Callable[[int], NeighborGraph]
    progress: Count = lambda done, steps: None
    anchors: LabelledRows | None = None

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.features.device

    @property
    def labelled(self) -> LabelledRows:
        """The rows that the method learns the classes from."""
        if self.anchors is None:
            raise TypeError("the method takes no labelled rows")
        return self.anchors

    @property
    def class_texts(self) -> torch.Tensor:
        """The texts (K, d); only methods that need them ask for them."""
        if self.texts is None:
            raise TypeError("there are no texts")
        return self.texts

    @cached_property
    def moments(self) -> Moments:
        """Sums and numbers of the labelled rows of each class."""
        return moments_of(self.labelled, self.n_classes)

    @cached_property
    def means(self) -> torch.Tensor:
        """Mean labelled row of each class, (K, d) float64, not scaled to unit norm."""
        return class_means(self.moments)

    def anchored(self, anchors: str, name: str, *, every_class: bool = True) -> Task:
        """
        The task with the labelled rows of `anchors`, one of ANCHORS; `name` is that of the method.

        "texts" makes each text one more shot, "probabilities" makes softmax(30 x T^T) of all rows,
        and labels them by the shots, or by the texts where there are no shots.

        Raises
        ------
        InputError
            No texts or no shots where `anchors` needs them, or a class without any labelled row.
        """
        texts, shots = self.texts, self.shots
        if texts is None and anchors != "shots":
            raise InputError(f"{name} with anchors {anchors!r} needs text_features")
        if shots is None and anchors in ("shots", "both"):
            raise InputError(
                f"{name} with anchors {anchors!r} needs shots: give support_features and "
                "support_labels, or choose anchors 'texts'"
            )
        parts = [] if shots is None or anchors == "texts" else [shots]
        if texts is not None and (anchors in ("texts", "both") or shots is None):
            parts = [LabelledRows(texts, torch.arange(len(texts), device=texts.device)), *parts]
        labelled = LabelledRows.joined(parts)
        counts = torch.bincount(labelled.labels, minlength=self.n_classes)
        if every_class and not counts.all():
            missing = int((counts == 0).nonzero()[0, 0])
            raise InputError(
                f"support_labels: class {missing} has no shot, and {name} with anchors "
                f"{anchors!r} needs one of every class; give it, or choose anchors 'both'"
            )
        if anchors != "probabilities":
            return replace(self, anchors=labelled)
        weights = PROBABILITY_SCALE * self.class_texts

        def probabilities(rows: torch.Tensor) -> torch.Tensor:
            return (rows @ weights.T).softmax(-1)

        features = self.rows.mapped(probabilities, self.n_classes)
        anchored = LabelledRows(probabilities(labelled.features), labelled.labels)
        return replace(self, features=features, anchors=anchored)
