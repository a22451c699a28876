"""
The operations on sparse assignments on a CPU: torch's GEMM, then compiled loops.

Blocks of rows go to threads, each of which runs its own GEMMs: a core reads a block of scores from
its cache, and no pool of OpenMP threads spins while the loops run. The grouping of sums depends on
blocks and classes, never on the number of threads, so results are the same bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from transclip_fast.data.feature_rows import UnitRows
from transclip_fast.ops import numba_lists
from transclip_fast.ops import numba_loops as loops
from transclip_fast.ops import numba_topk as topk
from transclip_fast.ops.block_scores import block_scores, prior_scores
from transclip_fast.ops.blocks import blocks, equal_rows, product_rows, read_rows
from transclip_fast.ops.int8_scores import int8_scores
from transclip_fast.ops.packed_lists import not_lists
from transclip_fast.ops.torch_backend import START_ROWS, TorchOps
from transclip_fast.parallel import CPU, ThreadBuffer, n_threads, parallel_map
from transclip_fast.types import Affinity, Assignments, LinearScore, Scores

SWEEP_ROWS = 1024  # rows of a block of a sweep, at most
LIST_ROWS = 4096  # rows of a block of lists whose labels are found
SUM_ROWS = 2048  # rows of a block of power sums
CLASS_SIZE_ROWS = 512  # rows a thread on which the number of entries of each class is estimated
# Writes the candidates of a block of rows to their lists. Two arrays (8, K) receive the largest
# scores of each class, less the row's log-sum-exp, and their rows; arrays (0, K) receive none.
Select = Callable[[slice, np.ndarray, np.ndarray], None]


class Lists(NamedTuple):
    """Output lists of the candidates, indexed by node; `nodes` and `normaliser` go by row."""

    nodes: np.ndarray
    log_threshold: np.ndarray
    values: np.ndarray
    classes: np.ndarray
    tail: np.ndarray
    normaliser: np.ndarray


class NumbaOps(TorchOps):
    """The operations on sparse assignments on a CPU."""

    def __init__(self, affinity: Affinity, nodes: torch.Tensor | None = None) -> None:
        super().__init__(affinity, nodes)
        self._graph = [x.numpy() for x in (affinity.offsets, affinity.columns, affinity.weights)]

    @staticmethod
    def start(
        features: UnitRows,
        weights: torch.Tensor | None,
        log_prior: torch.Tensor | None,
        *,
        out: Assignments,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        n_rows, n_classes = len(features), out.n_classes
        log_threshold = np.full(n_rows, math.log(out.floor) if out.floor else -np.inf, np.float32)
        normaliser, tail = np.empty((2, n_rows), np.float32)
        out.values.fill_(-torch.inf)
        lists = Lists(np.arange(n_rows), log_threshold, *_arrays(out), tail, normaliser)
        size = product_rows(CPU, n_rows, n_classes)

        def fill(rows: slice, scores: torch.Tensor) -> None:
            prior_scores(features, None, log_prior, rows, out=scores)
            scores.clamp_(min=loops.LOWEST_SCORE)

        if weights is None:
            select = _float32_selector(fill, n_classes, lists)
        else:
            linear = LinearScore(weights, torch.zeros(n_classes, dtype=torch.float32))
            select = _score_selector(features, linear, lists)

        def part(whole: slice) -> tuple[torch.Tensor, torch.Tensor]:
            top = np.full((START_ROWS, n_classes), -np.inf, np.float32)
            rows = np.zeros(top.shape, np.int64)
            for block in blocks(whole.stop, size, whole.start):
                select(block, top, rows)
            return torch.from_numpy(top), torch.from_numpy(rows)

        share = size * max(1, -(-n_rows // (n_threads() * size)))  # of a thread, in whole blocks
        found = parallel_map(part, blocks(n_rows, share))
        out.exponentiate()
        values, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
        order = rows.argsort(dim=0)  # of equal values the first row
        values, rows = values.gather(0, order), rows.gather(0, order)
        order = values.argsort(dim=0, descending=True, stable=True)[: min(START_ROWS, n_rows)]
        return torch.from_numpy(normaliser), values.gather(0, order), rows.gather(0, order)

    @staticmethod
    def power_sums(features: UnitRows) -> torch.Tensor:
        def part(rows: slice) -> np.ndarray:
            total = np.zeros((2, features.shape[1]))
            loops.add_powers(features[rows].numpy(), total)
            return total

        found = parallel_map(part, blocks(len(features), SUM_ROWS))
        return torch.from_numpy(np.sum(found, axis=0))

    def score(self, features: UnitRows, score: LinearScore, *, out: Scores) -> Scores:
        n_rows, n_classes = len(features), out.n_classes
        lists = Lists(
            self._node_ids(n_rows),
            out.log_threshold.numpy(),
            *_arrays(out),
            tail=out.tail.numpy(),
            normaliser=np.empty(n_rows, np.float32),
        )
        select = _score_selector(features, score, lists)
        none = np.empty((0, n_classes), np.float32), np.empty((0, n_classes), np.int64)
        size = product_rows(CPU, n_rows, n_classes)
        parallel_map(lambda rows: select(rows, *none), blocks(n_rows, size))
        return out

    def sweep(
        self, base: Scores, z: Assignments, *, out: Assignments, bounded: bool = True
    ) -> Assignments:
        scores = *_arrays(base), base.tail.numpy()
        written = *_arrays(out), out.bound.numpy()
        arrays = *self._graph, *scores, *_arrays(z), *written

        def part(rows: slice) -> None:
            loops.sweep(rows.start, rows.stop, *arrays, out.floor, z.n_classes)

        parallel_map(part, blocks(len(out), equal_rows(len(out), SWEEP_ROWS)))
        return out

    def class_sums(self, z: Assignments, features: UnitRows) -> tuple[torch.Tensor, torch.Tensor]:
        sums = torch.zeros(z.n_classes, features.shape[1], dtype=torch.float64)
        counts = torch.zeros(z.n_classes, dtype=torch.float64)
        nodes = self._node_ids(len(features))
        centre = features[: loops.SUM_ROWS].mean(0)
        parts = equal_classes(z, n_threads())
        for rows in blocks(len(features), read_rows(CPU)):
            arrays = features[rows].numpy(), centre.numpy(), nodes[rows], *_arrays(z)

            def part(classes: slice, arrays: tuple[np.ndarray, ...] = arrays) -> None:
                totals = sums.numpy(), counts.numpy()
                loops.class_sums(classes.start, classes.stop, *arrays, *totals)

            parallel_map(part, parts)
        return sums.addr_(counts, centre.double()), counts

    def row_energies(self, z: Assignments) -> torch.Tensor:
        n_rows = len(self._graph[0]) - 1
        terms = np.empty((n_rows, 2))

        def part(rows: slice) -> None:
            loops.energies(rows.start, rows.stop, *self._graph, *_arrays(z), z.n_classes, terms)

        parallel_map(part, blocks(n_rows, equal_rows(n_rows, SWEEP_ROWS)))
        return torch.from_numpy(terms)

    def best(self, z: Assignments) -> tuple[torch.Tensor, torch.Tensor]:
        labels, values = torch.empty(len(z), dtype=torch.int64), z.values.new_empty(len(z))

        def part(rows: slice) -> None:
            some = _arrays(z.take(rows))
            numba_lists.best(*some, labels.numpy()[rows], values.numpy()[rows])

        parallel_map(part, blocks(len(z), LIST_ROWS))
        return labels, values

    def neighbor_means(
        self, z: Assignments, neighbors: torch.Tensor, classes: torch.Tensor | None
    ) -> torch.Tensor:
        if classes is None:
            raise TypeError("this backend has no dense assignments")
        out = torch.empty(classes.shape, dtype=torch.float32)
        loops.neighbor_means(
            *_arrays(z), neighbors.numpy(), classes.numpy(), z.n_classes, out.numpy()
        )
        return out

    def pack(
        self, z: Assignments, rows: torch.Tensor, before: Assignments | None
    ) -> list[torch.Tensor]:
        arrays = *_arrays(z), *_sent(z, before)
        heads = np.empty(len(rows), np.int32)

        def part(block: slice) -> torch.Tensor:
            rest = np.empty((block.stop - block.start) * 2 * z.values.shape[1], np.int32)
            values = rest.view(np.float32)
            n = numba_lists.pack(rows.numpy()[block], *arrays, heads[block], rest, values)
            return torch.from_numpy(rest[:n])

        # One part a thread: what a single one packs need not be copied together.
        parts = blocks(len(rows), max(1, -(-len(rows) // n_threads())))
        return [torch.from_numpy(heads), *parallel_map(part, parts)]

    def unpack(self, packed: torch.Tensor, out: Assignments, before: Assignments | None) -> None:
        heads, rest = np.split(packed.numpy(), [len(out)])
        arrays = *_arrays(out), *_sent(out, before)
        values = rest.view(np.float32)
        if len(heads) < len(out) or not numba_lists.unpack(
            heads, rest, values, *arrays, out.n_classes
        ):
            raise not_lists()

    def _node_ids(self, n_rows: int) -> np.ndarray:
        """Node of each row of the features, (N,) int64."""
        return np.arange(n_rows) if self._nodes is None else self._nodes.numpy()


def _score_selector(features: UnitRows, score: LinearScore, lists: Lists) -> Select:
    """Select by base scores; linear ones come from int8 products if that is faster."""
    linear = score.log_prior is None and score.messages is None
    quick = int8_scores(score.weights, score.offset) if linear else None
    if quick is not None and quick.is_faster(features, lists.log_threshold[lists.nodes]):
        select = quick.select
        return lambda rows, *top: select(features[rows], rows.start, *lists, *top)

    def fill(rows: slice, out: torch.Tensor) -> None:
        block_scores(features, score, rows, out=out)
        if score.log_prior is not None:
            out.clamp_(min=loops.LOWEST_SCORE)

    return _float32_selector(fill, len(score.offset), lists)


def _float32_selector(
    fill: Callable[[slice, torch.Tensor], None], n_classes: int, lists: Lists
) -> Select:
    """Select by the finite scores that `fill` writes for a block of rows."""
    buffer = ThreadBuffer(torch.float32)

    def select(rows: slice, *top: np.ndarray) -> None:
        scores = buffer.block(rows.stop - rows.start, n_classes)
        fill(rows, scores)
        topk.select(scores.numpy(), rows.start, *lists, *top)

    return select


def equal_classes(z: Assignments, number: int) -> list[slice]:
    """At most `number` slices of the K classes with about equally many entries of z each."""
    some = z.take(slice(None, None, max(1, len(z) // (CLASS_SIZE_ROWS * number))))
    values, classes = _arrays(some)
    entries = np.bincount(classes[values > 0], minlength=z.n_classes)
    shares = np.arange(1, number) / number * entries.sum()
    ends = [0, *np.searchsorted(entries.cumsum(), shares) + 1, len(entries)]
    return [slice(first, last) for first, last in pairwise(ends) if first < last]


def _arrays(entries: Scores | Assignments) -> tuple[np.ndarray, np.ndarray]:
    """Values and classes of sparse scores or assignments."""
    if entries.classes is None:
        raise TypeError("this backend has no dense assignments")
    return entries.values.numpy(), entries.classes.numpy()


def _sent(z: Assignments, before: Assignments | None) -> tuple[np.ndarray, np.ndarray]:
    """Values and classes of the lists that were sent before; of no lists if there are none."""
    return _arrays(z.take(slice(0)) if before is None else before)
