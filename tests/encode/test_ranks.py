"""Several processes encode into one folder: the same bytes for any number, whoever is lost."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import signal
import socket
import warnings
from pathlib import Path

import pytest
import torch

from tests.encode.test_encoder import contents
from tests.tiny import tiny_backbone
from transclip_fast.encode import encoder, models
from transclip_fast.encode.encoder import Throughput, merged
from transclip_fast.encode.folder import encode_images, encode_source
from transclip_fast.encode.sources import open_source
from transclip_fast.encode.weights import WatchedFiles
from transclip_fast.errors import InputError
from transclip_fast.ranks import ALONE, Ranks, joined
from transclip_fast.store.features import load_features

DONE, REPORTED = 0, 2


def become(rank, size, port):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def process(rank, size, port, folder, out, dies_after):
    """One rank; it ends by SIGKILL after so many batches, if any are given."""
    become(rank, size, port)
    torch.set_num_threads(1)
    embed, left = encoder.launch, [dies_after]

    def dies(*arguments):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return embed(*arguments)

    encoder.launch = dies
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
    return started(size, process, lambda rank: (folder, out, after if rank == lost else -1))


def started(size, target, arguments=lambda rank: ()):
    """Exit codes of `size` processes, each with its rank, the size and a port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=target, args=(rank, size, port, *arguments(rank)))
        for rank in range(size)
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


class Marks:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def beside_a_stranger(rank, size, port, messages):
    """The first rank sends each size and, if they are any, bytes; the second takes them."""
    become(rank, size, port)
    with joined() as ranks:
        for announced, content in messages:
            if rank == 0:
                torch.distributed.broadcast(torch.tensor([announced]), 0)
                if content:
                    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                    torch.distributed.broadcast(data, 0)
                continue
            try:
                ranks.broadcast(None)
            except InputError as error:
                if "rank 0" in str(error) and "\n" not in str(error):
                    continue
            os._exit(1)
        assert ranks.broadcast(["an answer"] if rank == 0 else None) == ["an answer"]
    os._exit(DONE)


def test_what_a_stranger_sends_is_never_unpickled(tmp_path):
    mark = tmp_path / "mark"
    contents = [pickle.dumps(Marks(mark)), b"\xff\xfe", b"[" * 100_000, b"[1, NaN"]
    messages = [(len(content), content) for content in contents]
    messages += [(announced, b"") for announced in (0, -1, 2**40)]
    assert started(2, beside_a_stranger, lambda rank: (messages,)) == [DONE] * 2
    assert not mark.exists()


@pytest.mark.parametrize(
    "answer",
    [None, {}, [1], "12345", [{}, [], [], [], []], [{"source": None}, [], [], [], []], "a name"],
)
def test_an_answer_of_another_kind_ends_in_one_line(images, tmp_path, answer):
    source = open_source(images(4))

    class Beside(Ranks):
        def broadcast(self, _):
            if answer != "a name":
                return answer
            return [{"source": source.identity(), "shard_rows": 2}, ["../../x"], [], [], []]

    with pytest.raises(InputError, match=r"first rank"):
        encode_source(source, tiny_backbone(), tmp_path / "out", None, Beside(1, 2))


@pytest.mark.parametrize("name", ["weights", "source", "device"])
def test_a_rank_with_other_weights_or_images_is_refused(images, tmp_path, name):
    """Each rank reads them by itself, and they may be replaced in between."""
    source, backbone = open_source(images(4)), tiny_backbone()
    sent = []

    class Leading(Ranks):
        def broadcast(self, value):
            sent.append(value)
            return value

        def all_gather(self, value):
            return [value]

    encode_source(source, backbone, tmp_path / "out", None, Leading(0, 1), batch_size=2)
    settled, *rest = sent[0]

    class Beside(Ranks):
        def broadcast(self, _):
            return [{**settled, name: "other"}, *rest]

    with pytest.raises(InputError, match=f"rank 1: its {name} differs from the first rank's"):
        encode_source(source, backbone, tmp_path / "out", None, Beside(1, 2))


@pytest.mark.parametrize(
    "value", [(1, 2), {1: 2}, {1, 2}, float("nan"), b"1", Marks("x"), [[(1,)]]]
)
def test_what_would_not_arrive_as_it_is_is_not_sent(value):
    with pytest.raises((TypeError, ValueError)):
        Ranks(0, 2).broadcast(value)


LOOPBACK = r"[0-9A-F]{6}7F|0{24}01000000|0{16}FFFF0000[0-9A-F]{6}7F"  # as /proc/net writes them


def listening_on_loopback(rank, size, port):
    """Exits with the number of addresses that listen, all of them on loopback."""
    become(rank, size, port)
    with joined() as ranks:
        assert ranks.all_gather(rank) == [0, 1]
        folder = "/proc/self/fd"
        ours = {os.path.basename(os.path.realpath(f"{folder}/{fd}")) for fd in os.listdir(folder)}
        text = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
        sockets = [line.split() for line in text.splitlines() if ": " in line]
        found = [
            fields[1].split(":")[0]
            for fields in sockets
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in ours
        ]
        ranks.all_gather(rank)
    os._exit(len(found) if all(re.fullmatch(LOOPBACK, address) for address in found) else 99)


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp6"), reason="no /proc/net")
def test_ranks_of_one_machine_listen_on_loopback_alone():
    store_and_gloo, gloo = 2, 1
    assert started(2, listening_on_loopback) == [store_and_gloo, gloo]


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "x"), ("RANK", None), ("MASTER_PORT", "99999"), ("WORLD_SIZE", "")]
)
def test_an_odd_environment_is_one_line(monkeypatch, name, value):
    known = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for variable, text in {**known, name: value}.items():
        if text is None:
            monkeypatch.delenv(variable, raising=False)
        else:
            monkeypatch.setenv(variable, text)
    with pytest.raises(InputError, match=name), joined():
        pass


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
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(24)})
    assert ALONE.cores() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert Ranks(5, 16).cores() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")
    assert Ranks(5, 99).cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    assert Ranks(5, 99).cores() == 1
    assert ALONE.cores() == 16


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
