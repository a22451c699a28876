"""Small problems; threads that wait for each other cost most of the time on a busy machine."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    pass
