"""
The START_ROWS rows with the largest log y_hat of each class: where the means start.

    key_ik = (x_ik - normaliser_i read as an ordered integer) * 2^32 + (2^32 - 1 - i)

A key orders by value, then by the lower row, so the result does not depend on how rows are split. A
program scans its share of a chunk's rows for a block of columns and keeps the largest keys in
`top` (S, 8, K), from which the next chunk continues; most tiles hold nothing new and cost one
comparison. Shapes: x (n, K) float32, normaliser (N,). Bytes: 4 n K, from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from transclip_fast.kernels.select import ordered

START_ROWS = 8
SPLITS = 16  # shares of a chunk's rows: K / 32 blocks of columns alone would not fill a GPU
BLOCK_ROWS, BLOCK_COLUMNS, WARPS = 32, 32, 4
LOWEST_KEY = tl.constexpr(-(2**63))
LAST_ROW = tl.constexpr(2**32 - 1)


@triton.jit
def top_rows_kernel(
    x_ptr, normaliser_ptr, top_ptr, first, n_rows, n_classes, share,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_TOP: tl.constexpr,
):  # fmt: skip
    """One block of columns over one share of the rows."""
    k = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    split = tl.program_id(1).to(tl.int64)
    place = (split * BLOCK_TOP + tl.arange(0, BLOCK_TOP))[:, None] * n_classes + k[None, :]
    kept = tl.load(top_ptr + place, (k < n_classes)[None, :], other=LOWEST_KEY)  # (T, columns)
    stop = tl.minimum((split + 1) * share, n_rows)
    for start in range(split * share, stop, BLOCK_ROWS):
        row = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mask = (row < stop)[:, None] & (k < n_classes)[None, :]
        value = tl.load(x_ptr + row[:, None] * n_classes + k[None, :], mask, other=0.0)
        value -= tl.load(normaliser_ptr + first + row, row < stop, other=0.0)[:, None]
        keys = (ordered(value).to(tl.int64) << 32) | ((first + row) ^ LAST_ROW)[:, None]
        keys = tl.where(mask, keys, LOWEST_KEY)  # (rows, columns)
        largest, smallest = tl.max(keys, 0), tl.min(kept, 0)
        while tl.max((largest > smallest).to(tl.int32), 0) > 0:
            enters = (kept == smallest[None, :]) & (largest > smallest)[None, :]
            kept = tl.where(enters, largest[None, :], kept)
            keys = tl.where(keys == largest[None, :], LOWEST_KEY, keys)
            largest, smallest = tl.max(keys, 0), tl.min(kept, 0)
    tl.store(top_ptr + place, kept, (k < n_classes)[None, :])


def empty_keys(n_classes: int, device: torch.device) -> torch.Tensor:
    """Keys (S, 8, K) int64 below those of any row, all different."""
    lowest = torch.arange(START_ROWS, device=device) - 2**63 + 1
    return lowest[None, :, None].repeat(SPLITS, 1, n_classes)


def top_rows(x: torch.Tensor, normaliser: torch.Tensor, first: int, *, out: torch.Tensor) -> None:
    """
    Enter a chunk of rows x (n, K), `first` and on, into the keys (S, 8, K) of the largest of each
    class, at the start `empty_keys`; `normaliser` (N,) is subtracted from all rows.

    Raises
    ------
    ValueError
        x is not contiguous, or `out` has another shape.
    """
    n, n_classes = x.shape
    if not x.is_contiguous() or out.shape != (SPLITS, START_ROWS, n_classes):
        raise ValueError(f"x must be contiguous, out {SPLITS} x {START_ROWS} x K")
    top_rows_kernel[(triton.cdiv(n_classes, BLOCK_COLUMNS), SPLITS)](
        x, normaliser, out, first, n, n_classes, triton.cdiv(n, SPLITS),
        BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS, BLOCK_TOP=START_ROWS,
        num_warps=WARPS,
    )  # fmt: skip


def decode(top: torch.Tensor, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (8, K) float32, largest first, and rows (8, K) int64; all rows when N < 8."""
    keys = top.flatten(0, 1).topk(min(START_ROWS, n_rows), dim=0).values
    bits = (keys >> 32).int()
    values = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
    return values, (2**32 - 1) - (keys & (2**32 - 1))
