"""Numbers of rows that an operation takes at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Of a (rows, K) float32 operand: it fits the cache of a core, or fills a GPU.
OPERAND_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}
GEMM_ROWS = {"cpu": (512, 512), "cuda": (4096, 1 << 20)}  # at least and at most
READ_ROWS = {"cpu": 1 << 14, "cuda": 1 << 18}
EQUAL_BLOCKS = 4  # blocks come in multiples of this: 2 or 4 threads end together


def blocks(stop: int, size: int, start: int = 0) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows."""
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def block_rows(device: torch.device, n_classes: int) -> int:
    """Rows of a (rows, K) float32 operand that make one block."""
    size = OPERAND_BYTES.get(device.type, OPERAND_BYTES["cuda"])
    return max(1, size // (4 * n_classes))


def gemm_rows(device: torch.device, n_classes: int) -> int:
    """Rows of one GEMM with K columns: two blocks, within the bounds that keep it at full speed."""
    fewest, most = GEMM_ROWS.get(device.type, GEMM_ROWS["cuda"])
    rows = min(max(fewest, 2 * block_rows(device, n_classes)), most)
    rows = min(rows, 16 * block_rows(device, n_classes))
    # 16 float32 rows of any length fill whole cache lines: blocks stay aligned.
    return rows // 16 * 16 or max(1, rows)


def product_rows(device: torch.device, n_rows: int, n_classes: int) -> int:
    """As `gemm_rows`, of N rows: on a CPU in equal blocks."""
    most = gemm_rows(device, n_classes)
    return equal_rows(n_rows, most) if device.type == "cpu" else most


def read_rows(device: torch.device) -> int:
    """Rows of the features that are read at a time."""
    return READ_ROWS.get(device.type, READ_ROWS["cuda"])


def equal_rows(n_rows: int, most: int) -> int:
    """Rows of a block, at most `most`, so that 2 or 4 threads get equally many equal blocks."""
    number = EQUAL_BLOCKS * max(1, -(-n_rows // (EQUAL_BLOCKS * most)))
    # 16 float32 rows of any length fill whole cache lines: blocks stay aligned.
    return min(most, 16 * max(1, -(-n_rows // (16 * number))))
