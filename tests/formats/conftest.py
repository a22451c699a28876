"""The command line, and copies of the folders that earlier versions wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import _one_thread, cli, done  # noqa: F401

V0 = Path(__file__).parent / "v0"


@pytest.fixture
def v0(tmp_path):
    """The folders of commit 5f1950e at a path that their manifests do not know."""
    return Path(shutil.copytree(V0, tmp_path / "moved" / "v0"))
