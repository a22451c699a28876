"""Products of blocks of rows, on all cores, for the lists of the best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch

from transclip_fast.graph.best import BestLists, Finds
from transclip_fast.rows import Rows
from transclip_fast.threads import each

BATCH = 32  # blocks, at most, between two looks at what was found, on any number of cores
WAITING = 8  # finds a row that wait before they are merged,
MOST_WAITING = 1 << 20  # and of all rows: a merge needs some hundred bytes a find
Pair = tuple[torch.Tensor, torch.Tensor]


def compare(
    rows: Rows,
    pairs: Iterable[Pair],
    best: BestLists,
) -> Iterator[int]:
    """
    Offer to `best` the products of pairs of blocks; yields how many blocks are done, now and then.

    Parameters
    ----------
    rows : Rows (N, d)
    pairs : iterable of (Tensor (R,), Tensor (C,)) int64
        Which rows to multiply with which. A product counts for both its rows, and a block given
        with itself leaves out each row's product with itself.
    best : BestLists
        Of the rows.
    """

    def find(pair: Pair) -> Finds:
        ids, others = pair
        block = rows[ids]
        if ids is not others:
            return best.find(block @ rows[others].T, ids, others)
        products = block @ block.T
        products.fill_diagonal_(-torch.inf)  # by id: copies of a row are its neighbours
        return best.top(products, ids, ids)

    remaining, done, size = iter(pairs), 0, 1
    while batch := list(islice(remaining, size)):
        for found in each(find, batch, best.values.device):
            best.add(found)
        best.merge(min(WAITING * len(best.ids), MOST_WAITING))
        done, size = done + len(batch), min(2 * size, BATCH)  # the first find the most
        yield done
    best.merge()
