"""The problems of `bench.accuracy.heads`: real features, whose parts are disjoint."""

from __future__ import annotations

import numpy as np
import pytest

from bench.accuracy import heads


@pytest.mark.parametrize("name", heads.SETS)
def test_problems(name, golden_dir):
    arrays = heads.load(golden_dir / f"{name}.npz")
    n_classes = len(arrays["text_features"])
    parts = {"image": arrays["labels"]}
    for part, shots in (("support", 16), ("validation", 4)):
        parts[part] = arrays[f"{part}_labels"]
        assert (np.bincount(parts[part]) == shots).all()
    seen = set()
    for part, labels in parts.items():
        rows = arrays[f"{part}_features"]
        assert len(rows) == len(labels) > 0
        assert labels.max() < n_classes
        unique = {row.tobytes() for row in rows}
        assert len(unique & seen) <= 0.01 * len(rows)  # DTD has some images twice
        seen |= unique
    zero_shot = (arrays["image_features"] @ arrays["text_features"].T).argmax(1)
    assert 0.5 < (zero_shot == arrays["labels"]).mean() < 0.9


def test_a_head_far_from_its_plain_fit_fails(monkeypatch, tmp_path, golden_dir):
    monkeypatch.setattr(heads, "record", lambda *_: None)
    monkeypatch.setenv("TRANSCLIP_GOLDEN", str(golden_dir))
    chosen = ["--sets", "whurs19_clip_vit-b-32", "--heads", "prompt-ensemble"]
    assert heads.main(chosen) == 0
    monkeypatch.setattr(heads, "fit_plainly", lambda _, arrays: -np.eye(19)[arrays["labels"]])
    assert heads.main(chosen) == 1
