"""
Image files to pixels: what open_clip's preprocessing gives, in a third of its time.

JPEGs are decoded by simplejpeg where it is installed, to exactly Pillow's pixels (both are
libjpeg-turbo); everything else, and whatever simplejpeg refuses, by Pillow. Pixels are resized by
torch as bytes, which differs from Pillow by at most one of 255 levels (`bench/speed/decoders.py`
compares them), and travel as bytes.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image

RESIZE = "torch, bytes"  # for the manifest: which of the two ways made the features


@dataclass(frozen=True)
class Pixels:
    """
    Resizing of the shorter side, a square from the middle, mean and standard deviation.

    Parameters
    ----------
    size : int
        Side S of the square.
    mean, std : tuple of float
        Of the three channels, in [0, 1].
    interpolation : str
        "bicubic" or "bilinear".
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str

    @classmethod
    def of(cls, preprocessing: Mapping[str, Any]) -> Pixels | None:
        """Of open_clip's preprocessing; None where that is of another kind."""
        size, kind = preprocessing["size"], preprocessing["interpolation"]
        sides = set(size) if isinstance(size, list | tuple) else {size}
        if preprocessing["resize_mode"] != "shortest" or len(sides) > 1 or kind == "random":
            return None
        return cls(sides.pop(), tuple(preprocessing["mean"]), tuple(preprocessing["std"]), kind)

    def read(self, data: bytes) -> torch.Tensor:
        """An image file to (S, S, 3) uint8."""
        pixels = decode(data)  # (3, H, W)
        height, width = pixels.shape[1:]
        short, long = min(height, width), max(height, width)
        other = int(self.size * long / short)
        target = (self.size, other) if height <= width else (other, self.size)
        if short != self.size:
            pixels = torch.nn.functional.interpolate(
                pixels[None], target, mode=self.interpolation, antialias=True
            )[0]
        top, left = (round((side - self.size) / 2) for side in pixels.shape[1:])
        square = pixels[:, top : top + self.size, left : left + self.size]
        return square.permute(1, 2, 0).contiguous()

    def scale(self, images: torch.Tensor) -> torch.Tensor:
        """
        Images (B, S, S, 3) uint8 less the mean, by the standard deviation, float32.

        They become (B, 3, S, S), channels last in memory.
        """
        mean, std = (_channels(values, images.device) for values in (self.mean, self.std))
        planes = images.permute(0, 3, 1, 2)
        return planes.float().div_(255).sub_(mean).div_(std)


@functools.cache
def _channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """One number a channel, (3, 1, 1); copied once, as a GPU would be waited for each time."""
    return torch.tensor(values, device=device)[:, None, None]


@functools.cache
def decoder() -> str:
    """What decodes JPEGs here: "simplejpeg", or "Pillow" where that is not installed."""
    return "simplejpeg" if find_spec("simplejpeg") else "Pillow"


def decode(data: bytes) -> torch.Tensor:
    """
    An image file to its pixels (3, H, W) uint8, channels last in memory.

    Raises
    ------
    Exception
        Whatever Pillow raises where the file is damaged, or no image.
    """
    with Image.open(io.BytesIO(data)) as image:  # reads the header alone
        pixels = None
        if image.format == "JPEG" and image.mode in ("L", "RGB") and decoder() == "simplejpeg":
            pixels = _by_simplejpeg(data)
        if pixels is None:
            pixels = np.array(image.convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1)


def _by_simplejpeg(data: bytes) -> np.ndarray | None:
    """Pixels (H, W, 3) uint8; None where Pillow has to decide, on damage too."""
    import simplejpeg

    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None
    return pixels


def rgb(data: bytes) -> Image.Image:
    """An image file as an image of Pillow with three channels."""
    with Image.open(io.BytesIO(data)) as image:
        converted: Image.Image = image.convert("RGB")
        return converted
