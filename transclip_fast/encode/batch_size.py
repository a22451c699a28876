"""The batch size that fits into memory, and the rate of the image tower alone."""

from __future__ import annotations

import time

import numpy as np
import torch
from PIL import Image

from transclip_fast.encode.models import Backbone
from transclip_fast.memory import free_bytes

CPU_BATCH = 16  # images; larger batches are no faster on a CPU, and smaller ones are padded
PROBE_BATCHES = (8, 32)  # images; the difference of their memory is that of 24 images
MEMORY_SHARE = 0.8  # of the free GPU memory; the rest is room for fragmentation
MAX_BATCH = 512  # images; a GPU is busy with fewer
TIMED_SECONDS = 5.0  # and batches that a rate is measured over, whichever takes longer
TIMED_BATCHES = 3


def fitting_batch_size(backbone: Backbone, limit: int) -> int:
    """The largest power of two of images that fits the device's memory, at most `limit`."""
    if backbone.device.type != "cuda":
        return min(CPU_BATCH, limit)
    with torch.inference_mode():
        small, large = (_peak_bytes(backbone, size) for size in PROBE_BATCHES)
    torch.cuda.empty_cache()
    image_bytes = max(large - small, 1) / (PROBE_BATCHES[1] - PROBE_BATCHES[0])
    fitting = MEMORY_SHARE * free_bytes(backbone.device) / image_bytes
    return int(2 ** np.floor(np.log2(np.clip(fitting, 1, min(MAX_BATCH, limit)))))


def forward_rate(backbone: Backbone, batch_size: int) -> float:
    """Images a second of the image tower, for one batch repeated."""
    images = random_images(backbone, batch_size)
    with torch.inference_mode():
        _embed_and_wait(backbone, images)
        start, batches = time.perf_counter(), 0
        while batches < TIMED_BATCHES or time.perf_counter() - start < TIMED_SECONDS:
            _embed_and_wait(backbone, images)
            batches += 1
        return batches * batch_size / (time.perf_counter() - start)


def random_images(backbone: Backbone, number: int) -> torch.Tensor:
    """Noise in the form that `Backbone.read` returns, pinned for a GPU."""
    draw = np.random.default_rng(0)
    if backbone.pixels is None:
        picture = Image.fromarray(draw.integers(0, 256, (256, 256, 3), dtype=np.uint8))
        images = torch.stack([backbone.preprocess(picture)] * number)
    else:
        side = backbone.pixels.size
        images = torch.from_numpy(draw.integers(0, 256, (number, side, side, 3), dtype=np.uint8))
    return images.pin_memory() if backbone.device.type == "cuda" else images


def _embed_and_wait(backbone: Backbone, images: torch.Tensor) -> None:
    backbone.embed(images, len(images))
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)


def _peak_bytes(backbone: Backbone, number: int) -> int:
    """The memory that a batch needs beside the model."""
    images = random_images(backbone, number)
    torch.cuda.reset_peak_memory_stats(backbone.device)
    before = torch.cuda.memory_allocated(backbone.device)
    _embed_and_wait(backbone, images)
    return torch.cuda.max_memory_allocated(backbone.device) - before
