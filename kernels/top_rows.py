"""
The rows that are surest of each class: the START_ROWS largest entries of every column of log y_hat.

    key_ik = (x_ik - normaliser_i read as an ordered integer) * 2^32 + (2^32 - 1 - i)

One integer orders by value, then by the first row, so the answer does not depend on how rows are
split. A program scans its share of a chunk's rows for a block of columns and keeps the largest keys
in `best` (S, 8, K), where the next chunk goes on; most tiles hold nothing new and cost one
comparison. Shapes: x (n, K) float32, normaliser (N,). Bytes: 4 n K, from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from transclip_fast.kernels.select import ordered

START_ROWS = 8
SPLITS = 16
ROWS, COLUMNS, WARPS = 32, 32, 4
LOWEST = tl.constexpr(-(2**63))
LAST_ROW = tl.constexpr(2**32 - 1)


@triton.jit
def confident_kernel(
    x, normaliser, best, first, n_rows, n_classes, share,
    R: tl.constexpr, B: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """B columns of the rows that are one program's share."""
    k = tl.program_id(0) * B + tl.arange(0, B)
    split = tl.program_id(1).to(tl.int64)
    place = (split * T + tl.arange(0, T))[:, None] * n_classes + k[None, :]
    kept = tl.load(best + place, (k < n_classes)[None, :], other=LOWEST)  # (T, B)
    stop = tl.minimum((split + 1) * share, n_rows)
    for start in range(split * share, stop, R):
        row = (start + tl.arange(0, R)).to(tl.int64)
        mask = (row < stop)[:, None] & (k < n_classes)[None, :]
        value = tl.load(x + row[:, None] * n_classes + k[None, :], mask, other=0.0)
        value -= tl.load(normaliser + first + row, row < stop, other=0.0)[:, None]
        keys = (ordered(value).to(tl.int64) << 32) | ((first + row) ^ LAST_ROW)[:, None]
        keys = tl.where(mask, keys, LOWEST)  # (R, B)
        top, least = tl.max(keys, 0), tl.min(kept, 0)
        while tl.max((top > least).to(tl.int32), 0) > 0:
            enters = (kept == least[None, :]) & (top > least)[None, :]
            kept = tl.where(enters, top[None, :], kept)
            keys = tl.where(keys == top[None, :], LOWEST, keys)
            top, least = tl.max(keys, 0), tl.min(kept, 0)
    tl.store(best + place, kept, (k < n_classes)[None, :])


def nobody(n_classes: int, device: torch.device) -> torch.Tensor:
    """Keys (S, 8, K) int64 below those of any row, all different."""
    lowest = torch.arange(START_ROWS, device=device) - 2**63 + 1
    return lowest[None, :, None].repeat(SPLITS, 1, n_classes)


def most_confident(
    x: torch.Tensor, normaliser: torch.Tensor, first: int, *, out: torch.Tensor
) -> None:
    """
    Enter a chunk of rows, `first` and on, into the largest of each class.

    Parameters
    ----------
    x : Tensor (n, K) float32
    normaliser : Tensor (N,) float32
        What is taken off each row.
    out : Tensor (S, 8, K) int64
        Keys, from `nobody` at the start.
    """
    n, n_classes = x.shape
    if not x.is_contiguous() or out.shape != (SPLITS, START_ROWS, n_classes):
        raise ValueError(f"x must be contiguous, out {SPLITS} x {START_ROWS} x K")
    confident_kernel[(triton.cdiv(n_classes, COLUMNS), SPLITS)](
        x, normaliser, out, first, n, n_classes, triton.cdiv(n, SPLITS),
        R=ROWS, B=COLUMNS, T=START_ROWS, num_warps=WARPS,
    )  # fmt: skip


def decode(best: torch.Tensor, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (8, K) float32, largest first, and rows (8, K) int64; all rows when N < 8."""
    keys = best.flatten(0, 1).topk(min(START_ROWS, n_rows), dim=0).values
    bits = (keys >> 32).int()
    values = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
    return values, (2**32 - 1) - (keys & (2**32 - 1))
