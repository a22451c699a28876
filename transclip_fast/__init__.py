"""Transductive zero-shot and few-shot classification of CLIP features at scale."""

from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.store.linear_maps import linear_map
from transclip_fast.version import __version__

__all__ = ["InputError", "TransCLIP", "linear_map", "__version__"]
