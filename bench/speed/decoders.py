"""Decoders and resizers between a JPEG and the pixels of a model.

Milliseconds an image on one thread, in turns, and the difference to Pillow in levels of 255.
Decoders that are not installed are skipped; the package uses only Pillow and simplejpeg.
"""

from __future__ import annotations

import importlib
import io
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.common import command_line, in_turns, medians, print_table, record

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
    parser = command_line(__spec__, __doc__, repeats=9)
    parser.add_argument("images", type=Path, help="a folder of JPEGs")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # torchvision's decoder is on its way out
    torch.set_num_threads(1)
    files = [file.read_bytes() for file in sorted(options.images.glob("*.jpg"))]
    decoders: dict[str, Decoder] = {"Pillow": pillow}
    for name, make in OTHERS.items():
        try:
            decoders[name] = make(importlib.import_module(name))
        except ImportError as error:
            print(f"SKIPPED {name} ({error})")
    resizers = {"resize, Pillow": resize_by_pillow, "resize, torch": resize_by_torch}
    pixels = [pillow(data) for data in files]
    small = [resize_by_pillow(image) for image in pixels]
    off = {name: difference(arm, files, pixels) for name, arm in decoders.items()}  # warms up, too
    off |= {name: difference(arm, pixels, small) for name, arm in resizers.items()}
    inputs: dict[str, list[Any]] = {
        **dict.fromkeys(decoders, files),
        **dict.fromkeys(resizers, pixels),
    }
    arms: dict[str, Callable[[Any], np.ndarray]] = {**decoders, **resizers}

    def seconds_of(arm: str) -> float:
        start = time.perf_counter()
        for one in inputs[arm]:
            arms[arm](one)
        return time.perf_counter() - start

    seconds = in_turns(seconds_of, arms, options.repeats)
    found = {name: 1e3 * spent / len(files) for name, spent in medians(seconds).items()}
    row = {"images": len(files), "seconds": seconds, "milliseconds": found, "difference": off}
    record("decoders", row)
    lines = [[name, f"{spent:.2f}", str(off[name]["max"])] for name, spent in found.items()]
    print_table(["arm", "ms", "largest difference"], lines)


if __name__ == "__main__":
    main()
