"""A small result over real image files, with hostile names everywhere."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny import tiny_backbone
from transclip_fast.cli import main
from transclip_fast.cli.run import solve_folder
from transclip_fast.encode.folder import encode_source
from transclip_fast.encode.sources import open_source
from transclip_fast.encode.text import ClassPrompts
from transclip_fast.estimator import TransCLIP

HOSTILE = (
    "<script>alert(1)</script>.png",  # with a / in it: a folder, and a file
    '"><img src=x>.png',
    "two\nlines.png",
    "\u202egnp.reversed\u202c.png",
    "=cmd().png",
    "@sum.png",
    "'quoted.png",
    "-1 & 2.png",
    " spaces .png",
)
NAMES = (
    "<script>alert(2)</script>",
    '"><img src=y onerror=alert(3)>',
    "=cmd()|'/c calc'!A0",
    "line\nbreak",
    "\u202ereversed",
    "plain",
)


@dataclass(frozen=True)
class Made:
    """A folder with images/, features/, graph/ and result/, and the names in it."""

    folder: Path
    keys: list[str]

    @property
    def result(self):
        return self.folder / "result"


def make_result(folder, n_plain=21):
    """A result of images with hostile and plain names."""
    draw = np.random.default_rng(0)
    for name in (*HOSTILE, *(f"plain/{i:02}.png" for i in range(n_plain))):
        file = folder / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(file)
    return label(folder / "images", folder)


def label(images, folder):
    """Encode and solve images into a folder, as `run` does it."""
    source = open_source(images)
    text = ClassPrompts([*NAMES], [[f"a photo of a {name}"] for name in NAMES], "simple")
    encode_source(source, tiny_backbone(), folder / "features", text)
    solve_folder(folder, TransCLIP(device="cpu"))
    return Made(folder, source.keys)


@pytest.fixture
def cli_in_process(monkeypatch):
    """Run a command that must succeed."""

    def run(*words):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["transclip-fast", *map(str, words)])
            with pytest.raises(SystemExit) as stopped:
                main()
        assert not stopped.value.code

    return run


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """One result that no test changes."""
    return make_result(tmp_path_factory.mktemp("report"))


@pytest.fixture
def made(made_once, tmp_path):
    """A copy of it to change; its images stay where they are."""
    folder = tmp_path / "run"
    shutil.copytree(made_once.folder, folder)
    return Made(folder, made_once.keys)
