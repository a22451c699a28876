"""Transductive zero-shot and few-shot classification of CLIP features at scale."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transclip_fast.errors import InputError
from transclip_fast.version import __version__

if TYPE_CHECKING:
    from transclip_fast.encode.folder import encode_images
    from transclip_fast.estimator import TransCLIP
    from transclip_fast.graph.build import build_graph
    from transclip_fast.graph.neighbor_graph import NeighborGraph
    from transclip_fast.heads import fit_head
    from transclip_fast.store.features import load_features

__all__ = [
    "TransCLIP",
    "build_graph",
    "NeighborGraph",
    "load_features",
    "encode_images",
    "fit_head",
    "InputError",
    "__version__",
]

# Imported when first asked for: torch, pyarrow and open_clip take seconds.
_HOMES = {
    "TransCLIP": "estimator",
    "build_graph": "graph.build",
    "NeighborGraph": "graph.neighbor_graph",
    "load_features": "store.features",
    "encode_images": "encode.folder",
    "fit_head": "heads",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
