"""Commands as torchrun starts them: one result for any number of ranks, whoever is lost."""

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
from transclip_fast.cli import graph, main, solution
from transclip_fast.graph import exact, list_search

REPORTED = 2
CHECKPOINTS = {"graph": "search", "solve": "solve-0"}
FILES = ("predictions.parquet", "predictions.csv", "mixture.safetensors")
GRAPH = ("neighbors.npy", "similarities.npy")


@pytest.fixture
def features(tmp_path):
    """A file of five parts of rows, some of known class."""
    image, text, labels = make_problem(n=2100, k=9, noise=0.06)
    known = np.where(np.arange(2100) % 10 == 0, labels, -1)
    arrays = {"image_features": image, "text_features": text, "labels": labels}
    np.savez(tmp_path / "features.npz", **arrays, known_labels=known)
    np.savez(tmp_path / "other.npz", **arrays | {"image_features": image[::-1].copy()})
    return tmp_path / "features.npz"


def solve(size, *arguments, **faults):
    return start(size, "solve", *arguments, **faults)


def start(size, command, *arguments, dies=None, other=None):
    """
    Exit codes of so many ranks that run a command, and what they wrote to standard error.

    `dies` are a rank and the number of its broadcasts since the first checkpoint after which
    SIGKILL ends it; `other` are a rank and the file that it has instead.
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    (told, written) = zip(*(os.pipe() for _ in range(size)), strict=True)
    ranks = [
        context.Process(
            target=run, args=(r, size, port, written[r], command, arguments, dies, other)
        )
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


def checkpoint_index(out, command="solve"):
    return out.with_name(f".{out.name}.{CHECKPOINTS[command]}.ranks.index")


def run(rank, size, port, errors, command, arguments, dies, other):
    become(rank, size, port)
    os.dup2(errors, 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    solution.CHECKPOINT_SECONDS = graph.CHECKPOINT_SECONDS = 0
    exact.PANEL_ROWS["cpu"], exact.STEP_ROWS = 64, 128  # so that a search has several rounds
    list_search.BLOCK_PRODUCTS, list_search.BATCH_BLOCKS = 1 << 12, 8
    if dies and dies[0] == rank:
        broadcast, left = torch.distributed.broadcast, [dies[1]]
        saved = checkpoint_index(arguments[arguments.index("--out") + 1], command)

        def counted(*values):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= saved.exists()
            return broadcast(*values)

        torch.distributed.broadcast = counted
    file = other[1] if other and other[0] == rank else arguments[0]
    sys.argv = ["transclip-fast", command, str(file), *map(str, arguments[1:]), "--json"]
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        main()
    except SystemExit as end:
        sys.stderr.flush()
        os._exit(end.code or 0)
    os._exit(0)


def contents(folder, names=FILES):
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


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


@pytest.mark.parametrize("search", ["exact", "faiss"])
def test_a_graph_over_ranks_is_that_of_one(features, tmp_path, search):
    """Also where ranks have no rows: there are five parts."""
    settings = ["--search", search, "--device", "cpu"]
    for size in (1, 7):
        codes, errors = start(size, "graph", features, "--out", tmp_path / f"{size}", *settings)
        assert codes == [0] * size, errors
    assert contents(tmp_path / "1", GRAPH) == contents(tmp_path / "7", GRAPH)
    assert hidden(tmp_path) == []
    manifests = [json.loads((tmp_path / f"{n}/manifest.json").read_text()) for n in (1, 7)]
    for manifest in manifests:
        del manifest["seconds"]
    assert manifests[0] == manifests[1]


def test_a_solve_searches_the_graph_that_it_is_not_given(features, tmp_path):
    assert start(2, "graph", features, "--out", tmp_path / "graph", "--device", "cpu")[0] == [0, 0]
    given = ["--graph", tmp_path / "graph", "--device", "cpu"]
    assert solve(2, features, "--out", tmp_path / "given", *given)[0] == [0, 0]
    assert solve(2, features, "--out", tmp_path / "own", "--device", "cpu")[0] == [0, 0]
    assert contents(tmp_path / "given") == contents(tmp_path / "own")
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("search", "lost", "after", "again"), [("exact", 1, 3, 2), ("faiss", 0, 40, 1)]
)
def test_a_search_goes_on_with_any_number_of_ranks(features, tmp_path, search, lost, after, again):
    command = "graph", features, "--search", search, "--device", "cpu", "--out"
    assert start(1, *command, tmp_path / "whole")[0] == [0]
    codes, errors = start(3, *command, tmp_path / "out", dies=(lost, after))
    assert codes == [-signal.SIGKILL if rank == lost else REPORTED for rank in range(3)], errors
    for rank in {0, 1, 2} - {lost}:
        lines = [line for line in errors[rank].splitlines() if line.startswith("error")]
        assert lines == [f"error: rank {lost} ended early; run the same command again to continue"]
    assert not (tmp_path / "out").exists()
    assert checkpoint_index(tmp_path / "out", "graph").exists()
    codes, errors = start(again, *command, tmp_path / "out")
    assert codes == [0] * again, errors
    assert not any("begins anew" in text for text in errors)
    assert contents(tmp_path / "out", GRAPH) == contents(tmp_path / "whole", GRAPH)
    assert hidden(tmp_path) == []


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
