"""Inputs of `bench.gpu.suite`, made on the device, with the bytes and errors of operations."""

from __future__ import annotations

import numpy as np
import torch

from transclip_fast.device import exact_float32
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.ops.torch_backend import TorchOps
from transclip_fast.types import (
    FLOAT32_ROUNDING,
    LARGEST_MESSAGE,
    Affinity,
    Assignments,
    LinearScore,
    Scores,
    Truncation,
)

OWN_CLASS = 0.65  # share of neighbours with the row's label: 62 to 71 % of real ones
SIMILARITY = 0.8  # of all neighbours
CHUNK_ROWS = 1 << 18  # made at a time
PRODUCT_ROWS = 1000  # whose float32 products are compared with float64
# Of float32 products in 16 bits over that of a float32 GEMM. Below 1 where sums are long and exact
# in float32; a matrix unit truncates them, which has not been measured yet.
GEMM_ERROR = 2.0


def made_graph(n: int, k: int, neighbors: int = 3, seed: int = 0, *, hub: int = 0) -> NeighborGraph:
    """
    Return neighbours of rows sorted by label, where row i has label i K // N.

    Row 0 is a neighbour of the `hub` rows after it.
    """
    rng = np.random.default_rng(seed)
    rows = np.arange(n)[:, None]
    size = max(2, n // k)
    near = rows // size * size + rng.integers(0, size, (n, neighbors))
    ids = np.where(rng.random((n, neighbors)) < OWN_CLASS, near, rng.integers(0, n, (n, neighbors)))
    ids = np.minimum(ids, n - 1)
    ids = np.where(ids == rows, (ids + 1) % n, ids)
    ids[1 : hub + 1, 0] = 0
    return NeighborGraph(ids, np.full(ids.shape, SIMILARITY, np.float32))


def made_problem(n: int, k: int, d: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return unit features (N, d) sorted by label, and unit prototypes (K, d), float32."""
    draw = torch.Generator(device).manual_seed(0)

    def normal(rows: int) -> torch.Tensor:
        return torch.randn(rows, d, device=device, generator=draw).div_(d**0.5)

    cone = normal(1)
    centres = cone + 0.6 * normal(k)
    prototypes = torch.nn.functional.normalize(centres + 0.5 * normal(k), dim=1)
    features = torch.empty(n, d, device=device)
    for start in range(0, n, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, n)
        labels = torch.arange(start, stop, device=device) * k // n
        rows = centres[labels] + 0.7 * normal(stop - start)
        features[start:stop] = torch.nn.functional.normalize(rows, dim=1)
    return features, prototypes


def lists(n: int, k: int, candidates: int, device: str, seed: int) -> tuple[Scores, Assignments]:
    """Return base scores and z of rows sorted by label, with some 3 entries of z in use a row."""
    draw = torch.Generator(device).manual_seed(seed)
    labels = torch.arange(n, device=device) * k // n
    step = max(1, k // candidates)
    classes = (labels[:, None] + step * torch.arange(candidates, device=device)) % k
    scores = 4 * torch.randn(n, candidates, device=device, generator=draw)
    values = torch.log_softmax(scores, 1).sort(1, descending=True).values + np.log(0.999)
    shape = torch.full((n,), 1e-3, device=device)
    base = Scores(values, classes.int(), k, shape, torch.zeros_like(shape))
    mass = values.exp()
    mass[:, 1:][mass[:, 1:] < 1e-2] = 0
    return base, Assignments(mass, classes.int(), k, torch.zeros_like(shape), 1e-4)


def score_operands(
    n: int, k: int, d: int, device: str, seed: int, width: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Scores]:
    """Float16 features (N, d) and weights (K, d), an offset (K,), and room for the scores."""
    draw = torch.Generator(device).manual_seed(seed)
    features = torch.randn(n, d, device=device, generator=draw) / d**0.5
    weights = 4 * torch.randn(k, d, device=device, generator=draw)
    out = Scores.empty(torch.ones(n, device=device), k, Truncation(width, width))
    return features.half(), weights.half(), torch.zeros(k, device=device), out


def score_error(features: torch.Tensor, score: LinearScore, out: Scores, rows: int = 2000) -> float:
    """Return the largest error in mass, against float64, of candidates and tails of some rows."""
    sample = torch.arange(0, len(features), max(1, len(features) // rows), device=features.device)
    x = features[sample].double() @ score.weights.double().T + score.offset.double()
    if score.log_prior is not None:
        x += score.prior_weight * score.log_prior[sample].double()
    if score.messages is not None:
        received = x.new_zeros(len(features), x.shape[1])
        places = score.messages.rows(), score.messages.classes
        x += received.index_put_(places, score.messages.weights.double())[sample]
    b = x - x.logsumexp(1, keepdim=True)
    best = b.topk(out.values.shape[1], dim=1).values
    threshold = torch.minimum(out.log_threshold[sample, None].double(), best[:, :1])
    best = best.exp().masked_fill_(best < threshold, 0)
    found = out.values[sample].double().exp()
    off = (found.sort(1, descending=True).values - best).abs().max()
    if out.classes is None:
        raise TypeError("these are errors of sparse assignments")
    truth = b.exp().gather(1, out.classes[sample].long())
    off = off.maximum((found - truth).where(found > 0, 0.0).abs().max())
    return float(off.maximum((out.tail[sample] + best.sum(1) - 1).abs().max()))


def product_error(n: int, k: int, d: int, device: str) -> tuple[float, float]:
    """Return the root mean squared error against float64 of float32 products: ours, a GEMM's."""
    from transclip_fast.kernels.products import HalfWeights, product

    draw = torch.Generator(device).manual_seed(1)
    rows = torch.randn(min(n, PRODUCT_ROWS), d, device=device, generator=draw)
    rows = torch.nn.functional.normalize(rows, dim=1)
    weights = 80 * torch.randn(k, d, device=device, generator=draw)
    truth = rows.double() @ weights.double().T
    ours = product(rows, HalfWeights.of(weights, rows.dtype), torch.empty_like(truth.float()))
    with exact_float32():
        found = ours, rows @ weights.T
    first, second = (float((x.double() - truth).square().mean().sqrt()) for x in found)
    return first, second


def sums_error(ops: TorchOps, z: Assignments, features: torch.Tensor) -> float:
    """Return the largest error, against float64, of class sums of rows sorted by node."""
    exact = torch.zeros(z.n_classes, features.shape[1], dtype=torch.float64, device=features.device)
    for start in range(0, len(z), 1 << 14):
        rows = slice(start, start + (1 << 14))
        exact += z.take(rows).dense().double().T @ features[rows].double()
    return float((ops.class_sums(z, features)[0] - exact).abs().max())


def sweep_bytes(graph: Affinity, z: Assignments) -> float:
    """Return the bytes of a sweep: a row's scores and result, its edges, every gathered entry."""
    n, width = z.values.shape
    used = (z.values > 0).sum(1)
    gathered = float(used[graph.columns].sum())
    return n * (2 * 8.0 * width + 4 + 4 + 8) + 12.0 * len(graph.columns) + 8.0 * gathered


def messages_to(graph: Affinity, z: Assignments, rows: int) -> torch.Tensor:
    """Return A z of the first `rows` rows and all classes, float64."""
    if z.classes is None:
        raise TypeError("these are messages of sparse assignments")
    stop = int(graph.offsets[rows])
    owner = torch.repeat_interleave(graph.offsets.diff()[:rows])
    columns, weights = graph.columns[:stop], graph.weights[:stop].double()
    messages = torch.zeros(rows, z.n_classes, dtype=torch.float64, device=weights.device)
    cells = owner[:, None] * z.n_classes + z.classes[columns]
    entries = weights[:, None] * z.values[columns].double()
    messages.view(-1).index_add_(0, cells.flatten(), entries.flatten())
    return messages


def sweep_error(base: Scores, messages: torch.Tensor, out: Assignments) -> float:
    """Return the largest error, against float64, of the first rows, whose `messages` these are."""
    rows = len(messages)
    candidates, received = _at_candidates(base, messages)
    tail = base.tail[:rows, None].double().log()
    logits = torch.cat([base.values[:rows].double() + received, tail], 1)
    mass = torch.softmax(logits, 1)[:, :-1]
    mass[mass < out.floor] = 0
    whole = torch.zeros_like(messages).scatter_(1, candidates, mass)
    found = out.take(slice(0, rows)).dense()
    return float((found - whole).abs().max())


def bound_error(base: Scores, messages: torch.Tensor, out: Assignments, listed: int) -> float:
    """
    Return the largest error, against float64, of the bounds of the first rows.

    With messages to more than `listed` classes that are no candidates, only bounds that are too
    small are wrong.
    """
    rows = len(messages)
    outside = messages.scatter(1, _at_candidates(base, messages)[0], 0.0)
    tail = base.tail[:rows].double().clamp(min=base.n_classes * FLOAT32_ROUNDING)
    largest = outside.abs().amax(1).clamp(max=LARGEST_MESSAGE)
    off = out.bound[:rows].double() - (tail * largest.expm1()).clamp(max=1)
    return float(torch.where((outside != 0).sum(1) > listed, -off, off.abs()).max())


def energies_error(messages: torch.Tensor, z: Assignments, found: torch.Tensor) -> float:
    """Return the largest error, against float64, of the energies (N, 2) of the first rows."""
    mass = z.take(slice(0, len(messages))).dense().double()
    truth = torch.stack([(mass * messages).sum(1), torch.special.xlogy(mass, mass).sum(1)], 1)
    return float((found[: len(messages)] - truth).abs().max())


def _at_candidates(base: Scores, messages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the candidates (n, C) of the first rows, and the messages to them."""
    if base.classes is None:
        raise TypeError("these are errors of sparse assignments")
    candidates = base.classes[: len(messages)].long()
    return candidates, messages.gather(1, candidates)


def start_errors(
    features: torch.Tensor,
    weights: torch.Tensor,
    z: Assignments,
    top: tuple[torch.Tensor, torch.Tensor],
) -> tuple[float, float]:
    """
    Return the largest errors, against float64, of the start of a solve, for few rows.

    Of the mass of z = y_hat, and of log y_hat of the `top` rows of each class, values and rows.
    """
    threshold = torch.full_like(z.bound, z.floor).log()
    tail = (1 - z.values.sum(1)).clamp(min=0)
    lists = Scores(z.values.log(), z.classes, z.n_classes, tail, threshold)
    score = LinearScore(weights, torch.zeros_like(weights[:, 0]))
    x = torch.log_softmax(features.double() @ weights.double().T, 1)
    best, (values, rows) = x.topk(len(top[0]), dim=0).values, top
    off = (values - best).abs().max().maximum((x.gather(0, rows) - best).abs().max())
    return score_error(features, score, lists, len(features)), float(off)
