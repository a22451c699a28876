"""Lists anchored at classes: their prototypes or means take the place of trained centres."""

from __future__ import annotations

import math

import torch

from transclip_fast.data.feature_rows import Rows
from transclip_fast.graph.ivf import draw, refine, step, usual_lists

SAMPLE = 16  # rows a list
TOO_MANY = 4  # times the usual number of lists
TOO_LARGE = 4  # times the usual length of a list
STEPS = 2


def anchored_centres(rows: Rows, anchors: torch.Tensor) -> torch.Tensor:
    """
    Centres (L, d) of lists that begin at the anchors (K, d).

    Two steps bring them to their images, as text features lie in another cone. Anchors that
    attract no row of a sample are left out; lists that swallow several times their share are
    replaced by k-means of their rows.
    """
    n_lists = usual_lists(len(rows))
    most = TOO_MANY * n_lists
    sample = draw(rows, SAMPLE * max(n_lists, min(len(anchors), most)))
    centres, of = step(anchors, sample)
    counts = torch.bincount(of, minlength=len(anchors))
    share = len(sample) / n_lists
    large = counts > TOO_LARGE * share
    kept = (counts * ~large).argsort(descending=True, stable=True)[:most]
    kept = kept[(counts > 0)[kept] & ~large[kept]]
    centres = torch.cat([centres[kept], *_split(sample, of, large, share)])
    return refine(centres, sample, STEPS - 1)


def _split(
    sample: torch.Tensor, of: torch.Tensor, large: torch.Tensor, share: float
) -> list[torch.Tensor]:
    """Centres for the rows in lists that are too large: by k-means, one a share."""
    rows = sample[large[of]]
    n_lists = math.ceil(len(rows) / share)
    return [refine(rows[:n_lists], rows, STEPS)] if n_lists else []
