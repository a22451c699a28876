"""Several processes encode into one folder: the same bytes for any number, whoever is lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import warnings

import pytest
import torch

from tests.encode.test_encoder import contents
from tests.tiny import tiny_backbone
from transclip_fast.encode import encoder, models
from transclip_fast.encode.encoder import Throughput, merged
from transclip_fast.encode.folder import encode_images
from transclip_fast.encode.ranks import ALONE, Ranks
from transclip_fast.encode.weights import WatchedFiles
from transclip_fast.errors import InputError
from transclip_fast.store.features import load_features

DONE, REPORTED = 0, 2


def process(rank, size, port, folder, out, dies_after):
    """One rank; it ends by SIGKILL after so many batches, if any are given."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    embed, left = encoder._launch, [dies_after]

    def dies(*arguments):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return embed(*arguments)

    encoder._launch = dies
    models.load_backbone = lambda *_: tiny_backbone()
    models.identify = lambda *_: tiny_backbone().identity
    models.watch_weights = lambda *_: WatchedFiles({})
    try:
        encoded = encode_images(
            folder, out, model="tiny", classes=["dog", "cat"], labels_from_folders=True,
            templates=f"{folder.parent}/templates.txt", batch_size=2, shard_rows=3, workers=0,
            device="cpu",
        )  # fmt: skip
        assert encoded.n_rows + len(encoded.failures) == encoded.config["source"]["rows"]
        assert encoded.leads == (rank == 0)
    except InputError as error:
        os._exit(REPORTED if "run again to continue" in str(error) else 1)
    os._exit(DONE)


def run(size, folder, out, lost=None, after=-1):
    """Exit codes of `size` ranks, of which one may be killed after some batches."""
    (folder.parent / "templates.txt").write_text("a {}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(
            target=process, args=(r, size, port, folder, out, after if r == lost else -1)
        )
        for r in range(size)
    ]
    with warnings.catch_warnings():  # of Python 3.12, that torch's threads are not forked
        warnings.simplefilter("ignore")
        for rank in ranks:
            rank.start()
    for rank in ranks:
        rank.join(120)
    return [rank.exitcode for rank in ranks]


def test_any_number_of_ranks_writes_the_same_bytes(images, tmp_path):
    folder = images(22)
    (folder / "dog/001.png").write_text("no picture")
    for size in (1, 2, 3):
        assert run(size, folder, tmp_path / f"{size}") == [DONE] * size
    assert contents(tmp_path / "2") == contents(tmp_path / "1")
    assert contents(tmp_path / "3") == contents(tmp_path / "1")
    assert len(load_features(tmp_path / "3").get("image_features")) == 21


@pytest.mark.parametrize(("lost", "again"), [(1, 3), (0, 3), (2, 1)])
def test_a_lost_rank_is_made_up_for(images, tmp_path, lost, again):
    folder = images(22)
    assert run(1, folder, tmp_path / "whole") == [DONE]
    codes = run(3, folder, tmp_path / "out", lost=lost, after=3)
    assert codes[lost] == -signal.SIGKILL
    assert [code for rank, code in enumerate(codes) if rank != lost] == [REPORTED, REPORTED]
    with pytest.raises(InputError):
        load_features(tmp_path / "out")
    # Files that no record names may be those that the lost rank was about to record.
    records = [record.stem for record in (tmp_path / "out/records").glob("*.json")]
    files = [tmp_path / f"out/img_emb/img_emb_{number}.npy" for number in records]
    written = {file: file.stat().st_mtime_ns for file in files}
    assert len(written) >= 4
    assert run(again, folder, tmp_path / "out") == [DONE] * again
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert all(file.stat().st_mtime_ns == then for file, then in written.items())  # written once


@pytest.mark.parametrize("lost", [None, 1])
def test_ranks_share_a_folder_that_grows(images, tmp_path, lost):
    folder = images(20)
    (folder / "dog/001.png").write_text("no picture")
    assert run(2, folder, tmp_path / "out") == [DONE] * 2
    images(22)  # two more, and the broken one whole
    for name in ("002", "008", "012"):
        with open(folder / f"cat/{name}.png", "ab") as file:
            file.write(b"another size")
    if lost is not None:
        assert run(3, folder, tmp_path / "out", lost=lost, after=1)[lost] == -signal.SIGKILL
    assert run(3, folder, tmp_path / "out") == [DONE] * 3
    assert run(1, folder, tmp_path / "whole") == [DONE]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(load_features(tmp_path / "out").keys) == 22


def test_each_shard_is_in_one_plan():
    plans = [Ranks(rank, 3).part(range(8)) for rank in range(3)]
    assert plans == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert ALONE.part(range(3)) == [0, 1, 2]


def test_each_rank_has_its_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert Ranks(5, 8).device("cuda") == "cuda:2"
    assert Ranks(5, 8).device("cuda:0") == "cuda:0"
    assert ALONE.device("cuda") == "cuda"


def test_ranks_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 24)
    assert ALONE.cores() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert Ranks(5, 16).cores() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")
    assert Ranks(5, 99).cores() == 1


def test_throughputs_add_up():
    parts = [
        Throughput(10, 2.0, {"images": 1.0, "model": 0.5, "writing": 0.0}, 4),
        Throughput(8, 1.0, {"images": 0.0, "model": 1.0, "writing": 0.0}, 2),
    ]
    whole = merged(parts)
    assert (whole.images, whole.seconds, whole.batch_size) == (18, 2.0, 2)
    assert whole.images_per_second == 9
    assert whole.shares() == {"images": 0.25, "model": 0.375, "writing": 0.0}
    assert whole.bottleneck == "model"
