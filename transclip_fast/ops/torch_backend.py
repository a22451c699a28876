"""
The solver's operations in torch, on any device, for dense and sparse z.

Each operation goes through the rows in blocks: no temporary is N x K, and sums over blocks are
float64. On a CPU each block fits a core's cache and goes to a thread that works alone.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
import torch.nn.functional as F

from transclip_fast.data.feature_rows import UnitRows
from transclip_fast.ops import packed_lists
from transclip_fast.ops.block_scores import block_scores, prior_scores
from transclip_fast.ops.block_sums import SUM_CLASSES, add_class_sums
from transclip_fast.ops.blocks import (
    GEMM_ROWS,
    block_rows,
    blocks,
    gemm_rows,
    product_rows,
    read_rows,
)
from transclip_fast.parallel import n_threads, parallel_map
from transclip_fast.types import (
    FLOAT32_ROUNDING,
    LARGEST_MESSAGE,
    Affinity,
    Assignments,
    LinearScore,
    Messages,
    Scores,
)

SUM_ROWS = 256  # of a float64 sum: more do not fit the cache, which is several times slower
THREADED_ROW_BLOCKS = 8  # of rows: fewer are summed sooner than handed out
SUM_CENTRE_ROWS = 64  # whose mean is near that of all rows
KEPT_ENTRIES = 1 << 22  # of features: so few are centred once, and kept, 16 MiB
START_ROWS = 8  # rows that the mean of a class starts from
MERGED_BLOCKS = 64  # blocks whose top rows are held at a time
# Of factors: smaller ones have products that float32 sums do not notice, and that are slow to
# compute where they are below float32's range.
SMALLEST = 1e-19


class TorchOps:
    """
    The operations of a run, and their definition; other backends override those they do faster.

    Features (N, d) are unit rows, the same in every step; a prior, and messages of the support,
    are in their order. z, scores and the affinity A (N, N) are indexed by node: `nodes` (N,) int64
    has the node of each row of the features; without it they are the same.
    """

    def __init__(self, affinity: Affinity, nodes: torch.Tensor | None = None) -> None:
        self._affinity, self._nodes = affinity, nodes
        self.kept_entries = KEPT_ENTRIES
        self._cut: dict[int, list[tuple[slice, Affinity]]] = {}  # by rows of a block
        self._centred: dict[tuple[int, int], torch.Tensor] = {}  # blocks of few rows

    @staticmethod
    def start(
        features: UnitRows,
        weights: torch.Tensor | None,
        log_prior: torch.Tensor | None,
        *,
        out: Assignments,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Set z = y_hat in `out`, in the order of the features, and find where the means start.

        Parameters
        ----------
        features : Tensor or Rows (N, d)
        weights : Tensor (K, d) float32, optional
            V, prototypes times the logit scale: log y_hat is the log_softmax of F V^T; or
        log_prior : Tensor (N, K) float32, optional
            log y_hat itself; -inf excludes a class.

        Returns
        -------
        normaliser : Tensor (N,) float32
            Log-sum-exp of each row.
        values : Tensor (8, K) float32
            The largest log y_hat of each class, largest first (all rows when N < 8).
        rows : Tensor (8, K) int64
            Their rows; of equal ones the first come first.
        """
        size = product_rows(features.device, len(features), out.n_classes)
        normaliser = out.values.new_empty(len(features))

        def part(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            scores = normaliser.new_empty(rows.stop - rows.start, out.n_classes)
            prior_scores(features, weights, log_prior, rows, out=scores)
            torch.logsumexp(scores, 1, out=normaliser[rows])
            scores -= normaliser[rows, None]
            top = top_rows(scores)
            values = scores.gather(0, top)
            _write_assignments(scores.exp_(), out, rows)
            return values, top + rows.start

        top: list[tuple[torch.Tensor, torch.Tensor]] = []
        for some in blocks(len(features), MERGED_BLOCKS * size):
            found = top + parallel_map(part, blocks(some.stop, size, some.start), features.device)
            values, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
            places = top_rows(values)
            top = [(values.gather(0, places), rows.gather(0, places))]
        return normaliser, *top[0]

    @staticmethod
    def power_sums(features: UnitRows) -> torch.Tensor:
        """sum_i f_id and sum_i f_id^2 of features (N, d), (2, d) float64."""
        device = features.device
        size = SUM_ROWS if device.type == "cpu" else GEMM_ROWS["cuda"][0]

        def part(rows: slice) -> torch.Tensor:
            total = torch.zeros(2, features.shape[1], dtype=torch.float64, device=device)
            for piece in blocks(rows.stop, size, rows.start):
                some = features[piece].double()
                total[0] += some.sum(0)
                total[1] += some.square_().sum(0)
            return total

        return torch.stack(parallel_map(part, blocks(len(features), 16 * size), device)).sum(0)

    def score(self, features: UnitRows, score: LinearScore, *, out: Scores) -> Scores:
        """
        Base scores b of all nodes, in `out`, which is returned; sparse, those of the candidates,
        less the log-sum-exp over K classes.
        """

        def part(rows: slice) -> None:
            nodes = self._nodes_of(rows)
            if out.classes is None and isinstance(nodes, slice):
                block_scores(features, score, rows, out=out.values[rows])
                return
            block = out.values.new_empty(rows.stop - rows.start, out.n_classes)
            block_scores(features, score, rows, out=block)
            if out.classes is None:
                out.values[nodes] = block
            else:
                _write_candidates(block, out, out.classes, nodes)

        size = product_rows(features.device, len(features), out.n_classes)
        parallel_map(part, blocks(len(features), size), features.device)
        return out

    def sweep(
        self, base: Scores, z: Assignments, *, out: Assignments, bounded: bool = True
    ) -> Assignments:
        """
        z <- softmax_k(b + A z), every row from the same z (Jacobi), in `out`, which is returned.

        Sparse, z is updated at the candidates, and the mass of all other classes enters the
        normaliser as if no message reached them; `out.bound` is the mass this may misplace. A
        backend may leave it as it was unless `bounded`.
        """

        def part(block: tuple[slice, Affinity]) -> None:
            rows, edges = block
            messages = _messages(edges, z)
            if base.classes is None or out.classes is None:
                messages += base.values[rows]
                torch.softmax(messages, 1, out=out.values[rows])
                return
            scores, classes, tail = base.values[rows], base.classes[rows].long(), base.tail[rows]
            # Classes outside the candidates get no messages; together they are one extra entry.
            logits = torch.cat([scores + messages.gather(1, classes), tail[:, None].log()], 1)
            mass = torch.softmax(logits, 1)[:, :-1]
            values, slots = _largest(mass, out.values.shape[1], out.floor)
            out.values[rows] = values
            out.classes[rows] = classes.gather(1, slots).int()
            used = scores > -torch.inf
            local = torch.arange(len(used), device=used.device)[:, None].expand_as(used)
            messages[local[used], classes[used]] = 0
            outside_max = messages.abs().amax(1).clamp_(max=LARGEST_MESSAGE)
            # Below float32 rounding the tail mass is unknown; this is its upper bound.
            tail = tail.clamp(min=z.n_classes * FLOAT32_ROUNDING)
            out.bound[rows] = (tail * outside_max.expm1()).clamp_(max=1)

        parallel_map(part, self._edges(z.n_classes), z.values.device)
        return out

    def messages(self, z: Assignments, *, out: torch.Tensor) -> torch.Tensor:
        """A z of dense assignments, in `out` (N, K), which is returned."""

        def part(block: tuple[slice, Affinity]) -> None:
            rows, edges = block
            out[rows] = _messages(edges, z)

        parallel_map(part, self._edges(z.n_classes), z.values.device)
        return out

    def of_rows(self, rows: slice, share: int) -> TorchOps:
        """The operations on some of the features only, one of `share` such parts."""
        part = copy(self)
        part._nodes = None if self._nodes is None else self._nodes[rows]
        part.kept_entries, part._centred = self.kept_entries // share, {}
        return part

    def room(self, z: Assignments) -> Assignments:
        """z where sweeps can read and write it."""
        return z

    def with_halo(self, z: Assignments) -> Assignments:
        """z with, after its own rows, the halo, the neighbours that others own."""
        return z

    def class_sums(self, z: Assignments, features: UnitRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Z^T F (K, d) and the mass n_k (K,) of each class, float64; of the mass that rows keep."""
        device, (n_rows, dim), n_classes = features.device, features.shape, z.n_classes
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}

        def none() -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(n_classes, dim, **options), torch.zeros(n_classes, **options)

        # The variance is the difference of the squares and the squared means: sums of centred
        # rows keep its digits, where float32 sums of thousands of similar rows lose them.
        centre = features[:SUM_CENTRE_ROWS].mean(0)

        def add(
            block: tuple[slice, torch.Tensor], sums: torch.Tensor, counts: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            rows, read = block
            centred = self._centred.get((rows.start, rows.stop))
            if centred is None:
                centred = read - centre
                if n_rows * dim <= self.kept_entries:
                    self._centred[rows.start, rows.stop] = centred
            add_class_sums(z.take(self._nodes_of(rows)), centred, sums, counts)
            return sums, counts

        sums, counts = none()
        # Blocks of rows go to threads where the classes are one block; else those do.
        few = device.type == "cpu" and n_threads() > 1 and n_classes <= SUM_CLASSES
        for rows in blocks(n_rows, read_rows(device)):
            read = features[rows]
            parts = blocks(rows.stop, gemm_rows(device, n_classes), rows.start)
            tasks = [(x, read[x.start - rows.start : x.stop - rows.start]) for x in parts]
            if few and len(tasks) >= THREADED_ROW_BLOCKS:
                for some, masses in parallel_map(lambda task: add(task, *none()), tasks):
                    sums += some
                    counts += masses
            else:
                for task in tasks:
                    add(task, sums, counts)
        return sums.addr_(counts, centre.double()), counts

    def energies(self, z: Assignments) -> tuple[torch.Tensor, torch.Tensor]:
        """sum_ij A_ij z_i.z_j and sum_ik z_ik log z_ik of the mass kept, float64 scalars."""
        pairwise, entropy = self.row_energies(z).sum(0)
        return pairwise, entropy

    def row_energies(self, z: Assignments) -> torch.Tensor:
        """The terms of `energies` of each node, (N, 2) float64."""

        def part(block: tuple[slice, Affinity]) -> torch.Tensor:
            rows, edges = block
            values, messages = z.values[rows], _messages(edges, z)
            if z.classes is not None:
                messages = messages.gather(1, z.classes[rows].long())
            values, messages = values.clamp_min(SMALLEST), F.hardshrink(messages, SMALLEST)
            pairwise = torch.linalg.vecdot(values, messages)
            entropy = torch.linalg.vecdot(values, values.log())
            return torch.stack([pairwise, entropy], 1).double()

        return torch.cat(parallel_map(part, self._edges(z.n_classes), z.values.device))

    def expectation(self, z: Assignments, log_prior: torch.Tensor) -> torch.Tensor:
        """
        sum_ik z_ik log y_hat_ik of the mass kept, float64 scalar; `log_prior` is log y_hat.

        Classes that the prior excludes are left out: only rows of known class have mass there.
        """

        def part(rows: slice) -> torch.Tensor:
            kept, terms = z.take(self._nodes_of(rows)), log_prior[rows]
            if kept.classes is not None:
                terms = terms.gather(1, kept.classes.long())
            return torch.where(terms > -torch.inf, kept.values * terms, 0).sum(dtype=torch.float64)

        device = z.values.device
        size = block_rows(device, z.n_classes)
        return torch.stack(parallel_map(part, blocks(len(log_prior), size), device)).sum()

    def received(self, z: Assignments, messages: Messages) -> torch.Tensor:
        """sum_ik z_ik times the messages about class k to row i, float64 scalar."""
        rows = messages.rows()
        mass = z.at(rows if self._nodes is None else self._nodes[rows], messages.classes)
        return (mass.double() * messages.weights).sum()

    def best(self, z: Assignments) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Assignments.best`."""
        return z.best()

    def neighbor_means(
        self, z: Assignments, neighbors: torch.Tensor, classes: torch.Tensor | None
    ) -> torch.Tensor:
        """
        Mean z (n, C) of the `neighbors` (n, k) int64 of some rows, nodes or -1, at the `classes`
        (n, C) int32 of each row, which are different, or at all; 0 without neighbours.
        """
        there = neighbors >= 0
        shape = (len(neighbors), z.n_classes) if classes is None else classes.shape
        total = z.values.new_zeros(shape)
        size = max(1, shape[0])
        if classes is not None:  # as many comparisons as the entries of a block of scores
            size = block_rows(z.values.device, shape[1] * z.values.shape[1])
        for nodes, exists in zip(neighbors.clamp_min(0).T, there.T, strict=True):
            for rows in blocks(shape[0], size):
                values = z.values[nodes[rows]] * exists[rows, None]
                if z.classes is not None and classes is not None:
                    theirs = z.classes[nodes[rows]][:, None]
                    same = theirs == classes[rows, :, None]  # (n, C, R)
                    values = torch.where(same, values[:, None], 0).sum(2)
                total[rows] += values
        return total / there.sum(1, keepdim=True).clamp_min(1)

    def pack(
        self, z: Assignments, rows: torch.Tensor, before: Assignments | None
    ) -> list[torch.Tensor]:
        """As `packed_lists.pack`."""
        return packed_lists.pack(z, rows, before)

    def unpack(self, packed: torch.Tensor, out: Assignments, before: Assignments | None) -> None:
        """As `packed_lists.unpack`."""
        packed_lists.unpack(packed, out, before)

    def _edges(self, n_classes: int) -> list[tuple[slice, Affinity]]:
        """Blocks of nodes with their rows of A, cut once: sweeps would spend a third on it."""
        offsets = self._affinity.offsets
        size = block_rows(offsets.device, n_classes)
        if size not in self._cut:  # classes that are absent leave
            parts = blocks(len(offsets) - 1, size)
            self._cut = {size: [(rows, self._affinity.take(rows)) for rows in parts]}
        return self._cut[size]

    def _nodes_of(self, rows: slice) -> torch.Tensor | slice:
        """Nodes of consecutive rows of the features."""
        return rows if self._nodes is None else self._nodes[rows]


def top_rows(values: torch.Tensor) -> torch.Tensor:
    """Positions (8, K) of the largest values of each column, equal ones from the top."""
    n = min(START_ROWS, len(values))
    top = values.topk(n, dim=0)
    tied = (values >= top.values[-1]).sum(0) > n  # topk breaks ties in any order
    tied |= (top.values[1:] == top.values[:-1]).any(0)
    if tied.any():
        ordered = values[:, tied].sort(dim=0, descending=True, stable=True)
        top.indices[:, tied] = ordered.indices[:n]
    return top.indices


def _write_assignments(mass: torch.Tensor, out: Assignments, rows: slice) -> None:
    """Write the distributions (n, K) of a block of rows to `out`."""
    if out.classes is None:
        out.values[rows] = mass
    else:
        out.values[rows], classes = _largest(mass, out.values.shape[1], out.floor)
        out.classes[rows] = classes.int()


def _write_candidates(
    block: torch.Tensor, out: Scores, classes: torch.Tensor, nodes: torch.Tensor | slice
) -> None:
    """Write the candidates of the scores (n, K) of some nodes to `out`."""
    block -= block.logsumexp(1, keepdim=True)
    values, places = block.topk(out.values.shape[1], dim=1)
    threshold = torch.minimum(out.log_threshold[nodes, None], values[:, :1])
    kept = values >= threshold
    # Summed, not what the kept mass leaves of 1: that would be rounding where little is dropped.
    block.scatter_(1, places, values.masked_fill(kept, -torch.inf))
    out.values[nodes], classes[nodes] = values.masked_fill_(~kept, -torch.inf), places.int()
    out.tail[nodes] = block.exp_().sum(1)


def _largest(mass: torch.Tensor, width: int, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest entries (n, R) of each row, 0 below the floor, and their positions."""
    values, places = mass.topk(min(width, mass.shape[1]), dim=1)
    # A row's largest entry stays, even where all of it underflowed.
    values[:, 0].clamp_(min=torch.finfo(values.dtype).tiny)
    return values.masked_fill_(values < values[:, :1].clamp(max=floor), 0), places


def _messages(edges: Affinity, z: Assignments) -> torch.Tensor:
    """(A z) of a block of rows, (rows, K): a weighted sum of the neighbours' rows of z."""
    offsets, columns, weights = edges.offsets, edges.columns, edges.weights
    if z.classes is None:
        return F.embedding_bag(
            columns,
            z.values,
            offsets,
            per_sample_weights=weights,
            mode="sum",
            include_last_offset=True,
        )
    local = torch.repeat_interleave(offsets.diff())
    cells = local[:, None] * z.n_classes + z.classes[columns]  # (entries, R)
    messages = z.values.new_zeros(len(offsets) - 1, z.n_classes)
    terms = weights[:, None] * z.values[columns]
    messages.view(-1).index_put_((cells.flatten(),), terms.flatten(), accumulate=True)
    return messages
