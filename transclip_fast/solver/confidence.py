"""
How likely a label is right, without labelled rows: a confidence that z cannot give.

z is too sure of itself: text, mixture and neighbours agree because they have made each other, and
z counts the same evidence several times. Here it is tempered: with b the base score of a row, that
is text and mixture, and z_bar the mean z of its neighbours,

    c_ik = (e^b_ik (z_bar_ik + eps))^(1/T), and the confidence is c_ik of the label over sum_k c_ik.

Of sparse scores the masses of the classes that are no candidates are taken to fall exponentially,
from the smallest candidate's on; these classes are in no z_bar.

`bench.accuracy.calibration` chooses T and eps, and holds the confidence against z.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from transclip_fast.ops.blocks import blocks
from transclip_fast.ops.ranked import Operations
from transclip_fast.parallel import parallel_map
from transclip_fast.types import Assignments, Scores

TEMPERATURE = 4.0
SMOOTHING = 1e-4  # eps, what is left to a class that no neighbour has
BLOCK_ENTRIES = 1 << 18  # of the scores of a block of rows


def calibrated_confidences(
    ops: Operations,
    base: Scores,
    z: Assignments,
    neighbors: np.ndarray,
    nodes: torch.Tensor | None,
) -> torch.Tensor:
    """
    The confidence of each row's label, (N,) float32, in the order of the features.

    Parameters
    ----------
    ops : Operations
        The backend that computes.
    base, z
        Of all nodes.
    neighbors : ndarray (N, k)
        Rows, -1 where there is none; after the N rows come those of other processes.
    nodes : Tensor (N,) int64, optional
        Node of each row, where they are not the same.
    """
    device, labels, out = z.values.device, ops.best(z)[0], torch.empty_like(base.tail)
    n_rows, z = len(base.tail), ops.with_halo(z)
    if nodes is not None:
        nodes = torch.cat([nodes, torch.arange(n_rows, len(z), device=device)])

    def part(rows: slice) -> None:
        found = torch.from_numpy(np.require(neighbors[rows], requirements=("C", "W"))).to(device)
        own: slice | torch.Tensor = rows
        if nodes is not None:
            found, own = torch.where(found >= 0, nodes[found], -1), nodes[rows]
        classes = None if base.classes is None else base.classes[own]
        scores = base.values[own] + (ops.neighbor_means(z, found, classes) + SMOOTHING).log()
        used = scores > -torch.inf
        smallest = base.values[own].masked_fill(~used, torch.inf).amin(1)
        n_outside = base.n_classes - used.sum(1)
        outside = _tempered_tail(base.tail[own].log(), smallest, n_outside)
        outside += math.log(SMOOTHING) / TEMPERATURE
        shares = torch.softmax(torch.cat([scores / TEMPERATURE, outside[:, None]], 1), 1)
        place = labels[own, None]
        if classes is not None:
            place = (classes == place).int().argmax(1, keepdim=True)
        out[rows] = shares.gather(1, place)[:, 0]

    parallel_map(part, blocks(n_rows, max(1, BLOCK_ENTRIES // base.values.shape[1])), device)
    return out


def _tempered_tail(
    log_tail: torch.Tensor, smallest: torch.Tensor, number: torch.Tensor
) -> torch.Tensor:
    """
    log sum_k m_k^(1/T) (n,) of `number` classes of mass m_k, from the log of their sum, (n,) each.

    None of them has more than e^smallest. In falling order they are taken to fall exponentially
    from there; an even share is the most that the sum can be.
    """
    falling = math.log(TEMPERATURE) + log_tail + (1 / TEMPERATURE - 1) * smallest
    even = (1 - 1 / TEMPERATURE) * number.to(log_tail.dtype).log() + log_tail / TEMPERATURE
    return torch.minimum(falling, even)
