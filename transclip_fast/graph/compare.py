"""Products of blocks of rows, on all cores, for the lists of the best."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING

import torch

from transclip_fast.data.feature_rows import Rows
from transclip_fast.device import multiplies_bytes
from transclip_fast.graph.best import BestLists, Finds
from transclip_fast.parallel import parallel_map

if TYPE_CHECKING:
    from transclip_fast.graph.byte_products import ByteProducts

BATCH = 32  # blocks, at most, between two looks at what was found, on any number of cores
WAITING = 8  # finds a row that wait before they are merged,
MOST_WAITING = 1 << 20  # and of all rows: a merge needs some hundred bytes a find
MANY = 1 << 17  # products of a pair of blocks, for which what 8 bits need besides pays,
WORTH = 1 << 27  # and of all such pairs: it takes most of a second to load what is compiled
Pair = tuple[torch.Tensor, torch.Tensor]


def compare(
    rows: Rows,
    pairs: Iterable[Pair],
    best: BestLists,
    in_bytes: ByteProducts | None,
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
    in_bytes : ByteProducts, optional
        Where products are computed in 8 bits first.
    """

    def find(pair: Pair) -> Finds:
        ids, others = pair
        if in_bytes is not None and len(ids) * len(others) >= MANY:
            return in_bytes.find(ids, others, best)
        block = rows[ids]
        if ids is not others:
            return best.find(block @ rows[others].T, ids, others)
        products = block @ block.T
        products.fill_diagonal_(-torch.inf)  # by id: copies of a row are its neighbours
        return best.top(products, ids, ids)

    remaining, done, size = iter(pairs), 0, 1
    while batch := list(islice(remaining, size)):
        for found in parallel_map(find, batch, best.values.device):
            best.add(found)
        best.merge(min(WAITING * len(best.ids), MOST_WAITING))
        done, size = done + len(batch), min(2 * size, BATCH)  # the first find the most
        yield done
    best.merge()


def gains_by_bytes(n_rows: int, dim: int, device: torch.device, *, held: bool) -> bool:
    """Whether a search among so many rows may compute products in 8 bits first."""
    enough = n_rows * n_rows // 2 >= WORTH
    return held and device.type == "cpu" and enough and multiplies_bytes(dim)


def byte_products(rows: Rows, pairs: Iterable[Pair]) -> ByteProducts | None:
    """Products in 8 bits for pairs of blocks, where they pay and numba is installed."""
    n_rows, dim = rows.shape
    if not gains_by_bytes(n_rows, dim, rows.device, held=rows.held) or not find_spec("numba"):
        return None
    numbers = (len(ids) * len(others) for ids, others in pairs)
    if sum(number for number in numbers if number >= MANY) < WORTH:
        return None
    try:
        from transclip_fast.graph.byte_products import ByteProducts
    except ImportError as error:
        warnings.warn(f"searched in torch, slower: {error}", stacklevel=4)
        return None
    return ByteProducts(rows)
