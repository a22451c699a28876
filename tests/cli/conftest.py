"""The command line as a user meets it, and small files to give it."""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import balanced
from transclip_fast.cli import main
from transclip_fast.encode.weights import WatchedFiles
from transclip_fast.store.arrays import file_sha256
from transclip_fast.store.checkpoint import FileCheckpoint

DEEP = "[" * 200_000 + "]" * 200_000  # JSON in which a parser that calls itself gives up


@dataclass(frozen=True)
class Ran:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the command line in this process."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["transclip-fast", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return Ran(stopped.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def succeeds(cli):
    """Run a command that must succeed without a word on standard error; its standard output."""

    def run(*args):
        ran = cli(*args)
        assert (ran.code, ran.err) == (0, "")
        return ran.out

    return run


@pytest.fixture
def done(cli):
    """Run a command that must succeed without a warning, however long it takes; see `succeeds`."""

    def run(*args):
        ran = cli(*args)
        assert ran.code == 0
        assert "warning" not in ran.err  # a slow machine has lines of progress there
        return ran.out

    return run


@pytest.fixture
def refused(cli, tmp_path):
    """Run a command that must refuse its input in one line and leave every file as it was."""

    def run(*args):
        before = contents(tmp_path)
        ran = cli(*args)
        assert ran.code == 2
        assert ran.err.startswith("error: ")
        assert ran.err.count("\n") == 1
        assert ran.err.endswith("\n")
        assert all(line.startswith("plan: ") for line in ran.out.splitlines())
        after = contents(tmp_path).items()
        # A graph that was found is kept for the next time.
        assert {path: x for path, x in after if path.parts[0] != ".result.graph"} == before
        return ran.err

    return run


@pytest.fixture
def tiny(monkeypatch, backbone):
    """Every model name loads the tiny backbone, in the place of one with weights."""
    monkeypatch.setattr("transclip_fast.encode.models.load_backbone", lambda *_, **__: backbone)
    monkeypatch.setattr("transclip_fast.encode.models.identify", lambda *_: backbone.identity)
    monkeypatch.setattr("transclip_fast.encode.models.watch_weights", lambda *_: WatchedFiles({}))
    return ("--model", "tiny", "--pretrained", "openai", "--workers", "0")


@pytest.fixture
def names(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    return tmp_path / "names.txt"


@pytest.fixture
def arrays(problem):
    """A problem as the arrays of a FEATURES file."""
    features, prototypes, labels = problem()
    return {"image_features": features, "text_features": prototypes, "labels": labels}


@pytest.fixture
def save(tmp_path):
    """Write arrays to an .npz file in the test's folder."""

    def write(arrays, name="features.npz"):
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    return write


@pytest.fixture
def accuracy(save, arrays, succeeds, tmp_path):
    """The accuracy of a solve with labels in a file, by default of all arrays."""

    def run(file=None, *options):
        command = "solve", file or save(arrays), *options, "--out", tmp_path / "result", "--json"
        out = succeeds(*command)
        return json.loads(out[out.index("{") :])["accuracy"]

    return run


@pytest.fixture
def folder(tmp_path, arrays):
    """A feature folder with a manifest."""
    folder = tmp_path / "folder"
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    np.save(folder / "img_emb/img_emb_00000.npy", arrays["image_features"])
    np.save(folder / "prototypes.npy", arrays["text_features"])
    metadata = folder / "metadata/metadata_00000.parquet"
    pq.write_table(pa.table({"key": [str(row) for row in range(77)]}), metadata)
    shard = {
        "rows": 77,
        "features_sha256": file_sha256(folder / "img_emb/img_emb_00000.npy"),
        "metadata_sha256": file_sha256(metadata),
        "failures": [],
    }
    manifest = {
        "complete": True,
        "rows": 77,
        "config": {"model": "m", "weights": "w", "quick_gelu": False},
        "prototypes_sha256": file_sha256(folder / "prototypes.npy"),
        "shards": {"0": shard},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def solved(save, arrays, succeeds, tmp_path):
    """A result folder of `arrays`."""
    succeeds("solve", save(arrays), "--out", tmp_path / "result")
    return tmp_path / "result"


@pytest.fixture
def killed(cli, monkeypatch):
    """Run a command that is interrupted right after its n-th state was kept."""

    def run(n, *args):
        keep, left = FileCheckpoint.keep, [n]

        def counted(self, state):
            keep(self, state)
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(FileCheckpoint, "keep", counted)
            assert cli(*args).code == 1

    return run


def contents(folder):
    """Every path below a folder, hidden ones too, with the bytes of files."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def with_shots(arrays, number):
    """The arrays with so many shots of each class, and validation rows."""
    features, labels = arrays["image_features"], arrays["labels"]
    shots = balanced(labels, number)
    return arrays | {
        "support_features": features[shots],
        "support_labels": labels[shots],
        "validation_features": features[20:40],
        "validation_labels": labels[20:40],
    }


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to connect fails the test."""

    def refuse(*arguments):
        raise AssertionError(f"a connection was tried: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
