"""
Exact search on a GPU: candidates in 16 bits, ranked by exact products, proven row by row.

Where the certificate of `transclip_fast.kernels.neighbors` fails, a row is searched again in
float32, against all rows.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from transclip_fast.callbacks import Checkpoint, Count, State
from transclip_fast.data.feature_rows import Rows
from transclip_fast.graph.best import BestLists, decide
from transclip_fast.graph.exact import nearest
from transclip_fast.types import Truncation

STEP = 1 << 16  # rows searched at a time
MOST = 8  # entries of a list that the kernel's candidates fill


def usable(rows: Rows, size: int) -> bool:
    """Whether lists of that size are searched this way: rows held on a GPU, and Triton there."""
    from transclip_fast.ops import choose_backend  # imports this package

    on_gpu = rows.device.type == "cuda" and rows.held and size <= MOST
    lists = Truncation(size, size)
    return on_gpu and choose_backend("auto", rows.device, lists) == "triton"


def search_certified(
    rows: Rows, best: BestLists, k: int, progress: Count, checkpoint: Checkpoint
) -> int:
    """
    Bring the neighbours of every row into `best`; the k first of each are proven.

    Returns
    -------
    int
        Rows whose candidates were not proven to hold them, and that were searched again.
    """
    from transclip_fast.kernels.neighbors import candidates, certified

    (n_rows, d), device = rows.shape, rows.device
    half = rows.half()[:]
    errors = torch.cat([_norms(rows[block], half[block]) for block in rows.blocks()])
    state, start, again = checkpoint.load(), 0, 0
    if state is not None:
        best.restore(state)
        start, again = state["place"].tolist()
    for first in range(start, n_rows, STEP):
        own = torch.arange(first, min(first + STEP, n_rows), device=device)
        ids, products = candidates(half, first, first + len(own))
        similarities = _enter(best, own, *decide(rows[own], rows, ids, best.size))
        nth = similarities[:, min(k, n_rows - 1) - 1]
        left = own[~certified(nth, products, errors[own], errors.max(), d)]
        if len(left):
            _enter(best, left, *nearest(rows[left], rows, best.size, own=left))
        again += len(left)
        progress(first + len(own), n_rows)
        checkpoint.keep(partial(_state, best, first + len(own), again))
    return again


def _norms(rows: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """|f_i - fl16 f_i| (n,) float32: what each row lost."""
    lost: torch.Tensor = torch.linalg.vector_norm(rows.double() - half.double(), dim=1)
    return lost.float()


def _enter(
    best: BestLists, own: torch.Tensor, ids: torch.Tensor, similarities: torch.Tensor
) -> torch.Tensor:
    """Make lists (n, at most size), best first, those of the rows `own`; the similarities."""
    width = ids.shape[1]
    best.ids[own, :width] = ids
    best.values[own, :width] = similarities.float().masked_fill_(ids < 0, -torch.inf)
    return similarities


def _state(best: BestLists, rows: int, again: int) -> State:
    return {"place": np.array([rows, again]), **best.state()}
