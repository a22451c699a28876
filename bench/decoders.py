"""
Ways from a JPEG to the pixels of a model: `python -m bench.decoders IMAGES`.

Milliseconds an image on one thread, interleaved, and the difference to Pillow in levels of 255.
Decoders that are not installed are left out; only Pillow and simplejpeg are used by the product.
"""

from __future__ import annotations

import argparse
import importlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.common import interleaved, medians, record

SIDE = 224
Decoder = Callable[[bytes], np.ndarray]


def pillow(data: bytes) -> np.ndarray:
    """Pixels (H, W, 3) uint8, without draft mode."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def simplejpeg(module: Any) -> Decoder:
    return lambda data: module.decode_jpeg(data, "RGB")


def opencv(module: Any) -> Decoder:
    module.setNumThreads(1)
    return lambda data: module.imdecode(np.frombuffer(data, np.uint8), module.IMREAD_COLOR_RGB)


def torchvision(module: Any) -> Decoder:
    def decode(data: bytes) -> np.ndarray:
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels: np.ndarray = module.decode_jpeg(content).permute(1, 2, 0).numpy()
        return pixels

    return decode


def pyvips(module: Any) -> Decoder:
    module.cache_set_max(0)
    return lambda data: module.Image.new_from_buffer(data, "").numpy()


OTHERS = {
    "simplejpeg": simplejpeg,
    "cv2": opencv,
    "torchvision.io": torchvision,
    "pyvips": pyvips,
}


def target(pixels: np.ndarray) -> tuple[int, int]:
    """Height and width after resizing the shorter side."""
    height, width = pixels.shape[:2]
    other = int(SIDE * max(height, width) / min(height, width))
    return (SIDE, other) if height <= width else (other, SIDE)


def resize_by_pillow(pixels: np.ndarray) -> np.ndarray:
    height, width = target(pixels)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def resize_by_torch(pixels: np.ndarray) -> np.ndarray:
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    small = torch.nn.functional.interpolate(planes, target(pixels), mode="bicubic", antialias=True)
    found: np.ndarray = small[0].permute(1, 2, 0).numpy()
    return found


def difference(arm: Callable[[Any], np.ndarray], inputs: list[Any], truth: list[np.ndarray]) -> Any:
    """Largest and mean absolute difference to Pillow's pixels."""
    off = [abs(arm(x).astype(int) - t) for x, t in zip(inputs, truth, strict=True)]
    return {"max": int(max(o.max() for o in off)), "mean": float(np.mean([o.mean() for o in off]))}


def main() -> None:
    """Compare, time, record one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("images", type=Path, help="a folder of JPEGs")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # torchvision's decoder is on its way out
    torch.set_num_threads(1)
    files = [file.read_bytes() for file in sorted(options.images.glob("*.jpg"))]
    decoders: dict[str, Decoder] = {"Pillow": pillow}
    for name, make in OTHERS.items():
        try:
            decoders[name] = make(importlib.import_module(name))
        except ImportError as error:
            print(f"left out: {name} ({error})")
    resizers = {"resize, Pillow": resize_by_pillow, "resize, torch": resize_by_torch}
    pixels = [pillow(data) for data in files]
    small = [resize_by_pillow(image) for image in pixels]
    off = {name: difference(arm, files, pixels) for name, arm in decoders.items()}
    off |= {name: difference(arm, pixels, small) for name, arm in resizers.items()}

    def each(arm: Callable[[Any], np.ndarray], inputs: list[Any]) -> Callable[[], None]:
        def run() -> None:
            for one in inputs:
                arm(one)

        return run

    arms = {name: each(arm, files) for name, arm in decoders.items()}
    arms |= {name: each(arm, pixels) for name, arm in resizers.items()}
    seconds = interleaved(arms, options.repeats)
    found = {name: 1e3 * spent / len(files) for name, spent in medians(seconds).items()}
    row = {"images": len(files), "seconds": seconds, "milliseconds": found, "difference": off}
    record("decoders", row)
    for name, spent in found.items():
        print(f"{name:<16}{spent:8.2f} ms   off by at most {off[name]['max']}")


if __name__ == "__main__":
    main()
