"""The held-out digits of the demo, their shifts, class names and prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from transclip_fast.encode.text import ClassPrompts
from transclip_fast.errors import InputError

FOLDER = Path(__file__).parent
DIGITS = "digits.npz"
SIDE_PIXELS = 64  # of a written image

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the digit {}.",
    "a photo of a handwritten {}.",
    "the number {} written by hand.",
)


def enlarge(image: np.ndarray) -> np.ndarray:
    """Return the image (64, 64) uint8, white on black, of a digit (8, 8) uint8."""
    return np.asarray(
        Image.fromarray(image).resize((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.BICUBIC)
    )


def _filtered(image: np.ndarray, smear: ImageFilter.Filter) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(smear))


# Functions of an image (64, 64) uint8. No augmentation of the training is one of them.
SHIFTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": np.asarray,
    "thick strokes": partial(_filtered, smear=ImageFilter.MaxFilter(7)),
    "thin strokes": partial(_filtered, smear=ImageFilter.MinFilter(7)),
    "blur": partial(_filtered, smear=ImageFilter.GaussianBlur(5)),
}


def class_prompts() -> ClassPrompts:
    """Return the class names with their prompts."""
    prompts = [[template.format(name) for template in TEMPLATES] for name in CLASS_NAMES]
    return ClassPrompts(list(CLASS_NAMES), prompts, "demo")


def digits() -> tuple[np.ndarray, np.ndarray]:
    """
    Return the held-out images (N, 8, 8) uint8, 0 (paper) to 255 (ink), and labels (N,) int64.

    >>> images, labels = digits()
    >>> images.shape, labels[:4].tolist()
    ((892, 8, 8), [8, 1, 2, 3])
    """
    with np.load(FOLDER / DIGITS, allow_pickle=False) as file:
        return file["images"], file["labels"].astype(np.int64)


def training_hashes() -> frozenset[str]:
    """Return `image_hash` of every image used in training or in choosing model and shifts."""
    with np.load(FOLDER / DIGITS, allow_pickle=False) as file:
        return frozenset(bytes(row).hex() for row in file["training_hashes"])


def image_hash(image: np.ndarray) -> str:
    """Return the first 8 bytes of the sha256 of a digit (8, 8) uint8, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()[:8].hex()


def write_images(folder: str | Path, shift: str = "plain") -> Path:
    """
    Write the held-out digits as PNG files `<class name>/<row>_<class name>.png`; return the folder.

    The folder is created, with its parents; files of the same names are replaced.

    Raises
    ------
    InputError
        `shift` is no key of `SHIFTS`.
    """
    if shift not in SHIFTS:
        raise InputError(f"shift: no {shift!r}; choose one of {', '.join(SHIFTS)}")
    folder = Path(folder)
    for name in CLASS_NAMES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for row, (image, label) in enumerate(zip(*digits(), strict=True)):
        name = CLASS_NAMES[label]
        shifted = SHIFTS[shift](enlarge(image))
        Image.fromarray(shifted).save(folder / name / f"{row:04d}_{name}.png")
    return folder
