"""ARO's protocol: is an image closer to its caption than to one with swapped words?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from transclip_fast.data.pairs import PairFeatures
from transclip_fast.errors import InputError


@dataclass(frozen=True)
class PairScores:
    """
    Accuracies in percent; half of the pairs are right by chance.

    `group_accuracy` is the mean over the groups in `per_group`: (group, pairs, accuracy), worst
    first. `left_out` are (group, pairs) that do not count there, but do in `accuracy`. Without
    groups all of these are None.
    """

    accuracy: float
    n_pairs: int
    n_ties: int
    group_accuracy: float | None = None
    per_group: list[tuple[str, int, float]] | None = None
    left_out: list[tuple[str, int]] | None = None


def evaluate_pairs(
    pairs: PairFeatures, *, min_pairs: int = 1, leave_out: Collection[str] = ()
) -> PairScores:
    """
    Count the images with a larger cosine to their caption than to the false one.

    A tie is wrong, as in the published code. Source: Yuksekgonul et al. 2023, When and Why
    Vision-Language Models Behave like Bags-of-Words (ARO), whose figures are means of groups: over
    relations without the symmetric ones, and over pairs of attributes with 25 images or more.

    Parameters
    ----------
    pairs : PairFeatures
    min_pairs : int
        Groups with fewer do not count in the mean of groups.
    leave_out : collection of str
        Nor do these groups.

    Raises
    ------
    InputError
        A row without a false caption.

    Examples
    --------
    >>> images, captions = [[1, 0], [0, 1], [0, 1]], [[1, 0], [0, 1], [1, 0]]
    >>> negatives = [[0, 1], [0, 1], [0, 1]]
    >>> pairs = PairFeatures.of(images, captions, negatives, ["on", "in", "in"])
    >>> scores = evaluate_pairs(pairs)
    >>> scores.accuracy, scores.n_ties, scores.group_accuracy
    (33.3333, 1, 50.0)
    """
    if not pairs.has_negative.all():
        row = int((~pairs.has_negative).nonzero()[0, 0])
        raise InputError(f"pairs: row {row} has no false caption")
    margins = pairs.margins().numpy()
    right = margins > 0
    scores = PairScores(_percent(right), len(right), int((margins == 0).sum()))
    if pairs.groups is None:
        return scores
    rows_of = defaultdict[str, list[int]](list)
    for row, group in enumerate(pairs.groups):
        rows_of[group].append(row)
    out = {g for g, rows in rows_of.items() if g in leave_out or len(rows) < min_pairs}
    counted = {g: right[rows] for g, rows in rows_of.items() if g not in out}
    per_group = [(g, len(hits), _percent(hits)) for g, hits in counted.items()]
    mean = _percent([hits.mean() for hits in counted.values()]) if counted else None
    return replace(
        scores,
        group_accuracy=mean,
        per_group=sorted(per_group, key=lambda row: (row[2], row[0])),
        left_out=sorted((g, len(rows_of[g])) for g in out),
    )


def _percent(shares: np.ndarray | list[float]) -> float:
    """The mean in percent, with four decimals."""
    return round(100 * float(np.mean(shares)), 4)
