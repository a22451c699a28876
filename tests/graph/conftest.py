"""Searches run with both kinds of products, whatever this CPU is fast at."""

import pytest


@pytest.fixture(params=["8 bits", "float32"])
def products(request, monkeypatch):
    in_bytes = request.param == "8 bits"
    monkeypatch.setattr("transclip_fast.ops.scan.has_fast_bytes", lambda: in_bytes)
    monkeypatch.setattr("transclip_fast.graph.compare.MANY", 0)
