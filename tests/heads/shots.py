"""Heads fitted to the arrays of a FEATURES file."""

from __future__ import annotations

import torch

from transclip_fast.heads import fit_head

TAU = 100.0


def fitted(name, arrays, **more):
    """The head of some arrays."""
    shots = {key: a for key, a in arrays.items() if key.startswith(("support_", "validation_"))}
    return fit_head(name, arrays["text_features"], **shots, **more)


def without_validation(arrays):
    return {key: a for key, a in arrays.items() if not key.startswith("validation")}


def logits_of(head, arrays):
    return head.logits(torch.from_numpy(arrays["image_features"])).numpy()
