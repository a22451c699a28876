"""Too little memory, workers that hang or die, a full disk: the run recovers or can be resumed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from multiprocessing.process import BaseProcess

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.encode.test_encoder import contents, encode
from transclip_fast.encode import encoder, feed
from transclip_fast.encode.sources import open_source
from transclip_fast.errors import InputError
from transclip_fast.store.features import load_features


@pytest.fixture
def small_memory(monkeypatch):
    """Batches of more than so many images do not fit from the n-th on; their sizes are kept."""

    def limit(most, error=torch.OutOfMemoryError, first=0):
        embed, sizes = encoder.launch, []

        def tight(backbone, images, size):
            sizes.append(len(images))
            if len(images) > most and len(sizes) > first:
                raise error("can't allocate memory")
            return embed(backbone, images, size)

        monkeypatch.setattr(encoder, "launch", tight)
        return sizes

    yield limit
    monkeypatch.undo()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_memory_halves_the_batch(images, backbone, tmp_path, small_memory, error):
    folder = images(7)
    encode(folder, backbone, tmp_path / "two", batch_size=2, shard_rows=5)
    sizes = small_memory(2, error)
    encode(folder, backbone, tmp_path / "tight", batch_size=8, shard_rows=5)
    assert sizes == [5, 4, 2, 2, 1, 2]  # a shard of 5 rows, then one of 2
    manifest = json.loads((tmp_path / "tight/manifest.json").read_text())
    assert manifest["config"]["batch_size"] == 8
    assert [entry["batch_size"] for entry in manifest["shards"].values()] == [2, 2]
    two, tight = contents(tmp_path / "two"), contents(tmp_path / "tight")
    assert {name for name in two if two[name] != tight[name]} == {"manifest.json"}


def test_a_halved_batch_is_remembered(images, backbone, tmp_path, small_memory, monkeypatch):
    folder = images(7)
    small_memory(2, first=1)  # the first batch of 3 still fits
    encode(folder, backbone, tmp_path / "whole", batch_size=4, shard_rows=3)
    manifest = json.loads((tmp_path / "whole/manifest.json").read_text())
    assert [entry["batch_size"] for entry in manifest["shards"].values()] == [4, 2, 2]
    monkeypatch.undo()
    sizes = small_memory(9)
    (tmp_path / "whole/img_emb/img_emb_00002.npy").unlink()
    encode(folder, backbone, tmp_path / "whole", batch_size=4, shard_rows=3)
    assert sizes == [1]
    assert json.loads((tmp_path / "whole/manifest.json").read_text()) == manifest


def test_not_even_one_image_fits(images, backbone, tmp_path, small_memory):
    small_memory(0)
    with pytest.raises(InputError, match="not even one image fits into memory"):
        encode(images(3), backbone, tmp_path / "out")
    assert not json.loads((tmp_path / "out/manifest.json").read_text())["complete"]


def test_other_errors_are_not_taken_for_it(images, backbone, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(encoder, "launch", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        encode(images(3), backbone, tmp_path / "out")


def hang():
    time.sleep(600)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def quick(monkeypatch):
    """Not minutes until a worker is given up."""
    monkeypatch.setattr(feed, "HUNG_SECONDS", 4.0)
    monkeypatch.setattr(feed, "WATCH_SECONDS", 0.5)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)


@pytest.mark.parametrize("trouble", [hang, die])
def test_a_lost_worker_is_replaced(images, backbone, tmp_path, quick, trouble):
    folder = images(7)
    encode(folder, backbone, tmp_path / "whole")
    good, seen = backbone.preprocess, tmp_path / "seen"

    def first_time_bad(image):
        if not seen.exists():
            seen.touch()
            trouble()
        return good(image)

    backbone.preprocess = first_time_bad
    encode(folder, backbone, tmp_path / "out", workers=1)
    assert seen.exists()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_worker_that_ends_before_torch_watches_it_is_replaced(
    images, backbone, tmp_path, quick, monkeypatch
):
    folder, start, ended = images(7), BaseProcess.start, []
    encode(folder, backbone, tmp_path / "whole")

    def start_and_end_the_first(process):
        start(process)
        if not ended:
            process.kill()
            process.join()
            ended.append(process.exitcode)

    monkeypatch.setattr(feed, "HUNG_SECONDS", 1e6)  # torch alone would wait until then
    monkeypatch.setattr(BaseProcess, "start", start_and_end_the_first)
    encode(folder, backbone, tmp_path / "out", workers=1)
    assert ended == [-signal.SIGKILL]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_slow_image_costs_no_worker(images, backbone, quick):
    read = backbone.preprocess

    def slow(image):
        time.sleep(2)  # four times as long as until torch looks for lost workers
        return read(image)

    backbone.preprocess = slow
    source = open_source(images(1))
    assert [len(batch) for batch in feed.feed(source, backbone, [[0]], 1)] == [1]


@pytest.fixture
def loader(monkeypatch):
    """Let torch's loader first raise some errors: of a lost worker, then of something else."""
    start = DataLoader.__iter__
    lost = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    def raising(*errors):
        pending = [lost, *errors]

        def begin(self):
            if not pending:
                return start(self)
            error = pending.pop(0)
            if error is not lost:
                raise error
            try:
                raise lost  # from a signal handler, anywhere
            except RuntimeError:
                raise KeyError("thread") from None

        monkeypatch.setattr(DataLoader, "__iter__", begin)

    raising.lost = lost
    return raising


def test_the_end_of_a_worker_may_become_another_error(images, backbone, tmp_path, loader):
    """As where it ends while a thread is started."""
    folder = images(7)
    encode(folder, backbone, tmp_path / "whole")
    loader()
    encode(folder, backbone, tmp_path / "out", workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("times", [0, 1, 2])
def test_an_error_after_that_of_a_lost_worker_is_not_taken_for_it(
    images, backbone, tmp_path, loader, times
):
    loader(*[loader.lost] * times, ValueError("other"))
    with pytest.raises(ValueError, match="other"):
        encode(images(3), backbone, tmp_path / "out", workers=1)


def test_without_room_in_shared_memory_images_come_through_pipes(
    images, backbone, tmp_path, quick, monkeypatch
):
    """As in a Docker container, which has 64 MB of it."""
    folder = images(7)
    encode(folder, backbone, tmp_path / "whole")

    def no_room(_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")

    monkeypatch.setattr(torch.Tensor, "share_memory_", no_room)
    feed._warn_of_pipes.cache_clear()
    with pytest.warns(UserWarning, match=r"has no room .*--shm-size") as found:
        encode(folder, backbone, tmp_path / "out", workers=1)
    assert len(found) == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_workers_that_cannot_start_are_one_line(images, backbone, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", full)
    with pytest.raises(InputError, match=r"cannot start .*No space left.*--workers 0"):
        encode(images(3), backbone, tmp_path / "out", workers=1)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "the worker's socket"),
        EOFError(),
        FileNotFoundError(2, "the worker's socket"),
        OSError("got end of file during message"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_worker_that_ends_while_it_hands_over_is_a_lost_one(
    error, images, backbone, tmp_path, quick, monkeypatch
):
    iterate, broken = torch.utils.data.DataLoader.__iter__, []

    def breaking(loader):
        decoded = iterate(loader)
        if broken or not loader.num_workers:
            return decoded
        broken.append(True)
        return map(fail, range(1))

    def fail(_):
        raise error

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", breaking)
    encoded = encode(images(7), backbone, tmp_path / "out", workers=1, shard_rows=4)
    assert (broken, encoded.failures) == ([True], [])
    assert load_features(tmp_path / "out").source_rows.tolist() == list(range(7))


def test_an_image_that_always_loses_its_worker_is_a_failure(
    images, backbone, tmp_path, quick, monkeypatch
):
    monkeypatch.setattr(feed, "HUNG_SECONDS", 60.0)  # workers die, and none is given up under load
    good, folder = backbone.preprocess, images(7)
    with Image.open(folder / "dog/001.png") as image:
        poison = np.asarray(image).sum()

    def deadly(image):
        if np.asarray(image).sum() == poison:
            die()
        return good(image)

    backbone.preprocess = deadly
    encoded = encode(folder, backbone, tmp_path / "out", workers=1, shard_rows=4)
    assert [(failure.key, failure.reason) for failure in encoded.failures] == [
        ("dog/001.png", "makes its worker hang or die")
    ]
    stored = load_features(tmp_path / "out")
    assert stored.source_rows.tolist() == [0, 1, 2, 3, 5, 6]
    backbone.preprocess = good
    encode(folder, backbone, tmp_path / "whole", shard_rows=4)
    whole = load_features(tmp_path / "whole").get("image_features")
    found = stored.get("image_features")
    np.testing.assert_allclose(found, np.delete(whole, 4, 0), atol=2e-3)


def test_deadly_images_are_not_sought_among_those_kept(
    images, backbone, tmp_path, quick, monkeypatch
):
    good, folder, sought = backbone.preprocess, images(7), []
    encode(folder, backbone, tmp_path / "out", shard_rows=4)
    shutil.copy(folder / "cat/000.png", folder / "cat/001.png")
    monkeypatch.setattr(
        encoder, "deadly_rows", lambda *arguments: sought.extend(arguments[2]) or []
    )
    backbone.preprocess = lambda _: die()
    with pytest.raises(InputError, match="workers hang or die twice"):
        encode(folder, backbone, tmp_path / "out", workers=1, shard_rows=4)
    assert sought == [1]
    backbone.preprocess = good
    encode(folder, backbone, tmp_path / "out", shard_rows=4)
    assert load_features(tmp_path / "out").source_rows.tolist() == list(range(8))


def test_a_machine_that_loses_every_worker_is_no_fault_of_the_images(
    images, backbone, tmp_path, quick
):
    good, folder = backbone.preprocess, images(7)
    backbone.preprocess = lambda _: die()
    message = r"cat/000.png to cat/006.png: workers hang or die twice .*--workers 0"
    with pytest.raises(InputError, match=message):
        encode(folder, backbone, tmp_path / "out", workers=1, shard_rows=4)
    backbone.preprocess = good
    encode(folder, backbone, tmp_path / "out", workers=1, shard_rows=4)
    encode(folder, backbone, tmp_path / "whole", shard_rows=4)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("writes", range(0, 14, 2))
def test_a_full_disk_is_reported_and_continued(images, backbone, tmp_path, monkeypatch, writes):
    folder = images(7)
    encode(folder, backbone, tmp_path / "whole")
    fsync, left = os.fsync, [writes]

    def full(descriptor):
        if not left[0]:
            raise OSError(errno.ENOSPC, "no space")
        left[0] -= 1
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        encode(folder, backbone, tmp_path / "out")
    with pytest.raises(InputError):
        load_features(tmp_path / "out")
    monkeypatch.setattr(os, "fsync", fsync)
    encode(folder, backbone, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
