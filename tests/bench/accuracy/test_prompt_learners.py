"""The data of `bench.accuracy.prompt_learners`: unseen images under meaningless names."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bench import tables
from bench.accuracy import prompt_learners
from bench.names import LEARNERS, NAMINGS
from transclip_fast.demo import CLASS_NAMES, backbone, digits, training_hashes
from transclip_fast.demo.data import image_hash


@pytest.fixture(scope="module")
def demo():
    return backbone()


def test_nobody_has_seen_the_queries():
    images, labels = digits()
    for seed in range(prompt_learners.SEEDS):
        drawn, held_out = prompt_learners.split(labels, seed)
        assert np.bincount(labels[drawn]).tolist() == [prompt_learners.SHOTS] * 10
        assert sorted([*drawn, *held_out]) == list(range(len(labels)))
        seen = {image_hash(image) for image in images[drawn]} | training_hashes()
        assert not seen & {image_hash(image) for image in images[held_out]}


@pytest.mark.parametrize("naming", prompt_learners.NAMINGS)
def test_zero_shot_cannot_use_the_names(naming, demo):
    names = prompt_learners.NAMINGS[naming]
    assert len(set(names)) == 10
    assert not any(own == other for own, other in zip(CLASS_NAMES, names, strict=True))
    data = prompt_learners.load(demo, per_class=10)
    text = prompt_learners.zero_shot_texts(demo, names)
    right = ((data.rows @ text.T).argmax(1).numpy() == data.labels).mean()
    assert right < 0.25


def test_one_learner(demo, monkeypatch):
    monkeypatch.setattr(prompt_learners, "SHOTS", 4)
    data = prompt_learners.load(demo, per_class=8)
    assert data.crops.shape == (80, 4, 512)
    row = prompt_learners.measure("plot-crops", "words", demo, data, seeds=1)
    assert row["queries"] == 40
    assert row["alone"][0] > row["zero_shot"][0]


def test_a_learner_that_does_not_beat_zero_shot_fails(monkeypatch):
    rows = {
        "zero_shot": [10.0, 10.0],
        "alone": [50.0, 60.0],
        "with_transclip": [0.0],
        "seconds": [0],
    }
    images = prompt_learners.Data(torch.eye(2, 512), torch.ones(2, 4, 512), np.arange(2))
    monkeypatch.setattr(prompt_learners, "load", lambda _: images)
    monkeypatch.setattr(prompt_learners, "record", lambda *_: None)
    monkeypatch.setattr(prompt_learners, "measure", lambda *_: rows)
    chosen = ["--namings", "words", "--learners", "coop"]
    assert prompt_learners.main(chosen) == 0
    rows["alone"] = [50.0, 10.0]
    assert prompt_learners.main(chosen) == 1


def test_the_table(tmp_path):
    machine = {"cpu": "a CPU", "cores": 2, "memory_gb": 8.0, "gpu": None, "python": "3.11"}
    machine |= {"torch": "2.15", "commit": "abcdef123456", "dirty": False}
    lines = [
        {
            "date": "2026-01-01", "command": "x", "machine": machine, "learner": learner,
            "naming": naming, "shots": 16, "queries": 732, "own_names": 96.08,
            "zero_shot": [10.0, 11.0], "alone": [80.0, 82.0], "with_transclip": [90.0, 90.0],
        }
        for learner in reversed(LEARNERS)
        for naming in NAMINGS
    ]  # fmt: skip
    (tmp_path / "prompt_learners.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = tables.prompt_learners(tmp_path).splitlines()
    assert "Accuracy on 732 digits, mean and deviation over 2 draws of 16 shots" in found[0]
    assert found[4] == "| other words | CoOp | 10.50 ± 0.71 | 81.00 ± 1.41 | 90.00 ± 0.00 |"
    assert len(found) == 4 + 12 + 2
