"""Manifests of feature folders that no encode has written are refused."""

from __future__ import annotations

import json

import pytest

from tests.encode.test_growth import encode
from transclip_fast.errors import InputError


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("threads", 0), ("threads", -1), ("threads", 10**9), ("threads", True), ("threads", "1"),
        ("batch_size", 0), ("batch_size", 2.0), ("shard_rows", -3), ("shard_rows", None),
    ],
)  # fmt: skip
def test_settings_in_a_manifest_that_cannot_be(entry, value, photos, backbone, tmp_path):
    encode(photos, backbone, tmp_path / "out")
    file = tmp_path / "out/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["config"][entry] = value
    file.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=rf"manifest\.json: {entry} is "):
        encode(photos, backbone, tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        {"rows": -1}, {"rows": "3"}, {"failures": [[0, "a"]]}, {"failures": {}},
        {"features_sha256": 3}, {"batch_size": 0}, {"metadata_sha256": []},
    ],
)  # fmt: skip
def test_shards_in_a_manifest_that_cannot_be(change, photos, backbone, tmp_path):
    encode(photos, backbone, tmp_path / "out")
    file = tmp_path / "out/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["shards"]["1"] |= change
    file.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json: "):
        encode(photos, backbone, tmp_path / "out")
