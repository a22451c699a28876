"""The encode loop: worker processes decode, the model embeds, shards are written in order."""

from __future__ import annotations

import errno
import io
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from transclip_fast.encode.models import Backbone
from transclip_fast.encode.sources import Source
from transclip_fast.errors import InputError
from transclip_fast.store.shards import Failure, FeatureWriter

# The machine fails, not the image: a later run can read it.
FATAL = frozenset({errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE})
PREFETCH = 4


@dataclass(frozen=True)
class EncodeProgress:
    """Rows done and in all, and the share of the time that was spent waiting for images."""

    done: int
    total: int
    waiting: float


def encode_images(
    source: Source,
    backbone: Backbone,
    writer: FeatureWriter,
    *,
    workers: int,
    progress: Callable[[EncodeProgress], None],
) -> None:
    """
    Encode every image of the shards that `writer` still misses.

    Features are unit rows in float16. Batches are cut by source row within a shard, so that the
    same rows meet in one batch however often the run is interrupted.

    Parameters
    ----------
    workers : int
        Processes that decode; 0 decodes in this one.
    """
    size, missing = writer.config["batch_size"], [(n, writer.rows(n)) for n in writer.missing()]
    batches = [
        list(rows[start : start + size])
        for _, rows in missing
        for start in range(0, len(rows), size)
    ]
    loader = iter(image_loader(source, backbone, batches, workers))
    clock = _Clock(len(source), sum(len(rows) for _, rows in missing), progress)
    with torch.inference_mode():
        for number, rows in missing:
            shard = _Shard(np.empty((len(rows), backbone.dim), np.float16))
            for _ in range(0, len(rows), size):
                with clock.waiting():
                    images, kept, failures = next(loader)
                for failure in failures:
                    if failure.fatal:
                        raise InputError(f"{failure.key}: {failure.reason}; run again to continue")
                shard.add(_embed(backbone, images), failures)
                clock.done(len(kept) + len(failures))
            writer.write_shard(number, shard.features[: shard.rows], shard.failures)


def image_loader(
    source: Source, backbone: Backbone, batches: list[list[int]], workers: int
) -> DataLoader[Any]:
    """
    Batches of decoded and preprocessed images, in order.

    Each is the images (B, 3, H, W) float32, or None where all failed, their rows in the source,
    and the failures.
    """
    return DataLoader(
        _Images(source, backbone.preprocess),
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
    )


@dataclass
class _Shard:
    """What has been embedded of a shard so far."""

    features: np.ndarray  # (rows, d) float16, filled from the top
    rows: int = 0
    failures: list[Failure] = field(default_factory=list)

    def add(self, features: np.ndarray, failures: list[Failure]) -> None:
        self.features[self.rows : self.rows + len(features)] = features
        self.rows += len(features)
        self.failures += failures


class _Images(Dataset[Any]):
    """Row number to the preprocessed image, or to why there is none."""

    def __init__(self, source: Source, preprocess: Callable[[Any], torch.Tensor]) -> None:
        self.source, self.preprocess = source, preprocess

    def __getitem__(self, row: int) -> tuple[int, torch.Tensor] | Failure:
        try:
            with Image.open(io.BytesIO(self.source.read(row))) as image:
                return row, self.preprocess(image.convert("RGB"))
        except Exception as error:  # noqa: BLE001 - decoders raise anything on damaged files
            reason = " ".join(str(error).split()) or type(error).__name__
            # The buffer's address, which differs from run to run, tells nobody anything.
            reason = re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", reason)
            fatal = isinstance(error, MemoryError) or getattr(error, "errno", None) in FATAL
            return Failure(row, self.source.keys[row], reason, fatal)


def _collate(
    items: list[tuple[int, torch.Tensor] | Failure],
) -> tuple[torch.Tensor | None, list[int], list[Failure]]:
    """Images (B, 3, H, W) or None, their rows, and the failures of a batch."""
    good = [item for item in items if not isinstance(item, Failure)]
    failures = [item for item in items if isinstance(item, Failure)]
    images = torch.stack([image for _, image in good]) if good else None
    return images, [row for row, _ in good], failures


def _embed(backbone: Backbone, images: torch.Tensor | None) -> np.ndarray:
    """Unit rows (B, d) float16 of preprocessed images (B, 3, H, W)."""
    if images is None:
        return np.empty((0, backbone.dim), np.float16)
    rows = backbone.model.encode_image(images.to(backbone.device, backbone.dtype)).float()
    unit = torch.nn.functional.normalize(rows, dim=1).half().cpu()
    result: np.ndarray = unit.numpy()
    return result


class _Clock:
    """Counts rows, and the time spent waiting for images."""

    def __init__(self, total: int, missing: int, report: Callable[[EncodeProgress], None]) -> None:
        self.start = time.perf_counter()
        self.total, self.rows, self.report = total, total - missing, report
        self.waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begun

    def done(self, rows: int) -> None:
        self.rows += rows
        share = self.waited / (time.perf_counter() - self.start)
        self.report(EncodeProgress(self.rows, self.total, share))


@contextmanager
def fixed_threads(number: int) -> Iterator[None]:
    """The number of CPU threads decides the last bits: it stays that of the first run."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
