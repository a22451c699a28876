"""The encode loop: workers decode, the model embeds and a thread writes, all at the same time."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from transclip_fast.encode.feed import Batch, deadly_rows, feed, lost_worker
from transclip_fast.encode.models import Backbone
from transclip_fast.encode.pixels import decoder
from transclip_fast.encode.sources import Source
from transclip_fast.errors import InputError, one_line
from transclip_fast.store.feature_writer import Failure, FeatureWriter

STAGES = ("images", "model", "writing")  # that the loop may wait for; images: read and decoded
BATCHES_IN_FLIGHT = 2  # on a GPU: one computes, one arrives


@dataclass(frozen=True)
class EncodeProgress:
    """Rows done and in total, and the share of the time spent waiting for images."""

    done: int
    total: int
    waiting: float


@dataclass(frozen=True)
class Throughput:
    """The speed of encoding, and the seconds that the loop waited for each stage."""

    images: int  # encoded, or failed
    seconds: float
    waited: dict[str, float]  # seconds by stage
    batch_size: int  # of the last batch

    def shares(self) -> dict[str, float]:
        """The share of the time spent waiting, by stage."""
        return {stage: spent / max(self.seconds, 1e-9) for stage, spent in self.waited.items()}

    @property
    def images_per_second(self) -> float:
        return self.images / max(self.seconds, 1e-9)

    @property
    def bottleneck(self) -> str:
        """The stage with the longest wait."""
        return max(STAGES, key=lambda stage: self.waited[stage])

    def summary(self) -> dict[str, Any]:
        """The figures as a command prints them."""
        return {
            "images": self.images,
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "batch_size": self.batch_size,
            "waiting": self.shares(),
            "bottleneck": self.bottleneck,
            "jpeg_decoder": decoder(),
        }


def merged(parts: Sequence[Throughput]) -> Throughput:
    """The throughput of processes side by side: all images, the longest time, the mean wait."""
    return Throughput(
        images=sum(part.images for part in parts),
        seconds=max(part.seconds for part in parts),
        waited={stage: sum(part.waited[stage] for part in parts) / len(parts) for stage in STAGES},
        batch_size=min(part.batch_size for part in parts),
    )


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time spent inside to the stage's seconds."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def encode_shards(
    source: Source,
    backbone: Backbone,
    writer: FeatureWriter,
    plan: Sequence[int],
    *,
    workers: int,
    progress: Callable[[EncodeProgress], None] | None = None,
) -> Throughput:
    """
    Encode the images of some shards and write them.

    Features are unit rows in float16. Every batch has the same size, if need be with empty images
    at its end: then an image's features do not depend on those it shares a batch with (tried on
    CPUs), and a folder that grew has the bytes of one encoded at once. If memory does not suffice,
    the batch is halved and the shard begun again; if a worker hangs or dies, the shard is begun
    again once, and then without the images that cost their worker alone, too; they count as
    failures. `plan` lists the shards to encode.

    Raises
    ------
    InputError
        Not even single images fit into memory; a shard loses its workers twice, but not by single
        images; the machine fails; the folder cannot be written; an embedding is not finite; the
        weights change.
    """
    pending, batch_size, lost_shard = deque(plan), writer.batch_size, None
    planned, missing = (
        sum(len(writer.rows_to_encode(shard)) for shard in shards)
        for shards in (plan, writer.missing())
    )
    done = int(writer.config["source"]["rows"]) - missing
    with torch.inference_mode(), ThreadPoolExecutor(1, "writing") as thread:
        loop = _Loop(
            source, backbone, writer, workers, thread, progress, done=done, total=done + planned
        )
        while pending:
            retry, lost = pending[0] == lost_shard, ""
            try:
                # Workers fetch ahead and may die on a later shard, so a retry covers one alone.
                loop.run(pending, 1 if retry else len(pending), batch_size)
            except InputError:
                raise
            except Exception as error:
                lost = lost_worker(error)
                if not lost:
                    if not _is_out_of_memory(error):
                        raise
                    if batch_size == 1:
                        reason = f"not even one image fits into memory ({one_line(error)})"
                        raise InputError(reason) from error
                    batch_size //= 2
            # Not while the error is handled: it would be the context of those that follow.
            if lost and not retry:
                lost_shard = pending[0]
            elif lost and not _refused(source, backbone, writer.rows_to_encode(pending[0])):
                rows = writer.rows(pending[0])
                raise InputError(
                    f"{source.keys[rows[0]]} to {source.keys[rows[-1]]}: workers hang or die "
                    f"twice ({lost}); run again with --workers 0 to see where"
                )
        loop.wait_for_writing()
    seconds = time.perf_counter() - loop.start
    if loop.paged:
        images = "1 image has" if len(loop.paged) == 1 else f"{len(loop.paged):,} images have"
        warnings.warn(
            f"{images} more than one page or frame, of which the first is taken, e.g. "
            f"{next(iter(loop.paged))}",
            stacklevel=2,
        )
    return Throughput(planned, seconds, loop.waited, batch_size)


@dataclass
class _Loop:
    """The stages of encoding, with counts of rows and of the seconds spent waiting."""

    source: Source
    backbone: Backbone
    writer: FeatureWriter
    workers: int
    thread: ThreadPoolExecutor
    progress: Callable[[EncodeProgress], None] | None
    done: int  # rows that are kept, or of whole shards
    total: int
    writing: Future[None] | None = None
    paged: dict[str, None] = field(default_factory=dict)  # see `Batch`; a shard may be read twice
    start: float = field(default_factory=time.perf_counter)
    waited: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def run(self, pending: deque[int], n_shards: int, batch_size: int) -> None:
        """Encode the first `n_shards` of `pending`, taking each off when it is done."""
        batches = [
            rows[start : start + batch_size]
            for rows in map(self.writer.rows_to_encode, list(pending)[:n_shards])
            for start in range(0, len(rows), batch_size)
        ]
        with closing(feed(self.source, self.backbone, batches, self.workers)) as decoded:
            for _ in range(n_shards):
                rows = self.writer.rows_to_encode(pending[0])
                features, hashes, failures = self._encode(rows, batch_size, decoded)
                self.wait_for_writing()  # so that at most one shard waits in memory
                self.writing = self.thread.submit(
                    self.writer.write_shard,
                    pending.popleft(),
                    features,
                    hashes,
                    failures,
                    batch_size,
                )
                self.done += len(rows)
                for failure in failures:
                    if failure.fatal:
                        self.wait_for_writing()
                        raise InputError(f"{failure.key}: {failure.reason}")

    def wait_for_writing(self) -> None:
        """Wait until the last shard is written."""
        with timed(self.waited, "writing"):
            if self.writing is not None:
                self.writing.result()

    def _encode(
        self, rows: Sequence[int], batch_size: int, decoded: Iterator[Batch]
    ) -> tuple[np.ndarray, list[str], list[Failure]]:
        """Features (rows, *shape) float16 of a shard, hashes of its images, those that failed."""
        features = [np.empty((0, *self.backbone.shape), np.float16)]
        hashes, failures, n_done = list[str](), list[Failure](), 0
        in_flight: deque[Callable[[], np.ndarray]] = deque()
        while n_done < len(rows):
            with timed(self.waited, "images"):
                batch = next(decoded)
            with timed(self.waited, "model"):
                in_flight.append(launch(self.backbone, batch.images, batch_size))
                if len(in_flight) == BATCHES_IN_FLIGHT:
                    features.append(in_flight.popleft()())
                self.backbone.weights.check()
            hashes += batch.hashes
            failures += batch.failures
            self.paged |= dict.fromkeys(batch.paged)
            n_done += len(batch)
            if self.progress is not None:
                waiting = self.waited["images"] / (time.perf_counter() - self.start)
                self.progress(EncodeProgress(self.done + n_done, self.total, waiting))
        with timed(self.waited, "model"):
            features += [result() for result in in_flight]
        return self._finite(rows, np.concatenate(features), hashes, failures)

    def _finite(
        self, rows: Sequence[int], features: np.ndarray, hashes: list[str], failures: list[Failure]
    ) -> tuple[np.ndarray, list[str], list[Failure]]:
        """Turn rows that are not finite, or zero as they were divided by infinity, to failures."""
        good = np.isfinite(features).all(-1) & features.any(-1)  # (rows,), or (rows, 1 + L)
        good = good.reshape(len(features), good[:1].size).all(1)
        if good.all():
            return features, hashes, failures
        failed = {failure.source_row for failure in failures}
        encoded = [row for row in rows if row not in failed]
        reason = f"its embedding is {self.backbone.not_finite}"
        found = [
            Failure(encoded[place], self.source.keys[encoded[place]], reason, fatal=True)
            for place in np.flatnonzero(~good)
        ]
        kept = [hashes[place] for place in np.flatnonzero(good)]
        return features[good], kept, sorted([*failures, *found], key=lambda f: f.source_row)


def launch(
    backbone: Backbone, images: torch.Tensor | None, batch_size: int
) -> Callable[[], np.ndarray]:
    """
    Begin to embed a batch; the returned function waits for its unit rows (B, *shape) float16.

    A GPU computes while the next batch is fetched; a CPU is done when this returns.
    """
    if images is None:
        return lambda: np.empty((0, *backbone.shape), np.float16)
    embedded = backbone.embed(images, batch_size).float()
    rows = torch.nn.functional.normalize(embedded, dim=-1).half()
    if rows.device.type != "cuda":
        return rows.numpy
    host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    host.copy_(rows, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(rows.device))

    def result() -> np.ndarray:
        copied.synchronize()
        array: np.ndarray = host.numpy()
        return array

    return result


def _refused(source: Source, backbone: Backbone, rows: Sequence[int]) -> bool:
    """Refuse the images of these rows that make a worker hang or die; whether there are any."""
    deadly = deadly_rows(source, backbone, rows)
    source.refusals.update(dict.fromkeys(deadly, "makes its worker hang or die"))
    return bool(deadly)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether the GPU or the system refused memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "can't allocate memory" in str(error)
    )
