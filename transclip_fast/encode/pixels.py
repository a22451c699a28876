"""
Image files to pixels: the result of open_clip's preprocessing in a third of its time.

simplejpeg, if installed, decodes JPEGs to exactly Pillow's pixels (both are libjpeg-turbo); Pillow
decodes everything else, and what simplejpeg refuses. Torch resizes bytes, which differs from Pillow
by at most one of 255 levels (`bench/speed/decoders.py` compares them), and pixels travel as bytes.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image

RESIZE = "torch, bytes"  # in the manifest of features that were made by `Pixels`


@dataclass(frozen=True)
class Pixels:
    """Resizing of the shorter side, a square from the middle, mean and standard deviation."""

    size: int  # side S of the square
    mean: tuple[float, ...]  # of the three channels, in [0, 1]
    std: tuple[float, ...]
    interpolation: str  # "bicubic" or "bilinear"

    @classmethod
    def of(cls, preprocessing: Mapping[str, Any]) -> Pixels | None:
        """The same as open_clip's preprocessing, or None if that is of another kind."""
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
        """Standardize images (B, S, S, 3) uint8: (B, 3, S, S) float32, channels last in memory."""
        mean, std = (_channels(values, images.device) for values in (self.mean, self.std))
        planes = images.permute(0, 3, 1, 2)
        return planes.float().div_(255).sub_(mean).div_(std)


@functools.cache
def _channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """One number a channel, (3, 1, 1); cached, as each copy to a GPU would wait for it."""
    return torch.tensor(values, device=device)[:, None, None]


@functools.cache
def decoder() -> str:
    """The JPEG decoder: "simplejpeg" if it is installed, else "Pillow"."""
    return "simplejpeg" if find_spec("simplejpeg") else "Pillow"


def decode(data: bytes) -> torch.Tensor:
    """
    Decode an image file to its pixels (3, H, W) uint8, channels last in memory.

    Pillow raises any exception if the file is damaged or no image.
    """
    with Image.open(io.BytesIO(data)) as image:  # reads the header alone
        pixels = None
        if image.format == "JPEG" and image.mode in ("L", "RGB") and decoder() == "simplejpeg":
            import simplejpeg

            with suppress(ValueError):  # damage, too, is left to Pillow
                pixels = simplejpeg.decode_jpeg(data, "RGB")  # (H, W, 3) uint8
        if pixels is None:
            pixels = np.array(image.convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1)


def rgb(data: bytes) -> Image.Image:
    """Open an image file with Pillow, with three channels."""
    with Image.open(io.BytesIO(data)) as image:
        converted: Image.Image = image.convert("RGB")
        return converted
