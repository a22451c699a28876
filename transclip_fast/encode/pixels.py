"""
Image files to pixels: the result of open_clip's preprocessing in a third of its time.

simplejpeg, if installed, decodes JPEGs to exactly Pillow's pixels (both are libjpeg-turbo) and
tells of damage, which Pillow does not; Pillow decodes everything else. Torch resizes bytes, which
differs from Pillow by at most one of 255 levels (`bench/speed/decoders.py` compares them), and
pixels travel as bytes.
Unlike open_clip, `decode` turns images upright and scales 16-bit and float images (`RULES`).
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image

from transclip_fast.errors import InputError

RESIZE = "torch, bytes"  # in the manifest of features that were made by `Pixels`
# In every manifest; a change of the pixels that `decode` or `Pixels` return for a file changes it.
RULES = "upright by EXIF; 16-bit and float scaled to 8 bits; strips cut before they are resized"
# Formats that Pillow opens and that are not read: EPS starts Ghostscript on the file, and of the
# others Pillow reads no more than the header.
UNREAD_FORMATS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
JPEG_START = b"\xff\xd8"
MAX_PIXELS = 178_956_970  # beyond, Pillow takes an image for a decompression bomb
SUSPECT_PIXELS = 2**24  # beyond, so is an image with more than PIXELS_PER_BYTE in its file,
PIXELS_PER_BYTE = 1000  # as a damaged header claims; a large photograph has 10, one white page 500
BAND_PIXELS = 2**24  # converted at a time, so that a large image is not in memory three times
STRIP = 16  # long side by short side; resized whole, a longer image takes too much memory
ORIENTATION = 0x112  # EXIF tag: 1 is upright, 2 to 8 are the other ways to turn and mirror
# Tags of a TIFF. PHOTOMETRIC: 0 stands for "zero is white"; PLANES: 2 for a plane a channel; SIGN:
# 2 for signed values.
BITS, COMPRESSION, PHOTOMETRIC, CHANNELS, PLANES = 258, 259, 262, 277, 284
COLOUR_MAP, SIGN = 320, 339
UNSIGNED_16_BITS = frozenset({"JPEG2000", "PNG", "PPM", "TIFF"})  # formats; others have a sign
# Of 256, that the largest value of a 16-bit or float image reaches: below, an image of 16 bits
# may have values of 14 bits or fewer, as cameras and scanners write them, and would be dark.
MIN_LEVELS = 64
COLOURS = {"RGB": 3, "RGBA": 3, "RGBX": 3, "RGBa": 3, "CMYK": 4}  # channels that are no alpha
# libjpeg's warnings of a JPEG that it decodes in part. Harmless are bytes before a header and up to
# nine before the end, which some cameras write; where data are damaged, more are left over.
DAMAGE = re.compile(
    r"Inconsistent progression|Corrupt JPEG data: "
    r"(?!\d+ extraneous bytes before marker 0x(c[0-2]|d[bd]|e.|fe)|\d extraneous bytes .* 0xd9)"
)
SIXTEEN_BITS = re.compile(";16[BLN]")  # in Pillow's name of how channels are stored
Box = tuple[int, int, int, int]  # left, top, right and bottom, in pixels of the upright image


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

    def read(self, data: bytes, box: Box | None = None) -> torch.Tensor:
        """An image file, or a box of it, to (S, S, 3) uint8."""
        array = decode(data, box)  # (H, W, 3)
        height, width = array.shape[:2]
        short, long = min(height, width), max(height, width)
        if long > STRIP * short:
            return torch.from_numpy(self._middle(array))
        pixels = torch.from_numpy(array).permute(2, 0, 1)  # channels last in memory
        other = int(self.size * long / short)
        target = (self.size, other) if height <= width else (other, self.size)
        if short != self.size:
            pixels = torch.nn.functional.interpolate(
                pixels[None], target, mode=self.interpolation, antialias=True
            )[0]
        top, left = (round((side - self.size) / 2) for side in pixels.shape[1:])
        square = pixels[:, top : top + self.size, left : left + self.size]
        return square.permute(1, 2, 0).contiguous()

    def _middle(self, pixels: np.ndarray) -> np.ndarray:
        """The square (S, S, 3) from the middle of a strip (H, W, 3), which alone is resized."""
        height, width = pixels.shape[:2]
        short, long = min(height, width), max(height, width)
        other = int(self.size * long / short)
        left = round((other - self.size) / 2)
        start, stop = (edge * long / other for edge in (left, left + self.size))
        # The filter reaches beyond the square: by two pixels, of the result or of the file.
        first = max(int(start) - 2 * short - 2, 0)
        middle = slice(first, int(stop) + 2 * short + 3)
        box = (start - first, 0, stop - first, short)
        cut = pixels[:, middle]
        if height > width:
            box, cut = (0, start - first, short, stop - first), pixels[middle]
        resized = Image.fromarray(np.ascontiguousarray(cut)).resize(
            (self.size, self.size), Image.Resampling[self.interpolation.upper()], box
        )
        return np.array(resized)

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


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats of image files that are read, as Pillow calls them, in its order."""
    Image.init()
    return tuple(name for name in Image.ID if name not in UNREAD_FORMATS)


@functools.cache
def suffixes() -> frozenset[str]:
    """The suffixes, as ".jpg", of the files that this Pillow reads."""
    known = {*formats(), "MPO"}  # which Pillow opens as JPEG
    return frozenset(s for s, name in Image.registered_extensions().items() if name in known)


def decode(data: bytes, box: Box | None = None) -> np.ndarray:
    """
    Decode an image file to its pixels (H, W, 3) uint8, upright; with a box, to those in it.

    Of 16-bit images the upper 8 bits are taken, as Pillow does where they have colours. Floats and
    32-bit integers are scaled from the least of the ranges 0 to 1 (floats), 0 to 255 and 0 to
    65,535 that holds them. The largest value has to reach a quarter of its range.

    Raises
    ------
    InputError
        Too many pixels, or values that fit no range; a JPEG that simplejpeg finds damaged; a box
        that is not of this image.
    Exception
        Pillow raises any if the file is damaged or no image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged metadata, and of images that are only large
        with _opened(data) as image:
            pixels = None
            if image.format == "TIFF":
                _check_tags(image.tag_v2)
            if image.format in ("JPEG", "MPO") and decoder() == "simplejpeg":
                pixels = _jpeg_pixels(data, image.mode)
            if pixels is None:
                stored = str([tile[3] for tile in image.tile])
                image.load()  # may change the size and the orientation
                if image.mode in COLOURS and SIXTEEN_BITS.search(stored):
                    _check_upper_bits(image)
                pixels = _rgb_pixels(image)
            orientation = _orientation(image)
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    upright = pixels[::rows, ::columns]
    return np.ascontiguousarray(upright if box is None else _cut(upright, box))


def has_more_frames(data: bytes) -> bool:
    """Whether a readable image has pages or frames after the first, which alone is decoded."""
    if data.startswith(JPEG_START):  # what follows an image there is its preview
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _opened(data) as image:
                return image.format != "PSD" and getattr(image, "is_animated", False)  # its layers
        except Exception:  # noqa: BLE001 - of a second frame that is damaged
            return True


def rgb(data: bytes, box: Box | None = None) -> Image.Image:
    """Decode an image file to a Pillow image with three channels, see `decode`."""
    return Image.fromarray(decode(data, box))


def _cut(pixels: np.ndarray, box: Box) -> np.ndarray:
    """The pixels in a box, black beyond the image as Pillow's crop; most of it is in the image."""
    height, width = pixels.shape[:2]
    left, top, right, bottom = box
    rows = slice(max(top, 0), max(min(bottom, height), 0))
    columns = slice(max(left, 0), max(min(right, width), 0))
    inside = pixels[rows, columns]
    if 2 * inside.shape[0] * inside.shape[1] < (bottom - top) * (right - left):
        raise InputError(
            f"its box, from ({left}, {top}) to ({right}, {bottom}), is mostly outside of its "
            f"{width} x {height} pixels"
        )
    cut = np.zeros((bottom - top, right - left, 3), np.uint8)
    cut[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = inside
    return cut


def _opened(data: bytes) -> Image.Image:
    """An image whose header alone is read, and does not claim too many pixels."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats())
    except Image.DecompressionBombError as error:
        raise InputError(f"has more than {MAX_PIXELS:,} pixels; scale it down or cut it") from error
    if image.width * image.height > max(SUSPECT_PIXELS, PIXELS_PER_BYTE * len(data)):
        raise InputError(
            f"claims {image.width:,} x {image.height:,} pixels in {len(data):,} bytes; scale it "
            "down or save it again"
        )
    return image


def _jpeg_pixels(data: bytes, mode: str) -> np.ndarray | None:
    """The pixels of a JPEG (H, W, 3) uint8; None if they are left to Pillow, as those of CMYK."""
    import simplejpeg

    try:
        pixels = simplejpeg.decode_jpeg(data, "CMYK" if mode == "CMYK" else "RGB")
    except ValueError as error:
        if DAMAGE.match(str(error)):
            reason = str(error).removeprefix("Corrupt JPEG data: ")
            raise InputError(f"is damaged: {reason}; replace it") from error
        return None  # a kind that simplejpeg does not read; a file that ends early, as Pillow tells
    return None if mode == "CMYK" else pixels


def _check_tags(tags: Mapping[int, Any]) -> None:
    """Refuse a TIFF of a kind that Pillow takes for another one, and reads wrong."""
    bits = max(tags.get(BITS, (1,)))
    planes = tags.get(PLANES) == 2 and tags.get(CHANNELS, 1) > 1
    if planes and bits > 8 and tags.get(COMPRESSION, 1) == 1:
        raise InputError(f"has a plane of {bits} bits for each channel; save it with 8 bits")
    if bits <= 8 and 2 in tags.get(SIGN, ()):
        raise InputError("has signed values of 8 bits; save it with unsigned ones")
    if 0 < max(tags.get(COLOUR_MAP, (0,))) < 256:
        raise InputError("has a colour map of 8-bit values, where a TIFF has 16; save it as PNG")


def _orientation(image: Image.Image) -> int:
    """The orientation of an image in its metadata, 1 to 8; 1 if there is none."""
    if image.format == "TIFF":  # Pillow has turned it
        return 1
    try:
        found = image.getexif().get(ORIENTATION)
    except Exception:  # noqa: BLE001 - of damaged metadata; viewers show such images as they are
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _rgb_pixels(image: Image.Image) -> np.ndarray:
    """The pixels of an image (H, W, 3) uint8."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    if image.mode == "F" or image.mode.startswith("I"):
        whole = _full_scale(image)
        tags = getattr(image, "tag_v2", {})  # of a TIFF; Pillow minds this one in 8 bits alone
        inverted = tags.get(PHOTOMETRIC) == 0
        for rows, band in _bands(image):
            levels = _levels(np.asarray(band), whole)[..., None]
            pixels[rows] = 255 - levels if inverted else levels
    else:
        for rows, band in _bands(image):
            pixels[rows] = np.asarray(band if band.mode == "RGB" else band.convert("RGB"))
    return pixels


def _bands(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Rows of an image, some at a time."""
    step = max(1, BAND_PIXELS // image.width)
    if step >= image.height:
        yield slice(image.height), image
        return
    for top in range(0, image.height, step):
        stop = min(top + step, image.height)
        yield slice(top, stop), image.crop((0, top, image.width, stop))


def _full_scale(image: Image.Image) -> int:
    """The value of white in an image of floats or of 16-bit or 32-bit integers."""
    bands = (np.asarray(band) for _, band in _bands(image))
    extremes = np.array([(values.min(), values.max()) for values in bands])
    low, high = float(extremes[:, 0].min()), float(extremes[:, 1].max())  # NaN if any value is
    for whole in _ranges(image):
        if low >= 0 and whole * MIN_LEVELS / 256 <= high <= whole:
            return whole
    raise InputError(_no_range(f"from {low:g} to {high:g}", image.mode))


def _check_upper_bits(image: Image.Image) -> None:
    """Refuse an image of colours, the upper 8 of 16 bits, whose values fit fewer bits."""
    bands = image.split()[: COLOURS[image.mode]]
    largest = max(int(np.asarray(band).max()) for band in bands)
    if largest < MIN_LEVELS:
        raise InputError(_no_range(f"up to {256 * largest + 255:,}", f"16-bit {image.mode}"))


def _no_range(values: str, stored: str) -> str:
    return f"has values {values}, which fit no range that is known ({stored}); save it with 8 bits"


def _ranges(image: Image.Image) -> tuple[int, ...]:
    """The largest values that white may have in an image, ascending; none if it may be signed."""
    if image.mode == "F":
        return (1, 255, 65535)
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # theirs have 16 bits
        return (255, 65535)
    return (65535,) if image.format in UNSIGNED_16_BITS else ()


def _levels(values: np.ndarray, whole: int) -> np.ndarray:
    """Values in 0 .. `whole` as 8-bit levels."""
    if values.dtype.kind != "f" and whole == 65535:
        return (values >> 8).astype(np.uint8)
    return np.rint(values * (255 / whole)).astype(np.uint8)
