"""Batches of decoded images in order, decoded ahead by worker processes."""

from __future__ import annotations

import hashlib
import re
import time
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from transclip_fast.encode.models import Backbone
from transclip_fast.encode.pixels import has_more_frames
from transclip_fast.encode.sources import FATAL_ERRNOS, Source
from transclip_fast.errors import InputError, one_line
from transclip_fast.store.feature_writer import Failure

PREFETCHED_BATCHES = 4  # of each worker
HUNG_SECONDS = 300.0  # without a batch; slow storage takes less
WATCH_SECONDS = 5.0  # without a batch, until torch looks for workers whose end it did not notice
MACHINE_AT_FAULT = 4  # images, the first of all, that lose their worker one after the other


@dataclass(frozen=True)
class Batch:
    """Images (B, ...) as `Backbone.read` returns them, or None if all failed; and the failures."""

    images: torch.Tensor | None
    hashes: list[str]  # sha256 of the images' files
    failures: list[Failure]
    paged: list[str]  # keys of images that have more pages or frames than the one that is read

    def __len__(self) -> int:
        return len(self.failures) + len(self.hashes)

    def __reduce__(self) -> tuple[Any, ...]:
        """How a worker hands the batch over, see `_shareable`."""
        return _received, (_shareable(self.images), self.hashes, self.failures, self.paged)

    def pin_memory(self) -> Batch:
        """The batch in memory that a GPU can fetch from; torch's loader calls this."""
        pinned = None if self.images is None else self.images.pin_memory()
        return replace(self, images=pinned)


def feed(
    source: Source, backbone: Backbone, batches: Sequence[list[int]], workers: int
) -> Generator[Batch]:
    """
    Yield batches of decoded images in order, while workers decode the next ones.

    `batches` are rows of the source; with 0 `workers` this process decodes.

    Raises
    ------
    InputError
        The machine fails to read an image, or to start workers; a later run may not.
    RuntimeError
        No batch for `HUNG_SECONDS`, or a worker that was killed. Torch raises the latter from a
        signal handler, wherever this process is at that moment, so that it may become another
        error (see `lost_worker`).
    """
    loader: DataLoader[Any] = DataLoader(
        _Images(source, backbone),
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=workers,
        prefetch_factor=PREFETCHED_BATCHES if workers else None,
        timeout=WATCH_SECONDS if workers else 0,
        pin_memory=backbone.device.type == "cuda",
    )
    try:
        decoded = iter(loader)
    except OSError as error:
        raise InputError(
            f"workers cannot start ({one_line(error)}); free /dev/shm or give --workers 0"
        ) from error
    for batch in iter(lambda: _next(decoded), None):
        for failure in batch.failures:
            if failure.fatal:
                raise InputError(f"{failure.key}: {failure.reason}; run again to continue")
        yield batch


def _next(decoded: Iterator[Batch]) -> Batch | None:
    """The next batch, for which torch's loader can be asked again; None after the last."""
    deadline = time.monotonic() + HUNG_SECONDS
    while True:
        try:
            return next(decoded, None)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            if time.monotonic() > deadline:
                reason = f"DataLoader had no batch for {HUNG_SECONDS:.0f} seconds"
                raise RuntimeError(reason) from error
        except (OSError, EOFError) as error:  # of the worker's socket
            if getattr(error, "errno", None) in FATAL_ERRNOS:
                raise
            reason = f"DataLoader worker ended while it handed a batch over ({one_line(error)})"
            raise RuntimeError(reason) from error


def _shareable(images: torch.Tensor | None) -> torch.Tensor | np.ndarray | None:
    """Images in shared memory, or an array, which goes through a pipe, if that has no room."""
    if images is None:
        return None
    try:
        images.share_memory_()  # type: ignore[no-untyped-call]
        return images
    except RuntimeError:  # torch would try again when it sends them, lose them, and wait for them
        array: np.ndarray = images.numpy()
        return array


def _received(
    images: torch.Tensor | np.ndarray | None,
    hashes: list[str],
    failures: list[Failure],
    paged: list[str],
) -> Batch:
    if isinstance(images, np.ndarray):
        _warn_of_pipes()
        images = torch.from_numpy(images)
    return Batch(images, hashes, failures, paged)


@cache
def _warn_of_pipes() -> None:
    """Warn once: the loop's waiting for images shows what it costs."""
    warnings.warn(
        "shared memory, /dev/shm, has no room for the next images, so they come through slower "
        "pipes; enlarge it (docker run --shm-size 2g) or give a smaller --batch-size",
        stacklevel=2,
    )


def lost_worker(error: BaseException | None) -> str:
    """The message of torch's loader about a lost worker: of an error or what led to it, or ""."""
    while error is not None and not isinstance(error, InputError):
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader "):
            return one_line(error)
        error = error.__cause__ or error.__context__
    return ""


def deadly_rows(source: Source, backbone: Backbone, rows: Sequence[int]) -> list[int]:
    """The rows whose image alone makes a worker hang or die; none if all of the first few do."""
    pending, deadly = deque(rows), list[int]()
    while pending:
        for _ in range(_count_read(source, backbone, pending)):
            pending.popleft()
        if not pending:
            break
        row = pending.popleft()  # or one of the next, as a worker is ahead
        if not _count_read(source, backbone, [row]):
            deadly.append(row)
        if len(deadly) == MACHINE_AT_FAULT and deadly == [*rows[:MACHINE_AT_FAULT]]:
            return []
    return deadly


def _count_read(source: Source, backbone: Backbone, rows: Iterable[int]) -> int:
    """The number of rows that one worker reads until it hangs or dies."""
    n_read = 0
    try:
        for _ in feed(source, backbone, [[row] for row in rows], 1):
            n_read += 1
    except Exception as error:
        if not lost_worker(error):
            raise
    return n_read


@dataclass(frozen=True)
class _Image:
    """An image of the source that was read."""

    key: str
    pixels: torch.Tensor
    sha256: str  # of its file
    more_frames: bool


class _Images(Dataset[Any]):
    """The image of a row, or its Failure."""

    def __init__(self, source: Source, backbone: Backbone) -> None:
        self.source, self.read = source, backbone.read

    def __getitem__(self, row: int) -> _Image | Failure:
        key = self.source.keys[row]
        try:
            data = self.source.read(row)
            pixels = self.read(data, self.source.boxes.get(row))
            return _Image(key, pixels, hashlib.sha256(data).hexdigest(), has_more_frames(data))
        except Exception as error:  # noqa: BLE001 - decoders raise anything on damaged files
            # The buffer's address differs from run to run, and the manifest must not.
            reason = re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", one_line(error))
            reason = reason.encode(errors="backslashreplace").decode()  # it may hold any file name
            fatal = isinstance(error, MemoryError) or getattr(error, "errno", None) in FATAL_ERRNOS
            return Failure(row, key, reason, fatal)


def _collate(items: list[_Image | Failure]) -> Batch:
    good = [item for item in items if not isinstance(item, Failure)]
    failures = [item for item in items if isinstance(item, Failure)]
    images = torch.stack([image.pixels for image in good]) if good else None
    paged = [image.key for image in good if image.more_frames]
    return Batch(images, [image.sha256 for image in good], failures, paged)
