"""Sums in a fixed order: what a GPU adds up by atomics differs from run to run."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OrderedSums(TorchDispatchMode):
    """Refuses operations that CUDA computes by atomic additions of floats."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named, name = named or {}, function.overloadpacket.__name__
        if name in ("scatter_add", "scatter_add_", "index_add", "index_add_"):
            target, dim, index, source = arguments[:4]
            added = torch.zeros_like(target, dtype=torch.int64)
            getattr(added, name)(dim, index, (source != 0).long())
            if source.is_floating_point() and (added > 1).any():  # a sum of one entry has no order
                raise AssertionError(f"{name} adds floats in any order")
        if name == "bincount":
            weights = arguments[1] if len(arguments) > 1 else named.get("weights")
            if weights is not None and weights.is_floating_point():
                raise AssertionError("bincount adds floats in any order")
        return function(*arguments, **named)
