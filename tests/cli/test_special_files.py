"""FIFOs, devices, odd paths and outputs that cannot be written: one line and exit code 2."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest


@pytest.fixture(autouse=True)
def _no_endless_wait():
    """A read of a FIFO that nobody writes would wait for ever."""

    def stop(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)


@pytest.fixture
def refused_unread(cli):
    """Run a command that must refuse a file that is none; contents are not compared."""

    def run(*args):
        ran = cli(*args)
        assert ran.code == 2
        assert ran.err.startswith("error: ")
        assert ran.err.count("\n") == 1
        return ran.err

    return run


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "img_emb/img_emb_00000.npy", "metadata/metadata_00000.parquet",
     "prototypes.npy"],
)  # fmt: skip
def test_fifos_in_a_folder(name, folder, refused_unread, tmp_path):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert name in refused_unread("solve", folder, "--out", tmp_path / "result")


FILES = [
    "--labels x.csv", "--labels x.txt", "--labels x.npy", "--labels x.parquet",
    "--class-names x.json", "--class-names x.txt", "--class-names x.parquet", "--prior x.npz",
    "--text-features x.npy", "--head x.safetensors", "--text-map x.npy", "--graph x",
    "--index x.index",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["fifo", "zero"])
@pytest.mark.parametrize("options", FILES)
def test_what_is_no_regular_file(kind, options, save, arrays, refused_unread, tmp_path):
    option, name = options.split()
    file = tmp_path / name
    if name == "x":
        file.mkdir()
        file = file / "manifest.json"
    if kind == "fifo":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    out = tmp_path / "result"
    assert name in refused_unread("solve", save(arrays), option, tmp_path / name, "--out", out)


def test_features_that_are_a_fifo(refused_unread, tmp_path):
    os.mkfifo(tmp_path / "x.npz")
    assert "x.npz" in refused_unread("solve", tmp_path / "x.npz", "--out", tmp_path / "result")


def test_names_that_are_not_text_are_shown_escaped(save, arrays, tmp_path):
    """The shell may give any bytes as a path."""
    out = os.fsencode(tmp_path) + b"/r\xff"
    ran = command_line("solve", save(arrays), "--out", out, "--head", b"\xe9.safetensors")
    assert (ran.returncode, ran.stderr.count(b"\n")) == (2, 1)
    features = save(arrays)
    for words, folder in ((["solve"], out), (["predict", out], out + b"2")):
        ran = command_line(*words, features, "--out", folder)
        assert ran.returncode == 0, ran.stderr
        assert b"r\\udcff" in ran.stdout
        assert os.path.isfile(folder + b"/predictions.parquet")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_output_that_cannot_be_written(options, save, arrays, tmp_path):
    with open("/dev/full", "wb") as full:
        ran = command_line("solve", save(arrays), "--out", tmp_path / "r", *options, stdout=full)
    expected = b"error: standard output: cannot be written (No space left on device)\n"
    assert (ran.returncode, ran.stderr) == (2, expected)


def command_line(*args, stdout=subprocess.PIPE):
    command = [sys.executable, "-m", "transclip_fast.cli", *args]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, check=False)
