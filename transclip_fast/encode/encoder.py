"""The encode loop: workers decode, the model embeds, a thread writes; each ahead of the next."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from transclip_fast.encode.feed import Batch, feed, is_worker_lost
from transclip_fast.encode.models import Backbone
from transclip_fast.encode.pixels import decoder
from transclip_fast.encode.sources import Source
from transclip_fast.errors import InputError
from transclip_fast.store.feature_writer import Failure, FeatureWriter

STAGES = ("images", "model", "writing")  # that the loop may wait for
IN_FLIGHT = 2  # batches on a GPU at a time: one computes, one arrives


@dataclass(frozen=True)
class EncodeProgress:
    """Rows done and in all, and the share of the time that was spent waiting for images."""

    done: int
    total: int
    waiting: float


@dataclass
class Throughput:
    """
    How fast images were encoded, and what the loop waited for.

    Parameters
    ----------
    images : int
        Rows that were encoded, or failed, in `seconds`.
    waited : dict
        Seconds by stage: images (reading and decoding), model, writing.
    batch_size : int
        That of the last batch.
    """

    images: int = 0
    seconds: float = 0.0
    waited: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    batch_size: int = 0

    def shares(self) -> dict[str, float]:
        """Of each stage the share of the time that was spent waiting for it."""
        return {stage: spent / max(self.seconds, 1e-9) for stage, spent in self.waited.items()}

    @property
    def images_per_second(self) -> float:
        return self.images / max(self.seconds, 1e-9)

    @property
    def bottleneck(self) -> str:
        """The stage that was waited for longest."""
        return max(STAGES, key=lambda stage: self.waited[stage])

    def summary(self) -> dict[str, Any]:
        """For the summary of a command."""
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
    """That of processes side by side: images in all, the slowest one's time, the mean wait."""
    return Throughput(
        images=sum(part.images for part in parts),
        seconds=max(part.seconds for part in parts),
        waited={stage: sum(part.waited[stage] for part in parts) / len(parts) for stage in STAGES},
        batch_size=min(part.batch_size for part in parts),
    )


def encode_images(
    source: Source,
    backbone: Backbone,
    writer: FeatureWriter,
    plan: Sequence[int],
    *,
    workers: int,
    progress: Callable[[EncodeProgress], None],
) -> Throughput:
    """
    Encode the images of some shards.

    Features are unit rows in float16. Batches are cut by source row within a shard, so that the
    same rows meet in one batch however often the run is interrupted, and whoever encodes it.
    Where memory does not suffice, the batch is halved and the shard begun again; so it is, once,
    where a worker hangs or dies.

    Parameters
    ----------
    plan : sequence of int
        The shards to encode and write.
    workers : int
        Processes that decode; 0 decodes in this one.

    Raises
    ------
    InputError
        Not even single images fit into memory; a shard on which workers are lost twice; the
        machine fails; the folder cannot be written.
    """
    todo, size, lost_at = deque(plan), writer.batch_size, None
    clock = _Clock(writer, plan, progress)
    with torch.inference_mode(), ThreadPoolExecutor(1, "writing") as thread:
        loop = _Loop(source, backbone, writer, workers, clock, thread)
        while todo:
            again = lost_at == todo[0]
            try:
                # Once more without what follows: workers are ahead, and may have been lost there.
                loop.run(todo, 1 if again else len(todo), size)
            except (RuntimeError, MemoryError) as error:
                if is_worker_lost(error) and not again:
                    lost_at = todo[0]
                elif _out_of_memory(error) and size > 1:
                    size //= 2
                elif is_worker_lost(error) or _out_of_memory(error):
                    keys = [source.keys[row] for row in writer.rows(todo[0])]
                    raise InputError(_given_up(error, keys)) from error
                else:
                    raise
        loop.saved()
    return clock.stop()


@dataclass
class _Loop:
    """The stages of encoding, and the clock that tells which of them is waited for."""

    source: Source
    backbone: Backbone
    writer: FeatureWriter
    workers: int
    clock: _Clock
    thread: ThreadPoolExecutor
    writing: Future[None] | None = None

    def run(self, todo: deque[int], shards: int, size: int) -> None:
        """Encode the first `shards` of `todo` in batches of `size`; each is taken off when done."""
        cut = [
            list(rows[start : start + size])
            for rows in map(self.writer.rows, list(todo)[:shards])
            for start in range(0, len(rows), size)
        ]
        self.clock.throughput.batch_size = size
        with closing(feed(self.source, self.backbone, cut, self.workers)) as batches:
            for _ in range(shards):
                self.clock.begin_shard()
                shard = self._shard(len(self.writer.rows(todo[0])), size, batches)
                self.saved()  # one shard is on its way, not more
                self.writing = self.thread.submit(
                    self.writer.write_shard, todo.popleft(), *shard, size
                )
                self.clock.end_shard()

    def saved(self) -> None:
        """Wait until the last shard is written."""
        with self.clock.waiting("writing"):
            if self.writing is not None:
                self.writing.result()

    def _shard(
        self, rows: int, size: int, batches: Generator[Batch]
    ) -> tuple[np.ndarray, list[Failure]]:
        """Features (rows, *shape) float16 of the next rows, and those that could not be read."""
        features, failures = list[np.ndarray](), list[Failure]()
        in_flight: deque[Callable[[], np.ndarray]] = deque()
        for _ in range(0, rows, size):
            with self.clock.waiting("images"):
                batch = next(batches)
            with self.clock.waiting("model"):
                in_flight.append(_launch(self.backbone, batch.images, size))
                if len(in_flight) == IN_FLIGHT:
                    features.append(in_flight.popleft()())
            failures += batch.failures
            self.clock.done(len(batch))
        with self.clock.waiting("model"):
            features += [land() for land in in_flight]
        return np.concatenate(features), failures


def _launch(backbone: Backbone, images: torch.Tensor | None, size: int) -> Callable[[], np.ndarray]:
    """
    Begin to embed a batch; the result waits for its unit rows (B, *shape) float16.

    A GPU computes while the next batch is fetched; a CPU is done when this returns.
    """
    rows = _embed(backbone, images, size)
    if rows.device.type != "cuda":
        return rows.numpy
    host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    host.copy_(rows, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record(torch.cuda.current_stream(rows.device))

    def land() -> np.ndarray:
        done.synchronize()
        array: np.ndarray = host.numpy()
        return array

    return land


def _embed(backbone: Backbone, images: torch.Tensor | None, size: int) -> torch.Tensor:
    """
    Unit rows (B, *shape) float16, on the backbone's device; batches have `size` images at most.
    """
    if images is None:
        return torch.empty((0, *backbone.shape), dtype=torch.float16)
    rows = backbone.embed(images, size).float()
    return torch.nn.functional.normalize(rows, dim=-1).half()


def _given_up(error: Exception, keys: Sequence[str]) -> str:
    """What to tell of images with these keys where trying again does not help."""
    told = " ".join(str(error).split())
    if _out_of_memory(error):
        return f"not even one image fits into memory ({told})"
    return (
        f"{keys[0]} to {keys[-1]}: workers hang or die twice ({told}); "
        "run again with --workers 0 to see where"
    )


def _out_of_memory(error: Exception) -> bool:
    """Whether memory was refused, by a GPU or by the system."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "can't allocate memory" in str(error)
    )


class _Clock:
    """Counts rows, and the time spent waiting for each stage."""

    def __init__(
        self, writer: FeatureWriter, plan: Sequence[int], report: Callable[[EncodeProgress], None]
    ) -> None:
        mine, missing = (
            sum(len(writer.rows(number)) for number in shards)
            for shards in (plan, writer.missing())
        )
        self.before = int(writer.config["source"]["rows"]) - missing
        self.rows = self.whole = self.before
        self.total, self.report = self.before + mine, report
        self.throughput = Throughput(batch_size=writer.batch_size)
        self.start = time.perf_counter()

    @contextmanager
    def waiting(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.throughput.waited[stage] += time.perf_counter() - begun

    def begin_shard(self) -> None:
        self.rows = self.whole  # what was done of a shard that was broken off is not

    def end_shard(self) -> None:
        self.whole = self.rows

    def done(self, rows: int) -> None:
        self.rows += rows
        share = self.throughput.waited["images"] / (time.perf_counter() - self.start)
        self.report(EncodeProgress(self.rows, self.total, share))

    def stop(self) -> Throughput:
        self.throughput.images = self.rows - self.before
        self.throughput.seconds = time.perf_counter() - self.start
        return self.throughput
