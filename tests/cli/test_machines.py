"""Ranks on machines of their own: network namespaces, joined by a cable."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest

from tests.conftest import make_problem
from tests.ranks import SECONDS, free_port
from transclip_fast import InputError, ranks

ADDRESSES = ("10.213.7.1", "10.213.7.2")


@pytest.fixture
def machines():
    """The commands that run a program on each of two machines."""
    ip = shutil.which("ip")
    if ip is None or os.geteuid() != 0:
        pytest.skip("needs root, and ip of iproute2")
    names = [f"transclip{i}-{os.getpid()}" for i in range(2)]

    def call(*arguments):
        return subprocess.run([ip, *arguments], capture_output=True, text=True, check=True)

    try:
        for name in names:
            call("netns", "add", name)
        ends = ["type", "veth", "peer", "name", "cable", "netns", names[1]]
        call("link", "add", "cable", "netns", names[0], *ends)
        for name, address in zip(names, ADDRESSES, strict=True):
            call("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                call("-n", name, "link", "set", link, "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    else:
        yield [[ip, "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run([ip, "netns", "delete", name], capture_output=True, check=False)


@pytest.fixture
def features(tmp_path):
    image, text, _ = make_problem(n=2100, k=9, noise=0.06)
    np.savez(tmp_path / "features.npz", image_features=image, text_features=text)
    return tmp_path / "features.npz"


def solve(features, out, starts, address):
    """Exit codes and last lines of errors of ranks, each of which such a command starts."""
    port = str(free_port())
    shared = {"WORLD_SIZE": str(len(starts)), "MASTER_ADDR": address, "MASTER_PORT": port}
    command = [sys.executable, "-m", "transclip_fast.cli", "solve", str(features)]
    ranks = [
        subprocess.Popen(
            [*start, *command, "--out", str(out), "--device", "cpu", "--json"],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_WORLD_SIZE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, start in enumerate(starts)
    ]
    try:
        errors = [rank.communicate(timeout=SECONDS)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], errors


def test_two_machines(machines, features, tmp_path):
    """No address but the cable's leads to the other: not the one of the machine's name."""
    codes, errors = solve(features, tmp_path / "apart", machines, ADDRESSES[0])
    assert codes == [0, 0], errors
    codes, errors = solve(features, tmp_path / "one", [[], []], "127.0.0.1")
    assert codes == [0, 0], errors
    for name in ("predictions.parquet", "mixture.safetensors"):
        found = (tmp_path / "apart" / name).read_bytes()
        assert found == (tmp_path / "one" / name).read_bytes()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_does_not_come(rank, monkeypatch):
    monkeypatch.setattr(ranks, "JOINING", timedelta(seconds=1))
    shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in (shared | {"RANK": rank, "GLOO_SOCKET_IFNAME": "lo"}).items():
        monkeypatch.setenv(name, str(value))
    message = r"do not meet at 127\.0\.0\.1 .*; start all 2 of them within ten minutes"
    with pytest.raises(InputError, match=message), ranks.joined():
        pass


class Store(dict):
    """What a store of torch.distributed is to one rank."""

    set = dict.__setitem__
    get = dict.__getitem__


def test_strangers_are_not_taken_for_ranks(monkeypatch):
    """One says nothing, one the wrong words, one goes at once; then the rank comes."""
    monkeypatch.setattr(ranks, "SAYING_SECONDS", 0.2)
    store = Store()

    def come():
        while ranks.WATCHING not in store:
            time.sleep(0.01)
        place = "127.0.0.1", json.loads(store[ranks.WATCHING])[0]
        silent, wrong = (socket.create_connection(place) for _ in range(2))
        wrong.sendall(bytes(ranks.TOKEN_BYTES) + b"\0\1")
        socket.create_connection(place).close()
        found = ranks._connected(ranks.Ranks(1, 2), "127.0.0.1", store)
        for connection in (silent, wrong, *found):
            connection.close()
        return list(found.values())

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(come)
        found = ranks._connected(ranks.Ranks(0, 2), "127.0.0.1", store)
        assert (list(found.values()), other.result(SECONDS)) == ([1], [0])
    for connection in found:
        connection.close()
