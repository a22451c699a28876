"""Transductive zero-shot and few-shot classification of CLIP features at scale."""

from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.version import __version__

__all__ = ["InputError", "TransCLIP", "__version__"]
