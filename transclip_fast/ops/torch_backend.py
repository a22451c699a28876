"""
The solver's operations in torch, on any device, for both forms of z.

Each goes through the rows in blocks: no temporary is ever N x K, and sums over rows are taken in
float64 across blocks. On a CPU the blocks stay in a core's cache and go to threads, each of which
works alone. `Operations` documents what each does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F

from transclip_fast.data.feature_rows import UnitRows
from transclip_fast.ops.blocks import GEMM_ROWS, block_rows, blocks, gemm_rows, read_rows
from transclip_fast.parallel import parallel_map, single_threaded_torch
from transclip_fast.types import Affinity, Assignments, Messages, Scores

SUM_ROWS = 256  # float64 sums of more rows than the cache holds are several times slower
SUM_CLASSES = 256  # that one thread sums
START_ROWS = 8
MERGED = 64  # blocks whose surest rows are held at a time
ROUNDING = 2.0**-24
MOST_HEARD = 64.0  # e^64 moves everything


def session() -> AbstractContextManager[None]:
    """See `Operations.session`."""
    return single_threaded_torch()


def captured(
    step: Callable[[], None],
    renewed: Callable[[], Sequence[torch.Tensor]],
    features: UnitRows,
) -> Callable[[], None]:
    """See `Operations.captured`."""
    return step


def linear_log_prior(features: UnitRows, weights: torch.Tensor) -> torch.Tensor:
    """log_softmax of F V^T (N, K) float32; `weights` V (K, d) are prototypes times tau."""
    out = weights.new_empty(len(features), len(weights))

    def part(rows: slice) -> None:
        scores = block_scores(features, weights, None, rows, out=out[rows])
        scores -= scores.logsumexp(1, keepdim=True)

    parallel_map(part, blocks(len(out), gemm_rows(out.device, len(weights))), out.device)
    return out


def block_scores(
    features: UnitRows,
    weights: torch.Tensor | None,
    offset: torch.Tensor | None,
    rows: slice,
    log_prior: torch.Tensor | None = None,
    prior_weight: float = 1.0,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """F P^T + c + prior_weight log y_hat of a block of rows, in the first rows of `out`."""
    out = out[: rows.stop - rows.start]
    if weights is None:
        out.zero_()
    elif offset is None:
        torch.mm(features[rows], weights.T, out=out)
    else:
        torch.addmm(offset, features[rows], weights.T, out=out)
    if log_prior is not None:
        out.add_(log_prior[rows], alpha=prior_weight)
    return out


def start(
    features: UnitRows,
    weights: torch.Tensor | None,
    log_prior: torch.Tensor | None,
    *,
    out: Assignments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `Operations.start`."""
    size = gemm_rows(features.device, out.n_classes)
    normaliser = out.values.new_empty(len(features))

    def part(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        scores = normaliser.new_empty(rows.stop - rows.start, out.n_classes)
        block_scores(features, weights, None, rows, log_prior, out=scores)
        torch.logsumexp(scores, 1, out=normaliser[rows])
        scores -= normaliser[rows, None]
        best = _top_rows(scores)
        values = scores.gather(0, best)
        _keep(scores.exp_(), out, rows)
        return values, best + rows.start

    best: list[tuple[torch.Tensor, torch.Tensor]] = []
    for some in blocks(len(features), MERGED * size):
        found = best + parallel_map(part, blocks(some.stop, size, some.start), features.device)
        values, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
        places = _top_rows(values)
        best = [(values.gather(0, places), rows.gather(0, places))]
    return normaliser, *best[0]


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

    def part(rows: slice) -> None:
        if out.classes is None:
            block = out.values[rows]
        else:
            block = out.values.new_empty(rows.stop - rows.start, out.n_classes)
        block_scores(features, weights, offset, rows, log_prior, prior_weight, out=block)
        if messages is not None:
            messages.add_to(block, rows)
        if out.classes is not None:
            _keep_candidates(block, out, out.classes, rows if nodes is None else nodes[rows])

    parallel_map(
        part, blocks(len(features), gemm_rows(features.device, out.n_classes)), features.device
    )
    return out


def sweep(base: Scores, affinity: Affinity, z: Assignments, *, out: Assignments) -> Assignments:
    """See `Operations.sweep`."""

    def part(rows: slice) -> None:
        messages = _messages(affinity, z, rows)
        if base.classes is None or out.classes is None:
            messages += base.values[rows]
            torch.softmax(messages, 1, out=out.values[rows])
            return
        scores, classes, tail = base.values[rows], base.classes[rows].long(), base.tail[rows]
        # The tail hears nothing; it is one more entry of the softmax.
        logits = torch.cat([scores + messages.gather(1, classes), tail[:, None].log()], 1)
        mass = torch.softmax(logits, 1)[:, :-1]
        values, slots = _largest(mass, out.values.shape[1], out.floor)
        out.values[rows] = values
        out.classes[rows] = classes.gather(1, slots).int()
        used = scores > -torch.inf
        local = torch.arange(len(used), device=used.device)[:, None].expand_as(used)
        messages[local[used], classes[used]] = 0
        unheard = messages.abs().amax(1).clamp_(max=MOST_HEARD)
        # Of a tail below rounding nothing is known but that.
        tail = tail.clamp(min=z.n_classes * ROUNDING)
        out.bound[rows] = (tail * unheard.expm1()).clamp_(max=1)

    device = z.values.device
    parallel_map(part, blocks(len(z), block_rows(device, z.n_classes)), device)
    return out


def class_sums(
    z: Assignments, features: UnitRows, nodes: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Operations.class_sums`."""
    device, n_classes = features.device, z.n_classes
    # The last row is what was dropped.
    sums = torch.zeros(n_classes + 1, features.shape[1], dtype=torch.float64, device=device)
    counts = torch.zeros(n_classes + 1, dtype=torch.float64, device=device)
    # The variance is what is left when the squares of the means are taken off: sums of centred
    # rows keep its digits, where float32 sums of thousands of similar rows lose them.
    centre = features[: gemm_rows(device, n_classes)].mean(0)
    for rows in blocks(len(z), read_rows(device)):
        read, kept = features[rows] - centre, z.take(rows if nodes is None else nodes[rows])
        _add_class_sums(kept, read, sums[:-1], counts[:-1])
        if z.classes is not None:
            dropped = 1 - kept.values.sum(1)
            sums[-1] += dropped @ read
            counts[-1] += dropped.sum(dtype=torch.float64)
    sums.addr_(counts, centre.double())
    return share_tail(sums[:-1], counts[:-1], sums[-1], counts[-1])


def _add_class_sums(
    z: Assignments, features: torch.Tensor, sums: torch.Tensor, counts: torch.Tensor
) -> None:
    """Add a block of rows to the sums and counts."""
    size = gemm_rows(features.device, z.n_classes)

    def part(classes: slice) -> None:
        for rows in blocks(len(z), size):
            values = z.take(rows).dense(classes)
            sums[classes] += values.T @ features[rows]
            for piece in torch.split(values, SUM_ROWS):
                counts[classes] += piece.sum(0, dtype=torch.float64)

    parallel_map(part, blocks(z.n_classes, SUM_CLASSES), features.device)


def share_tail(
    sums: torch.Tensor, counts: torch.Tensor, tail: torch.Tensor, mass: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Share what the rows dropped, sum_i m_i f_i (d,) and sum_i m_i, among the classes as what they
    kept is shared.

    Without it the kept mass and the sum of all squares belong to different sets of rows, and the
    variance is wrong by tens of percent.
    """
    share = counts / counts.sum()
    return sums.addr_(share, tail), counts + share * mass


def energies(z: Assignments, affinity: Affinity) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Operations.energies`."""
    smallest = torch.finfo(z.values.dtype).tiny

    def part(rows: slice) -> torch.Tensor:
        values, messages = z.values[rows], _messages(affinity, z, rows)
        if z.classes is not None:
            messages = messages.gather(1, z.classes[rows].long())
        pairwise = (values * messages).sum(dtype=torch.float64)
        entropy = (values * values.clamp_min(smallest).log_()).sum(dtype=torch.float64)
        return torch.stack([pairwise, entropy])

    device = z.values.device
    terms = parallel_map(part, blocks(len(z), block_rows(device, z.n_classes)), device)
    pairwise, entropy = torch.stack(terms).sum(0)
    return pairwise, entropy


def expectation(
    z: Assignments, log_prior: torch.Tensor, nodes: torch.Tensor | None = None
) -> torch.Tensor:
    """See `Operations.expectation`."""

    def part(rows: slice) -> torch.Tensor:
        kept, terms = z.take(rows if nodes is None else nodes[rows]), log_prior[rows]
        if kept.classes is not None:
            terms = terms.gather(1, kept.classes.long())
        return torch.where(kept.values > 0, kept.values * terms, 0).sum(dtype=torch.float64)

    device = z.values.device
    return torch.stack(
        parallel_map(part, blocks(len(z), block_rows(device, z.n_classes)), device)
    ).sum()


def sum_of_squares(features: UnitRows) -> torch.Tensor:
    """sum_i f_id^2, (d,) float64."""

    device = features.device
    size = SUM_ROWS if device.type == "cpu" else GEMM_ROWS["cuda"][0]

    def part(rows: slice) -> torch.Tensor:
        total = torch.zeros(features.shape[1], dtype=torch.float64, device=device)
        for piece in blocks(rows.stop, size, rows.start):
            total += features[piece].double().square_().sum(0)
        return total

    return torch.stack(parallel_map(part, blocks(len(features), 16 * size), device)).sum(0)


def _top_rows(values: torch.Tensor) -> torch.Tensor:
    """Positions (8, K) of the largest values of each column, equal ones from the top."""
    n = min(START_ROWS, len(values))
    best = values.topk(n, dim=0)
    tied = (values >= best.values[-1]).sum(0) > n  # topk breaks ties as it likes
    tied |= (best.values[1:] == best.values[:-1]).any(0)
    if tied.any():
        ordered = values[:, tied].sort(dim=0, descending=True, stable=True)
        best.indices[:, tied] = ordered.indices[:n]
    return best.indices


def _keep(mass: torch.Tensor, out: Assignments, rows: slice) -> None:
    """Enter the distributions (n, K) of a block of rows into `out`."""
    if out.classes is None:
        out.values[rows] = mass
    else:
        out.values[rows], classes = _largest(mass, out.values.shape[1], out.floor)
        out.classes[rows] = classes.int()


def _keep_candidates(
    block: torch.Tensor, out: Scores, classes: torch.Tensor, nodes: torch.Tensor | slice
) -> None:
    """Enter the scores (n, K) of a block of rows into `out`, as its nodes."""
    block -= block.logsumexp(1, keepdim=True)
    values, places = block.topk(out.values.shape[1], dim=1)
    least = torch.minimum(out.log_threshold[nodes, None], values[:, :1])
    values.masked_fill_(values < least, -torch.inf)
    out.values[nodes], classes[nodes] = values, places.int()
    out.tail[nodes] = (1 - values.exp().sum(1)).clamp_(min=0)


def _largest(mass: torch.Tensor, width: int, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest entries (n, R) of each row, 0 below the floor, and their positions."""
    values, places = mass.topk(min(width, mass.shape[1]), dim=1)
    # A row's largest entry stays, even where all of it underflowed.
    values[:, 0].clamp_(min=torch.finfo(values.dtype).tiny)
    return values.masked_fill_(values < values[:, :1].clamp(max=floor), 0), places


def _messages(affinity: Affinity, z: Assignments, rows: slice) -> torch.Tensor:
    """(A z) of a block of rows, (rows, K): a weighted sum of the neighbours' rows of z."""
    offsets = affinity.offsets[rows.start : rows.stop + 1]
    entries = slice(int(offsets[0]), int(offsets[-1]))
    columns, weights = affinity.columns[entries], affinity.weights[entries]
    if z.classes is None:
        starts = offsets[:-1] - offsets[0]
        return F.embedding_bag(columns, z.values, starts, per_sample_weights=weights, mode="sum")
    local = torch.repeat_interleave(offsets.diff())
    cells = local[:, None] * z.n_classes + z.classes[columns]  # (entries, R)
    messages = z.values.new_zeros(len(offsets) - 1, z.n_classes)
    heard = weights[:, None] * z.values[columns]
    messages.view(-1).index_put_((cells.flatten(),), heard.flatten(), accumulate=True)
    return messages


class TorchOps: ...
