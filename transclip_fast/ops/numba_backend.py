"""
The short form's operations on a CPU: torch's GEMM, compiled loops for all that follows it.

Blocks of rows go to threads, each of which runs its GEMMs alone: a block of scores is read where
it was made, in that core's cache, and no pool of OpenMP threads spins while the loops run. What is
summed together depends on blocks and classes, never on the number of threads, so results are the
same bit for bit. What is not defined here is torch's.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import torch

import transclip_fast.ops.torch_backend as twin
from transclip_fast.data.feature_rows import UnitRows
from transclip_fast.ops import numba_loops as loops
from transclip_fast.ops import numba_loops as sum_loops
from transclip_fast.ops import numba_topk as candidates
from transclip_fast.ops.blocks import blocks, gemm_rows, read_rows
from transclip_fast.ops.int8_scores import Scan, scannable
from transclip_fast.ops.numba_loops import SUM_ROWS
from transclip_fast.ops.torch_backend import START_ROWS, captured, expectation, session
from transclip_fast.parallel import CPU, n_threads, parallel_map
from transclip_fast.types import Affinity, Assignments, Messages, Scores

__all__ = [
    "captured",
    "class_sums",
    "energies",
    "expectation",
    "score",
    "session",
    "start",
    "sum_of_squares",
    "sweep",
]

TOGETHER = 4
SWEEP_ROWS = 1024
SQUARE_ROWS = 2048
SUM_SAMPLE = 512  # rows that say how many entries the classes have


def start(
    features: UnitRows,
    weights: torch.Tensor | None,
    log_prior: torch.Tensor | None,
    *,
    out: Assignments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `Operations.start`."""
    n_rows, n_classes = len(features), out.n_classes
    least = np.full(n_rows, math.log(out.floor) if out.floor else -np.inf, np.float32)
    normaliser, tail = np.empty((2, n_rows), np.float32)
    out.values.fill_(-torch.inf)
    select = _selector(
        (features, weights, torch.zeros(n_classes, dtype=torch.float32), log_prior, 1.0, None),
        (np.arange(n_rows), least, *_lists(out), tail, normaliser),
    )
    size = even(n_rows, gemm_rows(CPU, n_classes))

    def part(whole: slice) -> tuple[torch.Tensor, torch.Tensor]:
        best = np.full((START_ROWS, n_classes), -np.inf, np.float32)
        rows = np.zeros(best.shape, np.int64)
        for block in blocks(whole.stop, size, whole.start):
            select(block, best, rows)
        return torch.from_numpy(best), torch.from_numpy(rows)

    found = parallel_map(part, _parts(n_rows, n_threads(), size))
    out.values.exp_()
    values, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = rows.argsort(dim=0)  # of equal values the first row
    values, rows = values.gather(0, order), rows.gather(0, order)
    order = values.argsort(dim=0, descending=True, stable=True)[: min(START_ROWS, n_rows)]
    return torch.from_numpy(normaliser), values.gather(0, order), rows.gather(0, order)


def score(
    features: UnitRows,
    weights: torch.Tensor,
    offset: torch.Tensor,
    *,
    out: Scores,
    log_prior: torch.Tensor | None = None,
    prior_weight: float = 1.0,
    messages: Messages | None = None,
    nodes: torch.Tensor | None = None,
) -> Scores:
    """See `Operations.score`."""
    n_rows, n_classes = len(features), out.n_classes
    places = np.arange(n_rows) if nodes is None else nodes.numpy()
    normaliser = np.empty(n_rows, np.float32)
    select = _selector(
        (features, weights, offset, log_prior, prior_weight, messages),
        (places, out.log_threshold.numpy(), *_lists(out), out.tail.numpy(), normaliser),
    )
    none = np.empty((0, n_classes), np.float32), np.empty((0, n_classes), np.int64)
    parallel_map(
        lambda rows: select(rows, *none), blocks(n_rows, even(n_rows, gemm_rows(CPU, n_classes)))
    )
    return out


def _selector(
    operands: tuple[
        UnitRows,
        torch.Tensor | None,
        torch.Tensor,
        torch.Tensor | None,
        float,
        Messages | None,
    ],
    lists: tuple[np.ndarray, ...],
) -> Callable[[slice, np.ndarray, np.ndarray], None]:
    """
    What enters the candidates of a block of rows into lists, as `candidates.select` does.

    Given what `Operations.score` scores; linear scores are computed in 8 bits where that pays.
    """
    features, weights, offset, log_prior, prior_weight, messages = operands
    nodes, least, *_ = lists
    linear = log_prior is None and messages is None
    if linear and weights is not None and scannable(weights):
        scan = Scan(weights, offset)
        if scan.pays(features, least[nodes]):
            return lambda rows, *best: scan.select(features[rows], rows.start, *lists, *best)
    buffers = threading.local()

    def select(rows: slice, *best: np.ndarray) -> None:
        if not hasattr(buffers, "scores"):
            size = gemm_rows(CPU, len(offset)), len(offset)
            buffers.scores = torch.empty(size, dtype=torch.float32)
        scores = twin.block_scores(
            features, weights, offset, rows, log_prior, prior_weight, out=buffers.scores
        )
        if messages is not None:
            messages.add_to(scores, rows)
        if log_prior is not None:
            scores.clamp_(min=loops.LOWEST)
        candidates.select(scores.numpy(), rows.start, *lists, *best)

    return select


def sweep(base: Scores, affinity: Affinity, z: Assignments, *, out: Assignments) -> Assignments:
    """See `Operations.sweep`."""
    arrays = [
        *_graph(affinity),
        *(*_lists(base), base.tail.numpy()),
        *_lists(z),
        *(*_lists(out), out.bound.numpy()),
    ]

    def part(rows: slice) -> None:
        loops.sweep(rows.start, rows.stop, *arrays, out.floor, z.n_classes)

    parallel_map(part, blocks(len(z), even(len(z), SWEEP_ROWS)))
    return out


def class_sums(
    z: Assignments, features: UnitRows, nodes: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Operations.class_sums`."""
    # The last row is what was dropped.
    sums = torch.zeros(z.n_classes + 1, features.shape[1], dtype=torch.float64)
    counts = torch.zeros(z.n_classes + 1, dtype=torch.float64)
    places = np.arange(len(z)) if nodes is None else nodes.numpy()
    centre = features[:SUM_ROWS].mean(0)
    parts = _even_classes(z, n_threads())
    for rows in blocks(len(z), read_rows(CPU)):
        arrays = features[rows].numpy(), centre.numpy(), places[rows], *_lists(z)
        parallel_map(partial(_add_class_sums, (*arrays, sums.numpy(), counts.numpy())), parts)
    sums.addr_(counts, centre.double())
    return twin.share_tail(sums[:-1], counts[:-1], sums[-1], counts[-1])


def _add_class_sums(arrays: tuple[np.ndarray, ...], classes: slice) -> None:
    sum_loops.class_sums(classes.start, classes.stop, *arrays)


def _even_classes(z: Assignments, number: int) -> list[slice]:
    """Slices of the K classes, and one more for what was dropped, with as many entries each."""
    some = z.take(slice(None, None, max(1, len(z) // SUM_SAMPLE)))
    entries = np.bincount(_lists(some)[1][some.values.numpy() > 0], minlength=z.n_classes + 1)
    entries[-1] = len(some)
    shares = np.arange(1, number) / number * entries.sum()
    ends = [0, *np.searchsorted(entries.cumsum(), shares) + 1, len(entries)]
    return [slice(first, last) for first, last in pairwise(ends) if first < last]


def energies(z: Assignments, affinity: Affinity) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Operations.energies`."""
    arrays = [*_graph(affinity), *_lists(z)]

    def part(rows: slice) -> np.ndarray:
        terms = np.empty(2)
        loops.energies(rows.start, rows.stop, *arrays, z.n_classes, terms)
        return terms

    pairwise, entropy = np.sum(parallel_map(part, blocks(len(z), even(len(z), SWEEP_ROWS))), axis=0)
    return torch.tensor(pairwise), torch.tensor(entropy)


def sum_of_squares(features: UnitRows) -> torch.Tensor:
    """See `Operations.sum_of_squares`."""

    def part(rows: slice) -> np.ndarray:
        total = np.zeros(features.shape[1])
        sum_loops.add_squares(features[rows].numpy(), total)
        return total

    return torch.from_numpy(np.sum(parallel_map(part, blocks(len(features), SQUARE_ROWS)), axis=0))


def even(n_rows: int, most: int) -> int:
    """Rows of a block, at most so many: of equal blocks that 2 or 4 threads end together with."""
    number = TOGETHER * -(-n_rows // (TOGETHER * most))
    # 16 rows of any length are aligned as a block of its own would be.
    return min(most, 16 * max(1, -(-n_rows // (16 * number))))


def _parts(n: int, number: int, multiple: int = 1) -> list[slice]:
    """At most `number` slices that cover range(n), of one length that is such a multiple."""
    return list(blocks(n, multiple * max(1, -(-n // (number * multiple)))))


def _lists(entries: Scores | Assignments) -> tuple[np.ndarray, np.ndarray]:
    """Values and classes of the short form."""
    if entries.classes is None:
        raise TypeError("these operations are for the short form")
    return entries.values.numpy(), entries.classes.numpy()


def _graph(affinity: Affinity) -> tuple[np.ndarray, ...]:
    return affinity.offsets.numpy(), affinity.columns.numpy(), affinity.weights.numpy()
