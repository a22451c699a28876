"""The offline demo: handwritten digits, and a very small CLIP of our own that reads them."""

from transclip_fast.demo.data import (
    CLASS_NAMES,
    SHIFTS,
    TEMPLATES,
    digits,
    enlarge,
    training_hashes,
    write_images,
)
from transclip_fast.demo.model import Backbone, TrimmedTokenizer, backbone

__all__ = [
    "Backbone",
    "CLASS_NAMES",
    "SHIFTS",
    "TEMPLATES",
    "TrimmedTokenizer",
    "backbone",
    "digits",
    "enlarge",
    "training_hashes",
    "write_images",
]
