"""A disk that fails where a command reads."""

from __future__ import annotations

import errno
import os

import pytest


@pytest.mark.parametrize("more", [(), ("--by-content",)])
def test_an_image_whose_state_cannot_be_read(more, images, cli, monkeypatch, tmp_path):
    folder, stat = images(4), os.stat

    def fail(path, *args, **kwargs):
        if str(path).endswith("002.png"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", fail)
    model = ("--model", "ViT-S-32", "--pretrained", "none")
    ran = cli("encode", folder, *model, *more, "--out", tmp_path / "out")
    line = f"{folder}/cat/002.png: cannot be read or written (Input/output error)"
    assert (ran.code, ran.err) == (2, f"error: {line}\n")
    assert not (tmp_path / "out").exists()


def test_a_file_is_read_to_know_whether_it_can_be(arrays, save, cli, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # an answer for another user
    assert cli("graph", save(arrays), "--out", tmp_path / "graph").code == 0
