"""
Class sums: Z^T F (K, d), the mass n_k of each class, and the sum of what rows dropped.

Short form. The entries of z, with the mass each row dropped as one entry more of a class K, are
sorted by class; equal ones stay in the order of the rows. A program sums a piece of one class,

    part_p = sum_e z_e f_(row of e),

and a second kernel adds a class's pieces in their order: no atomics, so the same bits every time.
Full form. A program owns a block of Z^T F for a share of the rows, and multiplies centred rows.

float32 sums of thousands of similar rows lose the digits that the variance is made of. Products and
sums of pieces are float64 (an H200 or A100 does them at half rate, the gather of F is what costs);
the full form's are float32 over at most ROWS rows less their centre, then float64.

Shapes: z (N, R) or (N, K) float32; F (N, d) float32 or float16; sums float64. Bytes: d entries of
F for each entry in use, and a sort of N (R + 1) keys of 2 or 4 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PIECES = 16384  # at most, and one a class
SHORTEST = 256  # entries of a piece
DIMS, ENTRIES, WARPS = 256, 8, 4
ROWS, CLASSES, FULL_DIMS, FULL_WARPS = 16, 64, 64, 8
SHARES, SHARE = 16, 1024  # of the rows in the full form: their number, and rows at least


@triton.jit
def piece_kernel(
    order, values, features, bounds, pieces, classes, part, part_counts,
    n_classes, width, length, d, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """One piece of a class, D dimensions of it."""
    piece = tl.program_id(0).to(tl.int64)
    k = tl.load(classes + piece)
    x = tl.program_id(1) * D + tl.arange(0, D)
    if k < n_classes:
        first = tl.load(bounds + k) + (piece - tl.load(pieces + k)) * length
        last = tl.minimum(first + length, tl.load(bounds + k + 1))
        total = tl.zeros((D,), tl.float64)
        count = tl.zeros((E,), tl.float64)
        for start in range(first, last, E):
            place = (start + tl.arange(0, E)).to(tl.int64)
            entry = tl.load(order + place, place < last, other=0)
            value = tl.load(values + entry, place < last, other=0.0).to(tl.float64)
            row = entry // width
            mask = (place < last)[:, None] & (x < d)[None, :]
            f = tl.load(features + row[:, None] * d + x[None, :], mask, other=0.0)  # (E, D)
            total += tl.sum(value[:, None] * f.to(tl.float64), 0)
            count += value
        tl.store(part + piece * d + x, total, x < d)
        if tl.program_id(1) == 0:
            tl.store(part_counts + piece, tl.sum(count, 0))


@triton.jit
def total_kernel(part, part_counts, pieces, sums, counts, d, D: tl.constexpr, E: tl.constexpr):
    """All pieces of a class, D dimensions of them."""
    k = tl.program_id(0).to(tl.int64)
    x = tl.program_id(1) * D + tl.arange(0, D)
    first, last = tl.load(pieces + k), tl.load(pieces + k + 1)
    total = tl.zeros((D,), tl.float64)
    count = tl.zeros((E,), tl.float64)
    for start in range(first, last, E):
        piece = (start + tl.arange(0, E)).to(tl.int64)
        mask = (piece < last)[:, None] & (x < d)[None, :]
        total += tl.sum(tl.load(part + piece[:, None] * d + x[None, :], mask, other=0.0), 0)
        count += tl.load(part_counts + piece, piece < last, other=0.0)
    tl.store(sums + k * d + x, total, x < d)
    if tl.program_id(1) == 0:
        tl.store(counts + k, tl.sum(count, 0))


@triton.jit
def full_kernel(
    z, features, centre, part, part_counts, n_rows, n_classes, d, share,
    K: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A (K, D) block of Z^T (F - centre) over one share of the rows."""
    k = tl.program_id(0) * K + tl.arange(0, K)
    x = tl.program_id(1) * D + tl.arange(0, D)
    split = tl.program_id(2).to(tl.int64)
    middle = tl.load(centre + x, x < d, other=0.0)
    total = tl.zeros((K, D), tl.float64)
    count = tl.zeros((K,), tl.float64)
    stop = tl.minimum((split + 1) * share, n_rows)
    for start in range(split * share, stop, R):
        row = (start + tl.arange(0, R)).to(tl.int64)
        mask = (k < n_classes)[:, None] & (row < stop)[None, :]
        mass = tl.load(z + row[None, :] * n_classes + k[:, None], mask, other=0.0)  # (K, R)
        mask = (row < stop)[:, None] & (x < d)[None, :]
        f = tl.load(features + row[:, None] * d + x[None, :], mask, other=0.0)  # (R, D)
        f = f.to(tl.float32) - middle[None, :]
        total += tl.dot(mass, f, input_precision="ieee").to(tl.float64)
        count += tl.sum(mass.to(tl.float64), 1)
    place = split * n_classes + k
    mask = (k < n_classes)[:, None] & (x < d)[None, :]
    tl.store(part + place[:, None] * d + x[None, :], total, mask)
    if tl.program_id(1) == 0:
        tl.store(part_counts + place, count, k < n_classes)


def class_sums(
    z: torch.Tensor, classes: torch.Tensor, n_classes: int, features: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sums and masses of the short form.

    Parameters
    ----------
    z, classes : Tensor (N, R) float32, int32
    features : Tensor (N, d)

    Returns
    -------
    sums, counts : Tensor (K + 1, d), (K + 1,) float64
        The last one is of the mass that rows dropped.
    """
    n_rows, width = z.shape[0], z.shape[1] + 1
    small = torch.int16 if n_classes + 1 < 2**15 else torch.int32
    keys = torch.full((n_rows, width), n_classes, dtype=small, device=z.device)
    keys[:, :-1] = torch.where(z > 0, classes, n_classes + 1)  # unused ones come last
    values = torch.cat([z, 1 - z.sum(1, keepdim=True)], 1)
    keys, order = keys.flatten().sort(stable=True)
    every = torch.arange(n_classes + 2, dtype=small, device=z.device)
    bounds = torch.searchsorted(keys, every)  # (K + 2,) of the classes' entries
    length = max(SHORTEST, triton.cdiv(len(keys), PIECES))
    pieces = torch.nn.functional.pad(((bounds.diff() + length - 1) // length).cumsum(0), (1, 0))
    most = len(keys) // length + n_classes + 1  # their number stays on the device
    places = torch.arange(most, device=z.device)
    class_of = torch.searchsorted(pieces, places, right=True) - 1

    d = features.shape[1]
    part = z.new_empty(most, d, dtype=torch.float64)
    part_counts = z.new_empty(most, dtype=torch.float64)
    sums = part.new_empty(n_classes + 1, d)
    counts = part.new_empty(n_classes + 1)
    blocks = triton.cdiv(d, DIMS)
    piece_kernel[(most, blocks)](
        order, values, features, bounds, pieces, class_of, part, part_counts,
        n_classes + 1, width, length, d, D=DIMS, E=ENTRIES, num_warps=WARPS,
    )  # fmt: skip
    total_kernel[(n_classes + 1, blocks)](
        part, part_counts, pieces, sums, counts, d, D=DIMS, E=ENTRIES, num_warps=WARPS
    )
    return sums, counts


def class_sums_full(z: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums (K, d) and masses (K,) float64 of the full form z (N, K)."""
    (n_rows, n_classes), d = z.shape, features.shape[1]
    centre = features[:4096].mean(0, dtype=torch.float32)
    shares = min(SHARES, triton.cdiv(n_rows, SHARE))
    part = z.new_empty(shares, n_classes, d, dtype=torch.float64)
    part_counts = part.new_empty(shares, n_classes)
    full_kernel[(triton.cdiv(n_classes, CLASSES), triton.cdiv(d, FULL_DIMS), shares)](
        z, features, centre, part, part_counts,
        n_rows, n_classes, d, triton.cdiv(n_rows, shares),
        K=CLASSES, D=FULL_DIMS, R=ROWS, num_warps=FULL_WARPS,
    )  # fmt: skip
    counts = part_counts.sum(0)
    return part.sum(0).addr_(counts, centre.double()), counts
