"""
The solver's operations on a GPU: a launcher of `transclip_fast.kernels` for each.

Nothing here waits for the GPU once a run has begun, except the number of a graph's hub segments,
which is read once. Scores of float16 features are fused with their product; in float32, where a
prior or messages are added, and at the start, products are cuBLAS's, a chunk at a time. Sums are
taken in a fixed order, so two runs give the same bits. `Operations` documents what each does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from weakref import WeakKeyDictionary

import torch

from transclip_fast.data.feature_rows import UnitRows
from transclip_fast.kernels import class_sums as sums_kernels
from transclip_fast.kernels import energies as energy_kernels
from transclip_fast.kernels import score as score_kernels
from transclip_fast.kernels import select as select_kernels
from transclip_fast.kernels import sweep as sweep_kernels
from transclip_fast.kernels import top_rows as start_kernels
from transclip_fast.kernels.messages import Segments
from transclip_fast.kernels.select import Constant
from transclip_fast.ops.blocks import blocks, read_rows
from transclip_fast.ops.capture import Captured
from transclip_fast.ops.torch_backend import expectation, share_tail, sum_of_squares
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

CAPTURED_ROWS = 50_000  # up to which launches matter
_segments: WeakKeyDictionary[Affinity, Segments] = WeakKeyDictionary()


def session() -> AbstractContextManager[None]:
    """See `Operations.session`."""
    return nullcontext()


def captured(
    step: Callable[[], None],
    renewed: Callable[[], Sequence[torch.Tensor]],
    features: UnitRows,
) -> Callable[[], None]:
    """See `Operations.captured`."""
    held = isinstance(features, torch.Tensor) or features.held
    if features.device.type != "cuda" or not held or len(features) > CAPTURED_ROWS:
        return step
    return Captured(step, renewed)


def start(
    features: UnitRows,
    weights: torch.Tensor | None,
    log_prior: torch.Tensor | None,
    *,
    out: Assignments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `Operations.start`."""
    n_rows, n_classes = len(features), out.n_classes
    normaliser = out.values.new_empty(n_rows)
    least, tail = torch.full_like(normaliser, out.floor).log_(), torch.empty_like(normaliser)
    best = start_kernels.nobody(n_classes, features.device)
    # A prior is read where it lies.
    chunk = select_kernels.chunk_of(n_classes, n_rows)
    buffer = normaliser.new_empty(chunk if log_prior is None else 0, n_classes)
    scale = None
    if weights is not None:
        weights, scale = select_kernels.weights_for(features.dtype, weights)
    for rows in blocks(n_rows, chunk):
        if log_prior is not None:
            products = log_prior[rows]
        elif weights is not None:
            products = select_kernels.product(features[rows], weights, buffer)
            if scale is not None:
                products *= scale
        if out.classes is None:
            torch.logsumexp(products, 1, out=normaliser[rows])
            torch.sub(products, normaliser[rows, None], out=out.values[rows]).exp_()
        else:
            select_kernels.select(
                products, Constant(), rows.start, least,
                values=out.values, classes=out.classes, tail=tail, normaliser=normaliser,
            )  # fmt: skip
        start_kernels.most_confident(products, normaliser, rows.start, out=best)
    if out.classes is not None:  # a list ends at its first 0: none may underflow in it
        mass = out.values.exp().clamp_(min=torch.finfo(torch.float32).tiny)
        out.values.copy_(mass.masked_fill_(out.values == -torch.inf, 0))
    return normaliser, *start_kernels.decode(best, n_rows)


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
    weights, scale = select_kernels.weights_for(features.dtype, weights)
    if out.classes is None:
        for part in blocks(len(features), read_rows(features.device)):
            select_kernels.product(features[part], weights, out.values[part])
        if scale is not None:
            out.values.mul_(scale)
        out.values.add_(offset)
        if log_prior is not None:
            out.values.add_(log_prior, alpha=prior_weight)
        if messages is not None:
            entries = len(messages.classes)
            rows = torch.repeat_interleave(messages.offsets.diff(), output_size=entries)
            out.values[rows, messages.classes] += messages.weights
        return out
    if nodes is None:
        nodes = torch.arange(len(features), device=features.device)
    fused = log_prior is None and messages is None and out.values.shape[1] <= score_kernels.MOST
    if fused and scale is not None:
        for part in blocks(len(features), read_rows(features.device)):
            score_kernels.score(
                features[part], weights, scale, offset, out.log_threshold, nodes[part],
                values=out.values, classes=out.classes, tail=out.tail,
            )  # fmt: skip
        return out
    heard = (messages.offsets, messages.classes, messages.weights) if messages else None
    constant = Constant(scale, offset, log_prior, prior_weight, heard)
    normaliser = torch.empty_like(out.tail)
    chunk = select_kernels.chunk_of(out.n_classes, len(features))
    buffer = normaliser.new_empty(chunk, out.n_classes)
    for part in blocks(len(features), chunk):
        products = select_kernels.product(features[part], weights, buffer)
        select_kernels.select(
            products, constant, part.start, out.log_threshold, nodes=nodes,
            values=out.values, classes=out.classes, tail=out.tail, normaliser=normaliser,
        )  # fmt: skip
    return out


def sweep(base: Scores, affinity: Affinity, z: Assignments, *, out: Assignments) -> Assignments:
    """See `Operations.sweep`."""
    graph, segments = _graph(affinity)
    if base.classes is None or z.classes is None or out.classes is None:
        sweep_kernels.sweep_full(base.values, graph, segments, z.values, out=out.values)
    else:
        sweep_kernels.sweep(
            base.values, base.classes, base.tail, graph, segments, z.values, z.classes,
            out.floor, z.n_classes, out=out.values, out_classes=out.classes, bound=out.bound,
        )  # fmt: skip
    return out


def class_sums(
    z: Assignments, features: UnitRows, nodes: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Operations.class_sums`."""
    for rows in blocks(len(z), read_rows(features.device)):
        kept = z.take(rows if nodes is None else nodes[rows])
        if kept.classes is None:
            part = sums_kernels.class_sums_full(kept.values, features[rows])
        else:
            part = sums_kernels.class_sums(kept.values, kept.classes, z.n_classes, features[rows])
        if rows.start == 0:
            sums, counts = part
        else:
            sums += part[0]
            counts += part[1]
    if z.classes is None:
        return sums, counts
    return share_tail(sums[:-1], counts[:-1], sums[-1], counts[-1])


def energies(z: Assignments, affinity: Affinity) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Operations.energies`."""
    graph, segments = _graph(affinity)
    if z.classes is None:
        terms = energy_kernels.energies_full(graph, segments, z.values)
    else:
        terms = energy_kernels.energies(graph, segments, z.values, z.classes)
    return terms[0], terms[1]


def _graph(
    affinity: Affinity,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], Segments]:
    """Arrays of an affinity, and its hubs: found when it is first seen."""
    if affinity not in _segments:
        _segments[affinity] = Segments.of(affinity.offsets)
    return (affinity.offsets, affinity.columns, affinity.weights), _segments[affinity]
