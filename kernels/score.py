"""
Base scores b = F P^T + c cut to each row's candidates, fused with the product: no N x K anywhere.

    x_k = s (F P^T)_k + c_k,   total = log sum_k e^(x_k),   b_k = x_k - total
    candidates: b_k >= min(least, max b), the C largest of them
    tail = sum of e^(b_k) of all others

A program owns a block of rows and goes through the classes in blocks: a tile of F P^T at a time on
the matrix units, in 16 bits with float32 sums, of which only what may still be a candidate is
appended to its row's list. That is what passes two bars, both of which only rise:

- min(least + log-sum-exp so far, largest so far), a little below it for the rounding of the sum;
- the C-th largest of G partial maxima, each of the classes that are equal modulo G: so many
  entries are at least as large. A few halvings bracket it. An entry must reach the bar that counts
  its own block, and be above the one before its block: of equal ones the first classes count.

If the largest come in no particular order, a list so grows to C (1 + log(K / G)) entries or a few
more, some 60 at C = 16 and K = 1024. One that might outgrow its room is cut to its C largest. A
second kernel cuts each list to the candidates and writes them in the order of their classes.

Shapes: F (N, d) and P (K, d) float16, c (K,) float32; values, classes (N, C). Cost:
2 N K d operations; N K d (1 / M + 1 / N) entries read from the cache for tiles of M x N. Method:
Zanella et al., NeurIPS 2024, equation 5.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from transclip_fast.kernels.select import keep, marked, ordered, threshold_of

MOST = 32  # candidates; with more, partial maxima are no bar
CHUNK_ROWS = 1 << 16  # whose lists there is room for: 134 MB, of which little is touched
ROOM = 256  # entries of a list
GROUPS = 64  # partial maxima of a row
# Rows and classes of a tile, dimensions of a step, warps, stages of the pipeline: the largest tiles
# that spill nothing. AMD's 64 KB hold one stage.
LAUNCHES = {
    "sm_90": (128, 128, 64, 8, 3),
    "cuda": (64, 64, 64, 8, 3),
    "hip": (64, 64, 32, 8, 1),
}
FINISH_WARPS = 1
PARTS = tl.constexpr(4)  # of a tile, which are appended one after the other
HALVINGS = tl.constexpr(4)
SLACK = tl.constexpr(1e-3)  # nats: far more than a sum of exponentials is rounded by


@triton.jit
def raised(best, bar, bound, largest, width):
    """A bar (M,) that at least `width` of the partial maxima `best` (M, G) reach, from `bar` up."""
    low, high = tl.maximum(bar, bound), largest
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        enough = tl.sum((best >= middle[:, None]).to(tl.int32), 1) >= width
        bar = tl.where(enough, middle, bar)
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    return bar


@triton.jit
def above(x):
    """The float32 after x."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x > 0, bits + 1, tl.where(x < 0, bits - 1, 1)).to(tl.float32, bitcast=True)


@triton.jit
def entry_of(x, k):
    """A score and its class in one integer."""
    return (x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | k


@triton.jit
def listed(entries, length, B: tl.constexpr):
    """Scores (B,) and classes of a list, -inf beyond its length."""
    place = tl.arange(0, B)
    both = tl.load(entries + place, place < length, other=0)
    x = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where(place < length, x, float("-inf")), both.to(tl.int32)


@triton.jit
def cut(entries, length, width, pivot, unused, B: tl.constexpr):
    """Cut a list in memory to its `width` largest; the least of them, and the others' mass."""
    x, k = listed(entries, length, B)
    low = ordered(tl.min(tl.where(tl.arange(0, B) < length, x, float("inf")), 0))
    low, high, taken = threshold_of(x, unused, B, low, ordered(tl.max(x, 0)) + 1, width)
    mine = marked(x, low, high, width - taken)
    tl.debug_barrier()  # all is read before any of it is written over
    tl.store(entries + tl.cumsum(mine.to(tl.int32), 0) - 1, entry_of(x, k), mine)
    least = tl.min(tl.where(mine, x, float("inf")), 0)
    return least, tl.sum(tl.where(mine, 0.0, tl.exp(x - pivot)), 0)


@triton.jit
def cut_all(entries, width, largest, bar, rest, length, unused, B: tl.constexpr):
    """Cut the lists (M, B) of more than `width` entries."""
    M: tl.constexpr = length.shape[0]
    m = tl.arange(0, M)
    tl.debug_barrier()  # a thread may read back what another wrote
    for i in range(M):
        size = tl.sum(tl.where(m == i, length, 0), 0)
        if size > width:
            pivot = tl.max(tl.where(m == i, largest, float("-inf")), 0)
            least, lost = cut(entries + i * B, size, width, pivot, unused, B)
            bar = tl.where(m == i, tl.maximum(bar, least), bar)
            rest += tl.where(m == i, lost, 0.0)
            length = tl.where(m == i, width, length)
    tl.debug_barrier()
    return bar, rest, length


@triton.jit
def append(x, start, entries, limit, largest, mass, rest, length, B: tl.constexpr):
    """List those scores (M, P) of the classes `start` and on that are at least `limit` (M,)."""
    M: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1]
    p = tl.arange(0, P)
    passes, terms = x >= limit[:, None], tl.exp(x - largest[:, None])
    mass += tl.sum(terms, 1)
    rest += tl.sum(tl.where(passes, 0.0, terms), 1)
    if tl.max(passes.to(tl.int32)) > 0:
        # Places by a product with a triangle of ones: a scan would leave the tile's layout.
        rank = tl.dot(passes.to(tl.float16), (p[:, None] <= p[None, :]).to(tl.float16))
        place = (tl.arange(0, M) * B + length - 1)[:, None] + rank.to(tl.int32)
        tl.store(entries + place, entry_of(x, (p + start)[None, :]), passes)
        length += tl.max(rank, 1).to(tl.int32)
    return mass, rest, length


@triton.jit
def columns(x, part: tl.constexpr, PARTS: tl.constexpr):
    """One of PARTS blocks of the columns: a column's register is known when this is compiled."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    bits = tl.reshape(x.to(tl.int32, bitcast=True), (M, PARTS, N // PARTS))
    own = tl.arange(0, PARTS)[None, :, None] == part
    return tl.sum(tl.where(own, bits, 0), 1).to(tl.float32, bitcast=True)


@triton.jit
def score_kernel(
    features, weights, scale, offset, least, nodes, entries, lengths, totals, rests,
    first, stop, n_classes, d, width,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """M of the rows `first` to `stop`: lists, log-sum-exps, and the mass of all not listed."""
    local = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    inside = first + local < stop
    row = tl.minimum(first + local, stop - 1)
    i = tl.arange(0, D)
    # Rows beyond the last copy it, and list nothing.
    lowest = tl.where(inside, tl.load(least + tl.load(nodes + row)), float("inf"))  # (M,)
    entries += tl.program_id(0).to(tl.int64) * M * B
    factor = tl.load(scale)
    largest = tl.full((M,), float("-inf"), tl.float32)
    bar = tl.where(inside, float("-inf"), float("inf"))
    best = tl.full((M, G), float("-inf"), tl.float32)
    rest = tl.zeros((M,), tl.float32)
    mass = rest + 1.0  # of nothing: shrunk to 0 by the first scores
    length = tl.zeros((M,), tl.int32)
    for start in range(0, n_classes, N):
        if tl.max(length, 0) > B - N:
            bar, rest, length = cut_all(entries, width, largest, bar, rest, length, least, B)
        k = start + tl.arange(0, N)
        start_of_class = tl.minimum(k, n_classes - 1).to(tl.int64) * d
        x = tl.zeros((M, N), tl.float32)
        for step in range(0, d, D):
            within = step + i < d
            a = tl.load(
                features + (row * d)[:, None] + (step + i)[None, :], within[None, :], other=0.0
            )
            b = tl.load(
                weights + start_of_class[None, :] + (step + i)[:, None],
                within[:, None],
                other=0.0,
            )
            x = tl.dot(a, b, x, input_precision="ieee")
        x = x * factor + tl.load(offset + k, k < n_classes, other=float("-inf"))[None, :]
        before, largest = largest, tl.maximum(largest, tl.max(x, 1))
        total = tl.maximum(before + tl.log(mass), largest)  # no more than the sum's logarithm
        bound = tl.minimum(lowest + total - SLACK, largest)
        best = tl.maximum(best, tl.max(tl.reshape(x, (M, N // G, G)), 1))
        old, bar = bar, raised(best, bar, bound, largest, width)
        limit = tl.maximum(bar, bound)
        limit = tl.where(limit > old, limit, above(old))
        shrink = tl.exp(before - largest)
        mass, rest = mass * shrink, rest * shrink
        for part in tl.static_range(PARTS):
            mass, rest, length = append(
                columns(x, part, PARTS), start + part * (N // PARTS), entries, limit, largest,
                mass, rest, length, B,
            )  # fmt: skip
    tl.store(lengths + local, length, inside)
    tl.store(totals + local, largest + tl.log(mass), inside)
    tl.store(rests + local, rest / mass, inside)


@triton.jit
def finish_kernel(
    entries, lengths, totals, rests, least, nodes, values, classes, tail, first, width,
    B: tl.constexpr,
):  # fmt: skip
    """The candidates of one row, from its list."""
    local = tl.program_id(0).to(tl.int64)
    node = tl.load(nodes + first + local)
    length = tl.load(lengths + local)
    x, k = listed(entries + local * B, length, B)
    keep(
        x, k, least, B, tl.load(totals + local), tl.max(x, 0), tl.load(least + node),
        tl.load(rests + local), width, values + node * width, classes + node * width, tail + node,
    )  # fmt: skip


def launch_of(device: torch.device) -> tuple[int, int, int, int, int]:
    """The launch on a device, as in LAUNCHES."""
    if torch.version.hip:
        return LAUNCHES["hip"]
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return LAUNCHES["sm_90" if hopper else "cuda"]


def score(
    features: torch.Tensor,
    weights: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    least: torch.Tensor,
    nodes: torch.Tensor,
    *,
    values: torch.Tensor,
    classes: torch.Tensor,
    tail: torch.Tensor,
) -> None:
    """
    Enter the candidates of all rows.

    Parameters
    ----------
    features, weights : Tensor (N, d), (K, d) float16
    scale : Tensor () float32
        What the products are multiplied by.
    offset : Tensor (K,) float32
    least : Tensor (N,) float32
        A class is a candidate if b is at least this, or its row's largest.
    nodes : Tensor (N,) int64
        Row of `least`, `values`, `classes` and `tail` of each row of the features.
    values, classes : Tensor (N, C) float32, int32
        C at most MOST.
    tail : Tensor (N,) float32
        Receives the mass of the other classes.
    """
    (n_rows, d), (n_classes, width) = features.shape, (len(weights), values.shape[1])
    if not features.is_contiguous() or not weights.is_contiguous() or width > MOST:
        raise ValueError(f"features and weights must be contiguous, candidates at most {MOST}")
    chunk = min(n_rows, CHUNK_ROWS)
    entries = nodes.new_empty(chunk, ROOM)
    lengths, totals, rests = classes.new_empty(chunk), tail.new_empty(chunk), tail.new_empty(chunk)
    size, block, depth, warps, stages = launch_of(features.device)
    for first in range(0, n_rows, chunk):
        stop = min(first + chunk, n_rows)
        score_kernel[(triton.cdiv(stop - first, size),)](
            features, weights, scale, offset, least, nodes, entries, lengths, totals, rests,
            first, stop, n_classes, d, width,
            M=size, N=block, D=depth, G=GROUPS, B=ROOM,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        finish_kernel[(stop - first,)](
            entries, lengths, totals, rests, least, nodes, values, classes, tail, first, width,
            B=ROOM, num_warps=FINISH_WARPS,
        )  # fmt: skip
