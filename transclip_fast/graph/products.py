"""The largest products of some rows with others: in float32, or from int8 products on a CPU."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch

from transclip_fast.device import multiplies_bytes
from transclip_fast.errors import user_level

GROUP_COLUMNS = 32  # of a block of products, whose maximum is taken first,
GROUPS_PER_ENTRY = 8  # if there are so many: fewer columns are sorted as soon
INT8_PRODUCTS = 25_000_000  # at least: it takes half a second to load compiled code


def largest(products: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `size` largest entries of each row (R, C), all C if there are fewer; their columns."""
    n_columns = products.shape[1]
    n_groups = n_columns // GROUP_COLUMNS
    if n_groups < GROUPS_PER_ENTRY * size:
        return products.topk(min(size, n_columns), dim=1)
    # The largest entries are in the groups of the largest maxima, which are found sooner.
    n_grouped = n_groups * GROUP_COLUMNS
    grouped = products[:, :n_grouped].view(-1, GROUP_COLUMNS, n_groups)
    groups = grouped.amax(1).topk(size, dim=1).indices
    among = grouped.gather(2, groups[:, None].expand(-1, GROUP_COLUMNS, -1)).flatten(1)
    n_among = among.shape[1]
    values, places = torch.cat([among, products[:, n_grouped:]], 1).topk(size, dim=1)
    columns = places // size * n_groups + groups.gather(1, places % size)
    return values, columns.where(places < n_among, places - n_among + n_grouped)


def int8_products(n_products: int, dim: int, device: torch.device) -> Any:
    """The module of int8 products if so many of them, of rows (d,), are faster so, else None."""
    if device.type != "cpu" or not multiplies_bytes(dim) or n_products < INT8_PRODUCTS:
        return None
    return compiled_module("transclip_fast.graph.int8_products")


def compiled_module(name: str) -> Any:
    """A module that needs numba or Triton; None, with a warning, if it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        warnings.warn(f"searched in torch, slower: {error}", stacklevel=user_level())
        return None
