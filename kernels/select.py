"""
Base scores b = F P^T + c, cut to each row's candidates without ever holding N x K.

The product of a chunk of rows is cuBLAS's, into a buffer that stays in the L2 cache; one program a
row then finds

    x_k = (F P^T)_k + c_k + prior_weight log y_hat_k + messages_k
    b_k = x_k - log sum_k e^(x_k)
    candidates: b_k >= min(least, max b), the C largest of them
    tail = sum of e^(b_k) of all others

Shapes: products (n, K) float32; values, classes (N, C); tail, normaliser (N,). Candidates are
written in the order of their classes, the unused end is -inf.

The C-th largest is found exactly, by halving the range of the scores' bits read as integers: 32
halvings at most, fewer as soon as a threshold leaves C. Equal ones are taken by class. Rows of up
to BLOCK classes stay in registers; of longer ones the rest is read again from the cache.
Cost: a GEMM of 2 N K d operations, and 4 N K bytes to and from the cache. Method: Zanella et al.,
NeurIPS 2024, equation 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

CHUNK_BYTES = 24 << 20  # of products: half of an H200's L2 cache
BLOCK = 2048


@dataclass(frozen=True)
class Constant:
    """
    What is added to the products of all rows.

    Parameters
    ----------
    scale : Tensor () float32, optional
        What the products are multiplied by.
    offset : Tensor (K,) float32, optional
        c.
    log_prior : Tensor (N, K) float32, optional
        log y_hat, times `prior_weight`.
    messages : Tensor (N + 1,) int64, (E,) int64, (E,) float32, optional
        Offsets of each row's entries, their classes and weights.
    """

    scale: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    log_prior: torch.Tensor | None = None
    prior_weight: float = 1.0
    messages: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None


@triton.jit
def ordered(x):
    """Integers that are ordered as the float32 x."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def between(low, high):
    """Half of their sum, rounded down; the sum itself may overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def complete(
    products, row, k, n_classes, scale, offset, log_prior, prior_weight, starts, classes, weights,
    SCALE: tl.constexpr, OFFSET: tl.constexpr, PRIOR: tl.constexpr, MESSAGES: tl.constexpr,
):  # fmt: skip
    """x of a row at the classes k (B,), -inf beyond K; `products` is the row's."""
    mask = k < n_classes
    x = tl.load(products + k, mask, other=float("-inf"))
    if SCALE:
        x *= tl.load(scale)
    if OFFSET:
        x += tl.load(offset + k, mask, other=0.0)
    if PRIOR:
        x += prior_weight * tl.load(log_prior + row * n_classes + k, mask, other=0.0)
    if MESSAGES:
        for entry in range(tl.load(starts + row), tl.load(starts + row + 1)):
            x += tl.where(k == tl.load(classes + entry), tl.load(weights + entry), 0.0)
    return x


@triton.jit
def count(x, products, n_classes, threshold):
    """Entries of a row whose integer is >= threshold: its first block x, the rest in memory."""
    B: tl.constexpr = x.shape[0]
    found = tl.sum(((ordered(x) >= threshold) & (x > float("-inf"))).to(tl.int32), 0)
    for start in range(B, n_classes, B):
        k = start + tl.arange(0, B)
        y = tl.load(products + k, k < n_classes, other=float("-inf"))
        found += tl.sum(((ordered(y) >= threshold) & (y > float("-inf"))).to(tl.int32), 0)
    return found


@triton.jit
def threshold_of(x, products, n_classes, low, high, width):
    """
    low and high: all entries >= high are kept, at most `width`, and of those >= low the first.

    More than `width` entries are >= low, unless the two are equal.
    """
    taken = count(x, products, n_classes, low)
    high = tl.where(taken <= width, low, high)
    taken = tl.where(taken <= width, taken, 0)
    middle = between(low, high)
    while (middle > low) & (taken < width):
        found = count(x, products, n_classes, middle)
        many = found > width
        low, high = tl.where(many, middle, low), tl.where(many, high, middle)
        taken = tl.where(many, taken, found)
        middle = between(low, high)
    return low, high, taken


@triton.jit
def marked(x, low, high, spare):
    """Which entries stay: all that are >= high, and of those >= low the first `spare`."""
    usable = x > float("-inf")
    equal = ((ordered(x) >= low) & (ordered(x) < high) & usable).to(tl.int32)
    return ((ordered(x) >= high) & usable) | ((equal > 0) & (tl.cumsum(equal, 0) <= spare))


@triton.jit
def enter(x, k, total, low, high, spare, kept, tail, values, classes):
    """Append a block's candidates to the row's list, after the `kept` it has."""
    mine = marked(x, low, high, spare)
    place = kept + tl.cumsum(mine.to(tl.int32), 0) - 1
    tl.store(values + place, x - total, mine)
    tl.store(classes + place, k, mine)
    spare -= tl.sum((mine & (ordered(x) < high)).to(tl.int32), 0)
    kept += tl.sum(mine.to(tl.int32), 0)
    return spare, kept, tail + tl.sum(tl.where(mine, 0.0, tl.exp(x - total)), 0)


@triton.jit
def keep(
    x, k, scores, n_scores, total, largest, least, left, width, values, classes, tail
):  # fmt: skip
    """
    Write a row's candidates, and the mass of all others, of which it is told `left`.

    The first block of scores is x, of the classes k (B,); those of later classes are in memory.
    """
    B: tl.constexpr = x.shape[0]
    place = tl.arange(0, B)
    low = ordered(tl.minimum(least + total, largest))
    low, high, taken = threshold_of(x, scores, n_scores, low, ordered(largest) + 1, width)
    spare, kept, left = enter(x, k, total, low, high, width - taken, 0, left, values, classes)
    for start in range(B, n_scores, B):
        y = tl.load(scores + start + place, start + place < n_scores, other=float("-inf"))
        spare, kept, left = enter(
            y, start + place, total, low, high, spare, kept, left, values, classes
        )
    for start in range(0, width, B):
        c = start + place
        tl.store(values + c, float("-inf"), (c >= kept) & (c < width))
        tl.store(classes + c, 0, (c >= kept) & (c < width))
    tl.store(tail, left)


@triton.jit
def select_kernel(
    products, scale, offset, log_prior, prior_weight, starts, heard_classes, heard_weights,
    nodes, least, values, classes, tail, normaliser, first, n_classes, width,
    SCALE: tl.constexpr, OFFSET: tl.constexpr, PRIOR: tl.constexpr, MESSAGES: tl.constexpr,
    NODES: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """One row of a chunk of products, whose rows are `first` and on of F."""
    local = tl.program_id(0).to(tl.int64)
    row, products = first + local, products + local * n_classes
    k = tl.arange(0, B)
    x = complete(
        products, row, k, n_classes, scale, offset, log_prior, prior_weight,
        starts, heard_classes, heard_weights, SCALE, OFFSET, PRIOR, MESSAGES,
    )  # fmt: skip
    largest = tl.max(x, 0)
    pivot = tl.where(largest > float("-inf"), largest, 0.0)
    mass = tl.sum(tl.exp(x - pivot), 0)
    for start in range(B, n_classes, B):
        y = complete(
            products, row, start + k, n_classes, scale, offset, log_prior, prior_weight,
            starts, heard_classes, heard_weights, SCALE, OFFSET, PRIOR, MESSAGES,
        )  # fmt: skip
        tl.store(products + start + k, y, start + k < n_classes)
        largest = tl.maximum(largest, tl.max(y, 0))
        shift = tl.where(largest > float("-inf"), largest, 0.0)
        mass = mass * tl.exp(pivot - shift) + tl.sum(tl.exp(y - shift), 0)
        pivot = shift
    tl.debug_barrier()  # a thread may read back what another wrote
    total = pivot + tl.log(mass)
    tl.store(normaliser + row, total)

    node = row
    if NODES:
        node = tl.load(nodes + row)
    keep(
        x, k, products, n_classes, total, largest, tl.load(least + node), 0.0, width,
        values + node * width, classes + node * width, tail + node,
    )  # fmt: skip


LAUNCHES = {256: 1, 512: 2, 1024: 4, 2048: 16}  # classes of a block: warps


def launch_of(n_classes: int) -> tuple[int, int]:
    """Classes of a block and its warps: 4 or 8 scores a thread, as registers allow."""
    block = max(256, min(BLOCK, triton.next_power_of_2(n_classes)))
    return block, LAUNCHES[block]


def weights_for(
    dtype: torch.dtype, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    P in the type of the features, and the power of two () float32 to multiply the products by.

    float16 has no room for P where a variance is small: all of P is brought to at most 2^15.
    """
    if dtype == weights.dtype:
        return weights, None
    exponent = torch.frexp(weights.abs().max()).exponent - 15
    scaled = torch.ldexp(weights, -exponent).to(dtype)
    return scaled, torch.ldexp(torch.ones_like(weights[0, 0]), exponent)


def product(features: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """F P^T (n, K) with float32 sums, into the first rows of `out`."""
    out = out[: len(features)]
    if features.dtype == torch.float32:
        return torch.mm(features, weights.T, out=out)
    if features.is_cuda:
        return torch.mm(features, weights.T, out_dtype=torch.float32, out=out)
    return torch.mm(features.float(), weights.float().T, out=out)


def chunk_of(n_classes: int, n_rows: int) -> int:
    """Rows of a chunk of products."""
    return min(n_rows, max(256, CHUNK_BYTES // (4 * n_classes)))


def select(
    products: torch.Tensor,
    constant: Constant,
    first: int,
    least: torch.Tensor,
    *,
    values: torch.Tensor,
    classes: torch.Tensor,
    tail: torch.Tensor,
    normaliser: torch.Tensor,
    nodes: torch.Tensor | None = None,
) -> None:
    """
    Enter the candidates of a chunk of rows, `first` and on; products are overwritten.

    Parameters
    ----------
    products : Tensor (n, K) float32
    least : Tensor (N,) float32
        A class is a candidate if b is at least this, or its row's largest.
    values, classes : Tensor (N, C) float32, int32
    tail, normaliser : Tensor (N,) float32
        Receive the mass of the other classes, and log sum_k e^(x_k) in the order of the features.
    nodes : Tensor (N,) int64, optional
        Row of `least`, `values`, `classes` and `tail` of each row of the features.
    """
    n, n_classes = products.shape
    if not products.is_contiguous() or values.shape != classes.shape:
        raise ValueError("products must be contiguous, values and classes of one shape")
    nothing = normaliser
    starts, heard_classes, heard_weights = constant.messages or (nothing, nothing, nothing)
    block, warps = launch_of(n_classes)
    select_kernel[(n,)](
        products,
        nothing if constant.scale is None else constant.scale,
        nothing if constant.offset is None else constant.offset,
        nothing if constant.log_prior is None else constant.log_prior,
        constant.prior_weight, starts, heard_classes, heard_weights,
        nothing if nodes is None else nodes,
        least, values, classes, tail, normaliser, first, n_classes, values.shape[1],
        SCALE=constant.scale is not None, OFFSET=constant.offset is not None,
        PRIOR=constant.log_prior is not None, MESSAGES=constant.messages is not None,
        NODES=nodes is not None, B=block, num_warps=warps,
    )  # fmt: skip
