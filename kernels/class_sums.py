"""
Class sums: Z^T F (K, d), and the mass n_k of each class.

The entries of z are sorted by class, in the order of the rows within a class. A program sums a
piece of one class,

    part_p = sum_e z_e f_(row of e),

and a second kernel adds a class's pieces in their order: no atomics, so the same bits every time.

Products and sums are float64, since float32 sums of thousands of similar rows lose the digits that
the variance needs. An H200 or A100 does float64 at half rate; the gather of F dominates the time.

Shapes: z (N, R) float32; F (N, d) float32 or float16; sums float64. Bytes: d entries of F for each
entry in use, and a sort of N R keys of 2 or 4 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from transclip_fast.types import Assignments

MAX_PIECES = 16384  # of all classes together, beside one a class: they fill a GPU many times over
PIECE_ENTRIES = 256  # of a piece, at least: a shorter one costs more to launch than to sum
BLOCK_DIMS, BLOCK_ENTRIES, WARPS = 256, 8, 4
MAX_ENTRIES = 2**31 - 1  # of z at once: 64-bit divisions are slow


@triton.jit
def piece_kernel(
    order_ptr, values_ptr, features_ptr, bounds_ptr, pieces_ptr, classes_ptr,
    part_ptr, part_counts_ptr, n_classes, width, length, d,
    BLOCK_DIMS: tl.constexpr, BLOCK_ENTRIES: tl.constexpr,
):  # fmt: skip
    """One piece of a class, BLOCK_DIMS dimensions of it."""
    piece = tl.program_id(0).to(tl.int64)
    k = tl.load(classes_ptr + piece)
    x = tl.program_id(1) * BLOCK_DIMS + tl.arange(0, BLOCK_DIMS)
    if k < n_classes:
        first = tl.load(bounds_ptr + k) + (piece - tl.load(pieces_ptr + k)) * length
        last = tl.minimum(first + length, tl.load(bounds_ptr + k + 1))
        total = tl.zeros((BLOCK_DIMS,), tl.float64)
        count = tl.zeros((BLOCK_ENTRIES,), tl.float64)
        for start in range(first, last, BLOCK_ENTRIES):
            place = (start + tl.arange(0, BLOCK_ENTRIES)).to(tl.int64)
            entry = tl.load(order_ptr + place, place < last, other=0)
            value = tl.load(values_ptr + entry, place < last, other=0.0).to(tl.float64)
            row = entry.to(tl.int32) // width
            mask = (place < last)[:, None] & (x < d)[None, :]
            f = tl.load(features_ptr + row[:, None].to(tl.int64) * d + x[None, :], mask, other=0.0)
            total += tl.sum(value[:, None] * f.to(tl.float64), 0)
            count += value
        tl.store(part_ptr + piece * d + x, total, x < d)
        if tl.program_id(1) == 0:
            tl.store(part_counts_ptr + piece, tl.sum(count, 0))


@triton.jit
def total_kernel(
    part_ptr, part_counts_ptr, pieces_ptr, sums_ptr, counts_ptr, d,
    BLOCK_DIMS: tl.constexpr, BLOCK_PIECES: tl.constexpr,
):  # fmt: skip
    """All pieces of a class, BLOCK_DIMS dimensions of them."""
    k = tl.program_id(0).to(tl.int64)
    x = tl.program_id(1) * BLOCK_DIMS + tl.arange(0, BLOCK_DIMS)
    first, last = tl.load(pieces_ptr + k), tl.load(pieces_ptr + k + 1)
    total = tl.zeros((BLOCK_DIMS,), tl.float64)
    count = tl.zeros((BLOCK_PIECES,), tl.float64)
    for start in range(first, last, BLOCK_PIECES):
        piece = (start + tl.arange(0, BLOCK_PIECES)).to(tl.int64)
        mask = (piece < last)[:, None] & (x < d)[None, :]
        total += tl.sum(tl.load(part_ptr + piece[:, None] * d + x[None, :], mask, other=0.0), 0)
        count += tl.load(part_counts_ptr + piece, piece < last, other=0.0)
    tl.store(sums_ptr + k * d + x, total, x < d)
    if tl.program_id(1) == 0:
        tl.store(counts_ptr + k, tl.sum(count, 0))


def class_sums(z: Assignments, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sums (K, d) and masses (K,) of the classes, float64.

    Raises
    ------
    ValueError
        Features that are not contiguous; more than `MAX_ENTRIES`.
    """
    n_rows, width, n_classes = len(z), z.values.shape[1], z.n_classes
    if not features.is_contiguous():
        raise ValueError("features must be contiguous")
    if n_rows * width > MAX_ENTRIES:
        raise ValueError(f"{n_rows} rows of {width} entries are too many at once")
    key_type = torch.int16 if n_classes < 2**15 else torch.int32
    values = z.values.contiguous()
    keys = torch.where(values > 0, z.classes, n_classes).to(key_type)  # unused entries come last
    keys, order = keys.flatten().sort(stable=True)
    every = torch.arange(n_classes + 1, dtype=key_type, device=keys.device)
    bounds = torch.searchsorted(keys, every)  # (K + 1,) of the classes' entries
    length = max(PIECE_ENTRIES, triton.cdiv(len(keys), MAX_PIECES))
    pieces = torch.nn.functional.pad(((bounds.diff() + length - 1) // length).cumsum(0), (1, 0))
    n_pieces = len(keys) // length + n_classes  # at most: the number stays on the device
    places = torch.arange(n_pieces, device=keys.device)
    class_of = torch.searchsorted(pieces, places, right=True) - 1

    d = features.shape[1]
    part = values.new_empty(n_pieces, d, dtype=torch.float64)
    part_counts = part.new_empty(n_pieces)
    sums = part.new_empty(n_classes, d)
    counts = part.new_empty(n_classes)
    blocks = triton.cdiv(d, BLOCK_DIMS)
    piece_kernel[(n_pieces, blocks)](
        order, values, features, bounds, pieces, class_of, part, part_counts,
        n_classes, width, length, d,
        BLOCK_DIMS=BLOCK_DIMS, BLOCK_ENTRIES=BLOCK_ENTRIES, num_warps=WARPS,
    )  # fmt: skip
    total_kernel[(n_classes, blocks)](
        part, part_counts, pieces, sums, counts, d,
        BLOCK_DIMS=BLOCK_DIMS, BLOCK_PIECES=BLOCK_ENTRIES, num_warps=WARPS,
    )  # fmt: skip
    return sums, counts
