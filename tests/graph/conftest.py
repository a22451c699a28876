"""Searches run with both kinds of products, whatever this CPU is fast at."""

import pytest


@pytest.fixture(params=["int8", "float32"])
def products(request, monkeypatch):
    int8 = request.param == "int8"
    monkeypatch.setattr("transclip_fast.graph.products.multiplies_bytes", lambda dim: int8)
    monkeypatch.setattr("transclip_fast.graph.products.INT8_PRODUCTS", 0)
