"""Transductive zero-shot and few-shot classification of CLIP features at scale."""

from pathlib import Path

from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.linear_map import linear_map
from transclip_fast.version import __version__

__all__ = ["InputError", "TransCLIP", "linear_map", "__version__"]

# In a checkout `transclip_fast.kernels` is the folder `kernels` beside this one.
_package = Path(__file__).resolve().parent
if not (_package / "kernels").exists() and (_package.parent / "kernels").exists():
    __path__.append(str(_package.parent))
