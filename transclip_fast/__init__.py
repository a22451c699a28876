"""Transductive zero-shot and few-shot classification of CLIP features at scale."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.store.linear_maps import linear_map
from transclip_fast.version import __version__

if TYPE_CHECKING:
    from transclip_fast.encode.folder import encode_images
    from transclip_fast.store.features import load_features

__all__ = [
    "InputError",
    "TransCLIP",
    "encode_images",
    "linear_map",
    "load_features",
    "__version__",
]
_LAZY = {  # imported on first use: open_clip alone takes seconds
    "encode_images": "transclip_fast.encode.folder",
    "load_features": "transclip_fast.store.features",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
