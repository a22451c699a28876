"""
Some lists of z as processes send them: what has changed since the last time.

All is int32. A list has a head. -n: it has n entries, and their classes follow, then the bits of
their values. 1: it has the classes of the list that was sent before, and its values follow. 0: it
is that list. All heads come first, then what follows each. The entries in use are sent; of an empty
list the first one is, with value 0.
"""

from __future__ import annotations

import torch

from transclip_fast.errors import InputError
from transclip_fast.types import Assignments

SAME, CLASSES = 0, 1  # heads: what a list has in common with the one that was sent before


def pack(z: Assignments, rows: torch.Tensor, before: Assignments | None) -> list[torch.Tensor]:
    """Heads and the rest of the lists `rows` (n,) of z; those of `before` were sent last."""
    values, classes, lengths, used = _entries(z, rows)
    heads = -lengths
    if before is not None:
        sent_values, sent_classes, sent_lengths, _ = _entries(before, rows)
        same = (lengths == sent_lengths) & ((classes == sent_classes) | ~used).all(1)
        equal = same & ((values == sent_values) | ~used).all(1)
        heads = torch.where(equal, SAME, torch.where(same, CLASSES, heads))
    follows = torch.cat(_followers(heads, used), 1)
    return [heads.int(), torch.cat([classes, values.view(torch.int32)], 1)[follows]]


def unpack(packed: torch.Tensor, out: Assignments, before: Assignments | None) -> None:
    """Set the lists `out` to those that were packed; `before` are those that were sent last."""
    if out.classes is None:
        raise TypeError("dense assignments have no lists")
    values, classes, lengths, _ = _entries(out if before is None else before, slice(None))
    n_rows, width = values.shape
    heads, rest = packed[:n_rows].long(), packed[n_rows:]
    last_head = -1 if before is None else CLASSES
    if len(heads) < n_rows or ((heads < -width) | (heads > last_head)).any():
        raise not_lists()
    lengths = torch.where(heads < 0, -heads, lengths)
    used = torch.arange(width, device=heads.device) < lengths[:, None]  # (n, R)
    own_classes, own_values = _followers(heads, used)
    follows = torch.cat([own_classes, own_values], 1)
    if int(follows.sum()) != len(rest):
        raise not_lists()
    entries = torch.zeros_like(follows, dtype=torch.int32)
    entries[follows] = rest
    classes = torch.where(own_classes, entries[:, :width], classes)
    if ((classes < 0) | (classes >= out.n_classes)).logical_and(used).any():
        raise not_lists()
    own = entries[:, width:].contiguous().view(torch.float32)
    out.values.copy_(torch.where(own_values, own, values).where(used, 0))
    out.classes.copy_(classes)


def not_lists() -> InputError:
    """The error where entries are not the lists that were asked for."""
    return InputError(
        "another rank sent lists of z that it cannot have; start all ranks anew, on a network that "
        "no one else reaches"
    )


def _entries(
    z: Assignments, rows: torch.Tensor | slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values and classes (n, R) of lists, how many entries are sent (n,), and which (n, R)."""
    if z.classes is None:
        raise TypeError("dense assignments have no lists")
    values, classes = z.values[rows], z.classes[rows]
    lengths = (values > 0).sum(1).clamp_min(1)
    places = torch.arange(values.shape[1], device=values.device)
    return values, classes, lengths, places < lengths[:, None]


def _followers(heads: torch.Tensor, used: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of which entries (n, R) the class follows, and of which the value."""
    return used & (heads < 0)[:, None], used & (heads != SAME)[:, None]
