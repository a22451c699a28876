"""
Base scores b = F P^T + c, cut to each row's candidates without ever holding N x K.

The product of a chunk of rows goes into a buffer that stays in the L2 cache; one program a row then
finds

    x_k = (F P^T)_k + c_k + prior_weight log y_hat_k + messages_k
    b_k = x_k - log sum_k e^(x_k)
    candidates: b_k >= min(log_threshold, max b), the C largest of them
    tail = sum of e^(b_k) of all others

Shapes: products (n, K) float32; values, classes (N, C); tail, normaliser (N,). Candidates are
written in the order of their classes, the unused end is -inf.

The C-th largest score is found exactly by bisection over the scores' bits, read as integers, from a
bar up that at least C scores reach: the C-th largest of G partial maxima, where maximum g is over
the classes k = g modulo G, or log_threshold if that is higher. Of 1000 scores some 14 to 50 reach
it, and a few halvings leave C of them. Of equal scores the first classes are taken.

One warp computes a row. A row of up to BLOCK_CLASSES classes stays in registers; the rest of LONG
ones is read again from the cache. Cost: a product of 2 N K d operations, and 4 N K bytes to and
from the cache. Method: Zanella et al., NeurIPS 2024, equation 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from transclip_fast.types import Messages, Scores

CHUNK_BYTES = 24 << 20  # of products: half of an H200's L2 cache
BLOCK_CLASSES = 1024  # of a whole row at most: as many as the registers of a warp hold
LONG_CLASSES = 512  # of a block of a longer row
BLOCK_UNUSED = tl.constexpr(32)  # entries at the end of a list
PARTIAL_MAXIMA = tl.constexpr(64)  # G, of a row
BAR_HALVINGS = tl.constexpr(8)  # bring the bar within 1/256 of its range
BAR_NATS = tl.constexpr(100.0)  # below the largest score the bar is not looked for
LOWEST = tl.constexpr(-2139095040)  # the integer after that of -inf: no class has less


@dataclass(frozen=True)
class ScoreTerms:
    """
    The terms of x beside the products: c (K,), log y_hat (N, K), and messages of the support, by
    rows of the features.
    """

    offset: torch.Tensor | None = None
    log_prior: torch.Tensor | None = None
    prior_weight: float = 1.0
    messages: Messages | None = None


@triton.jit
def ordered(x):
    """Integers in the same order as the float32 x."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def score_of(integer):
    """The float32 that `ordered` made this integer of."""
    bits = tl.where(integer < 0, integer ^ 0x7FFFFFFF, integer)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def between(low, high):
    """Half of their sum, rounded down; the sum itself may overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def complete_scores(
    products_ptr, row, k, n_classes, offset_ptr, log_prior_ptr, prior_weight,
    message_offsets_ptr, message_classes_ptr, message_weights_ptr,
    OFFSET: tl.constexpr, PRIOR: tl.constexpr, MESSAGES: tl.constexpr,
):  # fmt: skip
    """x of a row at the classes k (B,), -inf beyond K; `products_ptr` is the row's."""
    mask = k < n_classes
    x = tl.load(products_ptr + k, mask, other=float("-inf"))
    if OFFSET:
        x += tl.load(offset_ptr + k, mask, other=0.0)
    if PRIOR:
        x += prior_weight * tl.load(log_prior_ptr + row * n_classes + k, mask, other=0.0)
    if MESSAGES:
        first, last = tl.load(message_offsets_ptr + row), tl.load(message_offsets_ptr + row + 1)
        for entry in range(first, last):
            message = tl.load(message_weights_ptr + entry)
            x += tl.where(k == tl.load(message_classes_ptr + entry), message, 0.0)
    return x


@triton.jit
def raised(best, bar, bound, largest, width, HALVINGS: tl.constexpr):
    """The bar (M,), raised as far as `width` of the partial maxima `best` (M, G) still reach it."""
    low, high = tl.maximum(tl.maximum(bar, bound), largest - BAR_NATS), largest
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        enough = tl.sum((best >= middle[:, None]).to(tl.int32), 1) >= width
        bar = tl.where(enough, middle, bar)
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    return bar


@triton.jit
def partial_maxima(x):
    """Largest score (1, G) of the classes k = g modulo G of a block."""
    return tl.max(tl.reshape(x, (x.shape[0] // PARTIAL_MAXIMA, PARTIAL_MAXIMA)), 0)[None, :]


@triton.jit
def count_at_least(x, products_ptr, n_classes, threshold):
    """Scores of a row that are >= threshold: the first block is x, the rest in memory."""
    BLOCK_CLASSES: tl.constexpr = x.shape[0]
    found = tl.sum((x >= threshold).to(tl.int32), 0)
    for start in range(BLOCK_CLASSES, n_classes, BLOCK_CLASSES):
        k = start + tl.arange(0, BLOCK_CLASSES)
        y = tl.load(products_ptr + k, k < n_classes, other=float("-inf"))
        found += tl.sum((y >= threshold).to(tl.int32), 0)
    return found


@triton.jit
def thresholds_of(x, products_ptr, n_classes, bar, largest, width):
    """
    low and high: a row keeps its entries >= high, at most `width`, then the first of those >= low.

    More than `width` entries are >= low, unless low == high; `largest` is the largest entry, at
    least `width` of them reach the bar, or all that do are kept. -inf is no entry.
    """
    low, high = tl.maximum(ordered(bar), LOWEST), ordered(largest) + 1
    taken = count_at_least(x, products_ptr, n_classes, score_of(low))
    high = tl.where(taken <= width, low, high)
    taken = tl.where(taken <= width, taken, 0)
    middle = between(low, high)
    while (middle > low) & (taken < width):
        found = count_at_least(x, products_ptr, n_classes, score_of(middle))
        many = found > width
        low, high = tl.where(many, middle, low), tl.where(many, high, middle)
        taken = tl.where(many, taken, found)
        middle = between(low, high)
    return score_of(low), score_of(high), taken


@triton.jit
def selected(x, low, high, spare):
    """Which entries stay: all that are >= high, and of those >= low the first `spare`."""
    own = x >= high
    if spare > 0:
        equal = ((x >= low) & (x < high)).to(tl.int32)
        own = own | ((equal > 0) & (tl.cumsum(equal, 0) <= spare))
    return own


@triton.jit
def append_candidates(x, k, total, low, high, spare, kept, outside, values_ptr, classes_ptr):
    """Append a block's candidates to the row's list, after its first `kept` entries."""
    own = selected(x, low, high, spare)
    place = kept + tl.cumsum(own.to(tl.int32), 0) - 1
    tl.store(values_ptr + place, x - total, own)
    tl.store(classes_ptr + place, k, own)
    if spare > 0:
        spare -= tl.sum((own & (x < high)).to(tl.int32), 0)
    kept += tl.sum(own.to(tl.int32), 0)
    return spare, kept, outside + tl.sum(tl.where(own, 0.0, tl.exp(x - total)), 0)


@triton.jit
def write_candidates(
    x, k, scores_ptr, n_scores, total, bar, largest, outside, width,
    values_ptr, classes_ptr, tail_ptr,
):  # fmt: skip
    """
    Write a row's candidates, and the mass of all other classes to `tail_ptr`.

    The first block of scores is x, of the classes k (B,); those of later classes are in memory.
    At least `width` scores reach the bar, or all that do are candidates. `outside` is the mass of
    classes that are in neither.
    """
    BLOCK_CLASSES: tl.constexpr = x.shape[0]
    place = tl.arange(0, BLOCK_CLASSES)
    low, high, taken = thresholds_of(x, scores_ptr, n_scores, bar, largest, width)
    spare, kept, outside = append_candidates(
        x, k, total, low, high, width - taken, 0, outside, values_ptr, classes_ptr
    )
    for start in range(BLOCK_CLASSES, n_scores, BLOCK_CLASSES):
        y = tl.load(scores_ptr + start + place, start + place < n_scores, other=float("-inf"))
        spare, kept, outside = append_candidates(
            y, start + place, total, low, high, spare, kept, outside, values_ptr, classes_ptr
        )
    for start in range(0, width, BLOCK_UNUSED):
        c = start + tl.arange(0, BLOCK_UNUSED)
        tl.store(values_ptr + c, float("-inf"), (c >= kept) & (c < width))
        tl.store(classes_ptr + c, 0, (c >= kept) & (c < width))
    tl.store(tail_ptr, outside)


@triton.jit
def select_kernel(
    products_ptr, offset_ptr, log_prior_ptr, prior_weight,
    message_offsets_ptr, message_classes_ptr, message_weights_ptr,
    nodes_ptr, log_threshold_ptr, values_ptr, classes_ptr, tail_ptr, normaliser_ptr,
    first, n_classes, width,
    OFFSET: tl.constexpr, PRIOR: tl.constexpr, MESSAGES: tl.constexpr,
    NODES: tl.constexpr, LONG: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """One row of a chunk of products, whose first row is row `first` of F."""
    n_scores = n_classes if LONG else BLOCK_CLASSES
    local = tl.program_id(0).to(tl.int64)
    row, products_ptr = first + local, products_ptr + local * n_classes
    k = tl.arange(0, BLOCK_CLASSES)
    x = complete_scores(
        products_ptr, row, k, n_classes, offset_ptr, log_prior_ptr, prior_weight,
        message_offsets_ptr, message_classes_ptr, message_weights_ptr,
        OFFSET, PRIOR, MESSAGES,
    )  # fmt: skip
    largest, best = tl.max(x, 0), partial_maxima(x)
    pivot = tl.where(largest > float("-inf"), largest, 0.0)
    mass = tl.sum(tl.exp(x - pivot), 0)
    for start in range(BLOCK_CLASSES, n_scores, BLOCK_CLASSES):
        y = complete_scores(
            products_ptr, row, start + k, n_classes, offset_ptr, log_prior_ptr, prior_weight,
            message_offsets_ptr, message_classes_ptr, message_weights_ptr, OFFSET, PRIOR, MESSAGES,
        )  # fmt: skip
        tl.store(products_ptr + start + k, y, start + k < n_classes)
        best = tl.maximum(best, partial_maxima(y))
        largest = tl.maximum(largest, tl.max(y, 0))
        shift = tl.where(largest > float("-inf"), largest, 0.0)
        mass = mass * tl.exp(pivot - shift) + tl.sum(tl.exp(y - shift), 0)
        pivot = shift
    tl.debug_barrier()  # a thread may read back what another wrote
    total = pivot + tl.log(mass)
    tl.store(normaliser_ptr + row, total)

    node = row
    if NODES:
        node = tl.load(nodes_ptr + row)
    lowest = tl.minimum(tl.load(log_threshold_ptr + node) + total, largest)
    bars, top = tl.full((1,), lowest, tl.float32), tl.full((1,), largest, tl.float32)
    bar = tl.max(raised(best, bars, bars, top, width, BAR_HALVINGS), 0)
    write_candidates(
        x, k, products_ptr, n_scores, total, bar, largest, 0.0, width,
        values_ptr + node * width, classes_ptr + node * width, tail_ptr + node,
    )  # fmt: skip


def launch(n_classes: int) -> dict[str, int]:
    """Blocks and options of a kernel on rows of so many classes."""
    long = n_classes > BLOCK_CLASSES
    block = LONG_CLASSES if long else max(256, triton.next_power_of_2(n_classes))
    return {"LONG": long, "BLOCK_CLASSES": block, "num_warps": 1}


def chunk_rows(n_classes: int, n_rows: int) -> int:
    """Rows of a chunk of products."""
    return min(n_rows, max(256, CHUNK_BYTES // (4 * n_classes)))


def select(
    products: torch.Tensor,
    terms: ScoreTerms,
    first: int,
    *,
    out: Scores,
    normaliser: torch.Tensor,
    nodes: torch.Tensor | None = None,
) -> None:
    """
    Write the candidates of a chunk of rows, `first` and on, to their nodes in sparse scores.

    Parameters
    ----------
    products : Tensor (n, K) float32
        Overwritten.
    normaliser : Tensor (N,) float32
        Receives log sum_k e^(x_k), in the order of the features.
    nodes : Tensor (N,) int64, optional
        Row of `out` of each row of the features; without it they are the same.
    """
    n, n_classes = products.shape
    given = terms.offset, terms.log_prior, nodes
    offset, log_prior, places = (normaliser if x is None else x for x in given)
    if not (products.is_contiguous() and log_prior.is_contiguous()):
        raise ValueError("products and prior must be contiguous")
    messages = terms.messages or Messages(normaliser, normaliser, normaliser)
    select_kernel[(n,)](
        products, offset, log_prior, terms.prior_weight,
        messages.offsets, messages.classes, messages.weights, places,
        out.log_threshold, out.values, out.classes, out.tail, normaliser,
        first, n_classes, out.values.shape[1],
        OFFSET=terms.offset is not None, PRIOR=terms.log_prior is not None,
        MESSAGES=terms.messages is not None, NODES=nodes is not None, **launch(n_classes),
    )  # fmt: skip
