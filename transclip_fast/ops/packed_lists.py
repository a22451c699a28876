"""
Some lists of z one after the other, as processes send them.

An entry is its class and the bits of its value, two int32; that of the last entry of a list is ~k,
which is below 0. The entries in use are packed; of an empty list the first one is, with value 0.
"""

from __future__ import annotations

import torch

from transclip_fast.errors import InputError
from transclip_fast.types import Assignments


def pack(z: Assignments, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries (E, 2) of the lists `rows` (n,) of z, and their number up to the end of each list."""
    if z.classes is None:
        raise TypeError("dense assignments have no lists")
    values, classes = z.values[rows], z.classes[rows]
    lengths = (values > 0).sum(1).clamp_min(1)
    used = torch.arange(values.shape[1], device=values.device) < lengths[:, None]
    last = lengths[:, None] - 1
    classes.scatter_(1, last, ~classes.gather(1, last))
    entries = torch.stack([classes[used], values[used].view(torch.int32)], 1)
    return entries, lengths.cumsum(0)


def unpack(entries: torch.Tensor, out: Assignments) -> None:
    """Set the lists `out` to those that were packed."""
    if out.classes is None:
        raise TypeError("dense assignments have no lists")
    (n_rows, width), ends = out.values.shape, entries[:, 0] < 0
    classes, values = (column.contiguous() for column in entries.unbind(1))
    classes = torch.where(ends, ~classes, classes)
    rows = ends.cumsum(0) - ends.long()
    starts = torch.cat([rows.new_zeros(1), ends.nonzero()[:, 0] + 1])
    places = torch.arange(len(entries), device=entries.device) - starts[rows]
    if len(starts) != n_rows + 1 or ((places >= width) | (classes >= out.n_classes)).any():
        raise not_lists()
    out.values.zero_()[rows, places] = values.view(torch.float32)
    out.classes[rows, places] = classes


def not_lists() -> InputError:
    """The error where entries are not the lists that were asked for."""
    return InputError(
        "another rank sent lists of z that it cannot have; start all ranks anew, on a network that "
        "no one else reaches"
    )
