"""`encode --local-features`: patches beside images."""

from __future__ import annotations

import json

from tests.encode.test_patches import TEXT, VIT
from transclip_fast.store.features import load_features


def test_patches_beside_images(images, cli, tmp_path):
    (tmp_path / "model").mkdir()
    config = {"model_cfg": {"embed_dim": 12, "vision_cfg": VIT, "text_cfg": TEXT}}
    (tmp_path / "model/open_clip_config.json").write_text(json.dumps(config))
    command = ("encode", images(5), "--model", tmp_path / "model", "--pretrained", "none")
    out = ("--out", tmp_path / "out", "--workers", 0)
    ran = cli(*command, *out, "--local-features", 3)
    random = "warning: the weights are random (--pretrained none): the features mean nothing\n"
    assert (ran.code, ran.err.count(random)) == (0, 1)
    stored = load_features(tmp_path / "out", local=True)
    assert stored.get("local_features").shape == (5, 9 * 12)
    assert cli(*command, *out, "--local-features", 3).out.startswith("0 of 5 images encoded")
    assert "begun with local_features 3, now None" in cli(*command, *out).err
    ran = cli(*command, *out, "--local-features", 3, "--compile")
    assert (ran.code, "drop --compile" in ran.err) == (2, True)
