"""The offline demo: handwritten digits, and a very small CLIP that reads them."""

from transclip_fast.demo.data import (
    CLASS_NAMES,
    SHIFTS,
    TEMPLATES,
    class_prompts,
    digits,
    enlarge,
    training_hashes,
    write_images,
)
from transclip_fast.demo.model import TrimmedTokenizer, backbone

__all__ = [
    "CLASS_NAMES",
    "SHIFTS",
    "TEMPLATES",
    "TrimmedTokenizer",
    "backbone",
    "class_prompts",
    "digits",
    "enlarge",
    "training_hashes",
    "write_images",
]
