"""
Which rows to correct first: the uncertain ones among other uncertain ones.

`bench.accuracy.corrections` chose the formula on half of its data sets and holds it against a
random choice on the others.
"""

from __future__ import annotations

import numpy as np

from transclip_fast.store.results import Result

COLUMNS = ("confidence", "zero_shot_confidence", "neighbors", "known")  # of the predictions


def suggested_rows(
    result: Result, n: int, pairs: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """
    At most `n` rows of a result whose class is not known, the first to correct first.

    `pairs` are the `links` of the result, if they are there.
    """
    table = result.predictions
    known = None
    if "known" in table.column_names:
        known = table.column("known").to_numpy()
    pairs = links(result) if pairs is None else pairs
    return choose(uncertainty(result), pairs, n, known)


def uncertainty(result: Result) -> np.ndarray:
    """How uncertain each label is, (N,) float64 from 0 to 1: by z and by zero-shot together."""
    z, text = (
        result.predictions.column(name).to_numpy().astype(np.float64)
        for name in ("confidence", "zero_shot_confidence")
    )
    found: np.ndarray = 1 - np.sqrt(z * text)
    return found


def links(result: Result) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of neighbours, each once in both directions, sorted; none if the result has none."""
    table = result.predictions
    none = np.empty(0, np.int64)
    if "neighbors" not in table.column_names:
        return none, none
    lists = table.column("neighbors").combine_chunks()
    ends = lists.flatten().to_numpy()
    starts = np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy())
    return symmetric(starts, ends, len(lists))


def symmetric(starts: np.ndarray, ends: np.ndarray, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows in both directions, each once, sorted by the first."""
    codes = np.concatenate([starts * n_rows + ends, ends * n_rows + starts])
    codes.sort()
    first, second = np.divmod(codes[np.diff(codes, prepend=-1) > 0], n_rows)
    return first, second


def choose(
    uncertain: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray],
    n: int,
    known: np.ndarray | None = None,
) -> np.ndarray:
    """
    The `n` rows that are best to correct, one after the other.

    A row's score is its own uncertainty (N,) and that of its neighbours, `pairs` in both directions
    sorted by the first. A chosen row and its neighbours count no more in the scores of others,
    until nothing else counts: then all that are not chosen count again.
    """
    first, second = pairs
    is_open = np.ones(len(uncertain), bool) if known is None else ~known
    edges = np.searchsorted(first, np.arange(len(uncertain) + 1))

    def around(row: int) -> np.ndarray:
        return second[edges[row] : edges[row + 1]]

    left, scores = _scores(uncertain, is_open, pairs)
    chosen: list[int] = []
    while len(chosen) < n and is_open.any():
        row = int(np.where(is_open, scores, -np.inf).argmax())
        if scores[row] == 0:
            left, scores = _scores(uncertain, is_open, pairs)
            row = int(np.where(is_open, scores, -np.inf).argmax())
        chosen.append(row)
        is_open[row] = False
        gone = [row, *around(row).tolist()]
        left[gone] = 0
        for other in {other for one in gone for other in (one, *around(one).tolist())}:
            scores[other] = left[other] + left[around(other)].sum()
    return np.array(chosen, np.int64)


def _scores(
    uncertain: np.ndarray, is_open: np.ndarray, pairs: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """What of each row counts, and the scores (N,)."""
    first, second = pairs
    left = np.where(is_open, uncertain, 0.0)
    return left, left + np.bincount(first, left[second], minlength=len(left))
