"""Inverted lists: k-means centres, each row in the list of its nearest centre."""

from __future__ import annotations

import math

import torch

from transclip_fast.data.feature_rows import Rows
from transclip_fast.parallel import parallel_map

LISTS = 2.0  # times sqrt(N); products of a few large lists are faster than of many small ones
SAMPLE = 40  # rows a list to train on
STEPS = 4
BLOCK = 1024
SEED = 0


def kmeans_centres(rows: Rows) -> torch.Tensor:
    """Centres (L, d) of about 2 sqrt(N) lists, from random rows by a few steps on a sample."""
    n_lists = usual_lists(len(rows))
    sample = draw(rows, SAMPLE * n_lists)
    return refine(sample[:n_lists], sample, STEPS)


def usual_lists(n_rows: int) -> int:
    """How many lists suit N rows."""
    return min(n_rows, math.ceil(LISTS * math.sqrt(n_rows)))


def draw(rows: Rows, size: int) -> torch.Tensor:
    """A random sample of the rows (min(size, N), d), in random order."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))[:size]
    ordered = order.sort()  # as a file is read
    return rows[ordered.values][ordered.indices.argsort().to(rows.device)]


def refine(centres: torch.Tensor, sample: torch.Tensor, steps: int) -> torch.Tensor:
    """Centres (L, d) after some steps of spherical k-means."""
    for _ in range(steps):
        centres, _ = step(centres, sample)
    return centres


def step(centres: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One step: the mean directions (L, d) of the lists, and the list (S,) of each row of the sample.

    A centre without rows stays where it is.
    """

    def nearest(block: torch.Tensor) -> torch.Tensor:
        return (block @ centres.T).argmax(1)

    of = torch.cat(parallel_map(nearest, torch.split(sample, BLOCK), sample.device))
    sums = torch.zeros_like(centres).index_add_(0, of, sample)
    means = torch.nn.functional.normalize(sums, dim=1)
    return means.where((sums != 0).any(1, keepdim=True), centres), of
