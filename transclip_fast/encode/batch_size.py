"""How large a batch may be, and how fast the image tower alone is."""

from __future__ import annotations

import time

import numpy as np
import torch
from PIL import Image

from transclip_fast.encode.models import Backbone
from transclip_fast.solver.layout import free_bytes

CPU_BATCH = 64  # larger ones are no faster there
PROBES = (8, 32)  # images whose memory tells what one takes
SHARE = 0.8  # of the free memory
MOST = 512
TIMED_SECONDS = 5.0
TIMED_BATCHES = 3


def fitting_batch_size(backbone: Backbone, most: int) -> int:
    """A power of two of images that fits the device with room to spare, up to `most`."""
    if backbone.device.type != "cuda":
        return min(CPU_BATCH, most)
    with torch.inference_mode():
        small, large = (_peak(backbone, number) for number in PROBES)
    torch.cuda.empty_cache()
    image = max(large - small, 1) / (PROBES[1] - PROBES[0])
    fits = SHARE * free_bytes(backbone.device) / image
    return int(2 ** np.floor(np.log2(np.clip(fits, 1, min(MOST, most)))))


def forward_rate(backbone: Backbone, batch_size: int) -> float:
    """Images a second of the image tower, the same batch again and again."""
    images = made_images(backbone, batch_size)
    with torch.inference_mode():
        _run(backbone, images)
        start, batches = time.perf_counter(), 0
        while batches < TIMED_BATCHES or time.perf_counter() - start < TIMED_SECONDS:
            _run(backbone, images)
            batches += 1
        return batches * batch_size / (time.perf_counter() - start)


def made_images(backbone: Backbone, number: int) -> torch.Tensor:
    """Noise as `Backbone.read` gives images, in memory from which a GPU can fetch it."""
    draw = np.random.default_rng(0)
    if backbone.pixels is None:
        picture = Image.fromarray(draw.integers(0, 256, (256, 256, 3), dtype=np.uint8))
        images = torch.stack([backbone.preprocess(picture)] * number)
    else:
        side = backbone.pixels.size
        images = torch.from_numpy(draw.integers(0, 256, (number, side, side, 3), dtype=np.uint8))
    return images.pin_memory() if backbone.device.type == "cuda" else images


def _run(backbone: Backbone, images: torch.Tensor) -> None:
    backbone.embed(images, len(images))
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)


def _peak(backbone: Backbone, number: int) -> int:
    """Bytes that a batch takes at most."""
    images = made_images(backbone, number)
    torch.cuda.reset_peak_memory_stats(backbone.device)
    before = torch.cuda.memory_allocated(backbone.device)
    _run(backbone, images)
    return torch.cuda.max_memory_allocated(backbone.device) - before
