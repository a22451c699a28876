"""Accuracies of a labelling, and warnings that its input looks wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

AVERAGES = 3  # over neighbours, of an outlier score
FEW_QUERIES = 20  # that may well be of one class
SWALLOWED = 0.5  # share of all queries in one class that is worth a warning
# Classes seem to be in another order if there are enough rows, if renaming them multiplies the
# accuracy and raises it by so many points, and if true classes have more distinct labels than
# random ones would, by so many standard deviations.
ORDER_ROWS, ORDER_FACTOR, ORDER_GAIN, ORDER_DEVIATIONS = 16, 3, 30.0, 1.5


def accuracy(labels: np.ndarray, truth: np.ndarray) -> float:
    """
    Share of rows whose label is the true one, in percent with four decimals.

    Of labels (N,) and truth (N,); rows whose truth is unknown, -1, do not count.
    """
    known = truth >= 0
    return round(100 * float(np.mean(labels[known] == truth[known])), 4)


@dataclass(frozen=True)
class Evaluation:
    """
    Accuracies in percent, changes by the joint solution, and the errors by class.

    `per_class` is (class, rows, zero-shot accuracy, accuracy) for each class that occurs, worst
    first; `confusions` is (true class, predicted class, rows), most frequent first; `corrected`
    and `broken` count rows that zero-shot had wrong and right; `warnings` are those of
    `check_class_order`. All of them are of the `n_labelled` rows whose truth is known, but
    `n_queries` and `n_flipped` count all rows.
    """

    accuracy: float
    zero_shot_accuracy: float
    mean_class_accuracy: float
    n_queries: int
    n_labelled: int
    n_flipped: int
    corrected: int
    broken: int
    per_class: list[tuple[int, int, float, float]]
    confusions: list[tuple[int, int, int]]
    warnings: list[str]


def evaluate(labels: np.ndarray, zero_shot: np.ndarray, truth: np.ndarray) -> Evaluation:
    """Compare labels (N,) and zero-shot labels (N,) with the truth (N,), -1 where unknown."""
    n_queries, n_flipped = len(labels), int((labels != zero_shot).sum())
    known = truth >= 0
    labels, zero_shot, truth = labels[known], zero_shot[known], truth[known]
    right, zero_shot_right = labels == truth, zero_shot == truth
    rows = np.bincount(truth)
    hits = np.bincount(truth[right], minlength=len(rows))
    zero_shot_hits = np.bincount(truth[zero_shot_right], minlength=len(rows))
    per_class = [
        (
            int(k),
            int(rows[k]),
            round(100 * float(zero_shot_hits[k] / rows[k]), 4),
            round(100 * float(hits[k] / rows[k]), 4),
        )
        for k in np.flatnonzero(rows)
    ]
    base = max(len(rows), int(labels.max()) + 1)
    pairs, counts = np.unique(truth[~right] * base + labels[~right], return_counts=True)
    frequent = np.argsort(-counts, kind="stable")
    return Evaluation(
        accuracy=accuracy(labels, truth),
        zero_shot_accuracy=accuracy(zero_shot, truth),
        mean_class_accuracy=round(float(np.mean([row[3] for row in per_class])), 4),
        n_queries=n_queries,
        n_labelled=len(labels),
        n_flipped=n_flipped,
        corrected=int((right & ~zero_shot_right).sum()),
        broken=int((~right & zero_shot_right).sum()),
        per_class=sorted(per_class, key=lambda row: (row[3], row[0])),
        confusions=[(*divmod(int(pairs[i]), base), int(counts[i])) for i in frequent],
        warnings=check_class_order(zero_shot, truth),
    )


def outlier_scores(
    confidences: np.ndarray,
    neighbors: np.ndarray,
    extend: Callable[[np.ndarray], np.ndarray] = lambda scores: scores,
) -> np.ndarray:
    """
    How little each row looks like any class of the list, (N,) float32 between 0 and 1.

    What zero-shot leaves of a row's probability beside its first class, averaged three times over
    the row and its `neighbors` (N, k), -1 where there is none. `bench.accuracy.outliers` holds it
    against `confidences` (N,) alone. `extend` appends the scores of rows of other processes, which
    `neighbors` may name, too.
    """
    scores = 1 - confidences.astype(np.float32)
    present = neighbors >= 0
    for _ in range(AVERAGES):
        received = np.where(present, extend(scores)[neighbors], 0)
        scores = (scores + received.sum(1)) / (1 + present.sum(1))
    found: np.ndarray = scores.astype(np.float32)
    return found


def rejected_rows(scores: np.ndarray, share: float) -> np.ndarray:
    """The `share` of rows, bool (N,), with the highest scores (N,), of equal ones the first."""
    rejected = np.zeros(len(scores), bool)
    rejected[np.argsort(-scores, kind="stable")[: round(share * len(scores))]] = True
    return rejected


def check_assignments(
    labels: np.ndarray,
    zero_shot: np.ndarray,
    n_classes: int,
    names: Sequence[str] | None = None,
    *,
    charged: bool = False,
) -> list[str]:
    """
    Warnings about labels (N,) in which one class swallows the others or classes are empty.

    Where classes are `charged`, by the class cost, they are meant to be empty: no warning.
    """

    def name(k: int) -> str:
        return f"class {k}" + (f" ({names[k]})" if names else "")

    counts = np.bincount(labels, minlength=n_classes)
    before = np.bincount(zero_shot, minlength=n_classes)
    warnings = []
    largest = int(counts.argmax())
    if n_classes > 1 and counts[largest] > max(SWALLOWED * len(labels), 2 * before[largest]):
        warnings.append(
            f"{name(largest)} got {counts[largest]} of {len(labels)} images, {before[largest]} "
            "by zero-shot alone: it may be swallowing the others; check its prompt, or raise "
            "kl_weight"
        )
    elif n_classes > 1 and counts[largest] == len(labels) > FEW_QUERIES:
        warnings.append(
            f"all {len(labels):,} images have the label {name(largest)}: do model and class names "
            "fit them?"
        )
    if charged:
        return warnings
    lost = np.flatnonzero((counts == 0) & (before > 0))
    empty = np.flatnonzero((counts == 0) & (before == 0))
    if len(lost):
        warnings.append(
            f"{len(lost)} of {n_classes} classes lost all their images, e.g. {name(int(lost[0]))}"
        )
    if len(empty) and len(labels) >= n_classes:
        warnings.append(
            f"{len(empty)} of {n_classes} classes got no image, not even by zero-shot, "
            f"e.g. {name(int(empty[0]))}"
        )
    return warnings


def check_class_order(labels: np.ndarray, truth: np.ndarray) -> list[str]:
    """
    A warning if zero-shot labels (N,) would fit the truth (N,) far better with classes renamed.

    Poor labels alone raise no warning; `bench.accuracy.class_order` counts right and wrong ones.
    Rows whose truth is unknown, -1, do not count.
    """
    labels, truth = labels[truth >= 0], truth[truth >= 0]
    if len(truth) < ORDER_ROWS:
        return []
    as_is = accuracy(labels, truth)
    pairs, counts = np.unique(np.stack([labels, truth]), axis=1, return_counts=True)
    # Greedy matching of labels and classes: it finds at least half of the best renaming.
    renamed = 0
    used: set[int] = set()
    taken: set[int] = set()
    usual: dict[int, int] = {}  # each true class's most frequent label
    for i in np.argsort(-counts, kind="stable"):
        label, true = int(pairs[0, i]), int(pairs[1, i])
        usual.setdefault(true, label)
        if label not in used and true not in taken:
            used.add(label)
            taken.add(true)
            renamed += int(counts[i])
    better = 100 * renamed / len(labels)
    if len(taken) < 3:
        return []
    if better - as_is < ORDER_GAIN or ORDER_FACTOR * as_is > better:
        return []
    if len(set(usual.values())) < _distinct_by_chance(len(usual), int(pairs.max()) + 1):
        return []
    return [
        f"zero-shot labels match on {as_is:.1f} % of images but would on {better:.1f} % if classes "
        "were renamed: class names, text features and labels do not seem to be in one order"
    ]


def _distinct_by_chance(draws: int, n_classes: int) -> float:
    """
    A number of distinct classes that so many random draws of a class rarely exceed.

    Even texts unrelated to the images give that many true classes a label of their own.
    """
    missed = (1 - 1 / n_classes) ** draws  # by all draws
    both_missed = (1 - 2 / n_classes) ** draws
    variance = n_classes * (missed + (n_classes - 1) * both_missed - n_classes * missed**2)
    return n_classes * (1 - missed) + ORDER_DEVIATIONS * math.sqrt(max(variance, 0.0))
