"""Searches run with both kinds of products, whatever this CPU is fast at."""

import pytest


@pytest.fixture(params=["8 bits", "float32"])
def products(request, monkeypatch):
    in_bytes = request.param == "8 bits"
    monkeypatch.setattr("transclip_fast.graph.compare.multiplies_bytes", lambda dim: in_bytes)
    monkeypatch.setattr("transclip_fast.graph.compare.WORTH", 0)
    monkeypatch.setattr("transclip_fast.graph.compare.MANY", 1)
