"""`solve` as torchrun starts it: one result for any number of ranks, whoever is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import make_problem
from tests.ranks import SECONDS, become, free_port
from transclip_fast.cli import main, solution
from transclip_fast.ops.exchange import Exchange

REPORTED = 2
FILES = ("predictions.parquet", "predictions.csv", "mixture.safetensors")


@pytest.fixture
def features(tmp_path):
    """A file of five parts of rows, some of known class."""
    image, text, labels = make_problem(n=2100, k=9, noise=0.06)
    known = np.where(np.arange(2100) % 10 == 0, labels, -1)
    arrays = {"image_features": image, "text_features": text, "labels": labels}
    np.savez(tmp_path / "features.npz", **arrays, known_labels=known)
    np.savez(tmp_path / "other.npz", **arrays | {"image_features": image[::-1].copy()})
    return tmp_path / "features.npz"


def solve(size, *arguments, dies=None, other=None):
    """
    Exit codes of so many ranks that solve, and what they wrote to standard error.

    `dies` are a rank and the number of its broadcasts since the first checkpoint after which
    SIGKILL ends it; `other` are a rank and the file that it has instead.
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    (told, written) = zip(*(os.pipe() for _ in range(size)), strict=True)
    ranks = [
        context.Process(target=run, args=(r, size, port, written[r], arguments, dies, other))
        for r in range(size)
    ]
    with warnings.catch_warnings():  # of Python 3.12, that torch's threads are not forked
        warnings.simplefilter("ignore")
        for rank in ranks:
            rank.start()
    for file in written:
        os.close(file)
    errors = []
    for rank, file in zip(ranks, told, strict=True):
        rank.join(SECONDS)
        with open(file) as text:
            errors.append(text.read())
    return [rank.exitcode for rank in ranks], errors


def checkpoint_index(out):
    return out.with_name(f".{out.name}.solve-0.ranks.index")


def run(rank, size, port, errors, arguments, dies, other):
    become(rank, size, port)
    os.dup2(errors, 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    solution.CHECKPOINT_SECONDS = 0
    if dies and dies[0] == rank:
        broadcast, left = Exchange._broadcast, [dies[1]]
        saved = checkpoint_index(arguments[arguments.index("--out") + 1])

        def counted(*values):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= saved.exists()
            return broadcast(*values)

        Exchange._broadcast = counted
    file = other[1] if other and other[0] == rank else arguments[0]
    sys.argv = ["transclip-fast", "solve", str(file), *map(str, arguments[1:]), "--json"]
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        main()
    except SystemExit as end:
        sys.stderr.flush()
        os._exit(end.code or 0)
    os._exit(0)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


def hidden(folder):
    return sorted(file.name for file in folder.iterdir() if file.name.startswith("."))


def test_any_number_of_ranks_writes_the_same_result(features, tmp_path):
    settings = ["--device", "cpu", "--reject", 0.1, "--csv", "--class-cost", "on"]
    for size in (1, 2, 3):
        codes, errors = solve(size, features, "--out", tmp_path / f"{size}", *settings)
        assert codes == [0] * size, errors
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")
    assert hidden(tmp_path) == []
    table = pq.read_table(tmp_path / "3/predictions.parquet")
    assert table["row"].to_pylist() == list(range(2100))
    alone, shared = (json.loads((tmp_path / f"{n}/run.json").read_text()) for n in (1, 3))
    varying = ("seconds", "memory")
    assert {k: v for k, v in alone.items() if k not in varying} == {
        k: v for k, v in shared.items() if k not in varying
    }
    rejected = table["rejected"].to_numpy()
    assert shared["rejected"]["n_rejected"] == rejected.sum() > 0
    assert not rejected[::10].any()  # of known class


@pytest.mark.parametrize(("lost", "after", "again"), [(1, 5, 2), (0, 20, 1)])
def test_a_lost_rank_ends_all_and_any_number_resumes(features, tmp_path, lost, after, again):
    settings = ["--device", "cpu", "--assignments", "sparse"]
    assert solve(2, features, "--out", tmp_path / "whole", *settings)[0] == [0, 0]
    codes, errors = solve(3, features, "--out", tmp_path / "out", *settings, dies=(lost, after))
    assert codes == [-signal.SIGKILL if rank == lost else REPORTED for rank in range(3)]
    for rank in {0, 1, 2} - {lost}:
        lines = [line for line in errors[rank].splitlines() if line.startswith("error")]
        assert lines == [f"error: rank {lost} ended early; run the same command again to continue"]
    assert not (tmp_path / "out").exists()
    index = json.loads(checkpoint_index(tmp_path / "out").read_text())
    assert 0 < index["step"] < 10
    codes, errors = solve(again, features, "--out", tmp_path / "out", *settings)
    assert codes == [0] * again, errors
    assert not any("begins anew" in text for text in errors)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert hidden(tmp_path) == []


def test_a_rank_with_other_features_is_refused(features, tmp_path):
    other = (1, tmp_path / "other.npz")
    codes, errors = solve(2, features, "--out", tmp_path / "out", other=other)
    assert codes == [REPORTED, REPORTED]
    assert any("arrays: rank 1 has other ones than rank 0" in text for text in errors)
    assert not (tmp_path / "out").exists()
