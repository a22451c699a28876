"""Options that a command would ignore beside others are refused, in a line that names them."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.cli.conftest import with_shots
from tests.reference import unit

NO_HEAD = "is of a --head, and there is none"
NO_SEARCH = "the graph of --graph is not searched"
NO_FEATURES = "is of FEATURES, and there are none"
NO_PROMPTS = "learns no prompts"
NO_DRAW = "no shots are drawn"
NO_IMAGES = "holds features, and lists no images"


@pytest.mark.parametrize(
    ("command", "unused", "message"),
    [
        ("solve features.npz", "--seed 3", NO_HEAD),
        ("solve features.npz", "--model RN50", NO_HEAD),
        ("solve features.npz --head taskres", "--pretrained openai", "runs no text tower"),
        ("solve features.npz --head head.safetensors", "--seed 3", "is trained already"),
        ("solve features.npz --head head.safetensors", "--support-labels y.npy", "is trained"),
        ("solve features.npz --graph graph", "--search exact", NO_SEARCH),
        ("solve features.npz --graph graph --method stata", "--index Flat", NO_SEARCH),
        ("compare features.npz --methods stata --graph graph", "--recall 0.5", NO_SEARCH),
        ("plan features.npz --graph graph", "--index Flat", NO_SEARCH),
        ("plan --queries 5 --classes 3 --dim 3", "--prior p.npy", NO_FEATURES),
        ("plan --queries 5 --classes 3 --dim 3", "--labels y.npy", NO_FEATURES),
        ("plan --queries 5 --classes 3 --dim 3", "--gamma 0.02", NO_FEATURES),
        ("train-head taskres features.npz", "--position front", NO_PROMPTS),
        ("train-head taskres features.npz", "--rate 1", NO_PROMPTS),
        ("train-head taskres features.npz", "--context 4", NO_PROMPTS),
        ("protocol few-shot features.npz --head taskres", "--epochs 3", "learns prompts"),
        ("evaluate-pairs pairs.safetensors", "--model RN50", NO_IMAGES),
        ("train-map pairs.safetensors", "--attributes words.txt", NO_IMAGES),
        ("solve features.npz --head head.safetensors", "--image-map m.npy", "rows without one"),
        ("compare features.npz --methods stata", "--seed 3", NO_DRAW),
        ("compare features.npz --methods stata --shots 0", "--seed 3", NO_DRAW),
        ("compare caches --methods stata --shots 2", "--seed 3", NO_DRAW),
        ("train-head taskres features.npz", "--device cpu", NO_PROMPTS),
        ("train-head coop features.npz --epochs 1", "--rate 1", "the only epoch is the warm-up"),
        ("evaluate-pairs pairs.safetensors", "--device cpu", NO_IMAGES),
        ("train-map pairs.safetensors", "--device cpu", NO_IMAGES),
    ],
)
def test_it_is_refused(
    command, unused, message, save, arrays, done, refused, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    save(with_shots(arrays, 2))
    pairs = (unit(np.random.default_rng(k).normal(size=(20, 4))) for k in range(3))
    names = ("image_features", "caption_features", "negative_features")
    save_file(dict(zip(names, pairs, strict=True)), "pairs.safetensors")
    (tmp_path / "words.txt").write_text("red\nblue\n")
    if "caches" in command:
        (tmp_path / "caches").mkdir()
        (tmp_path / "caches/test_f.pt").touch()
    if "head.safetensors" in command:
        done("train-head", "taskres", "features.npz", "--out", "head.safetensors")
    if "--graph" in command:
        done("graph", "features.npz", "--out", "graph")
    words = command.split()
    outputs = {"plan": None, "evaluate-pairs": None, "compare": "table.md"}
    output = outputs.get(words[0], "out.safetensors")
    line = refused(*words, *unused.split(), *(["--out", output] if output else []))
    assert line.startswith(f"error: {unused.split()[0]}: ")
    assert message in line
    assert line.endswith("; leave it out\n")
