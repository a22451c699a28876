"""A small CLIP and its weights."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small CLIP that open_clip knows by name."""
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
        "text_cfg": {"width": 32, "heads": 2, "layers": 2},
    }
    file = tmp_path_factory.mktemp("configs") / "small-clip.json"
    file.write_text(json.dumps(config))
    open_clip.add_model_config(file)
    return "small-clip"


@pytest.fixture
def weights(small):
    """Random weights of the small CLIP."""
    draw = torch.Generator().manual_seed(3)
    like = open_clip.create_model("small-clip").state_dict()
    return {name: torch.randn(t.shape, generator=draw) / 9 for name, t in like.items()}


@pytest.fixture
def save(tmp_path):
    """Writer of a checkpoint; returns its path."""

    def write(tensors, name="w.safetensors"):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name)
        return str(tmp_path / name)

    return write


def draw_image(file, seed, size=(12, 10)):
    """An image of noise; one of another seed and the same size takes as many bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)


@pytest.fixture
def photos(tmp_path):
    """A folder of seven bitmaps, of equal sizes, 00.bmp, 10.bmp .. 60.bmp."""
    for k in range(7):
        draw_image(tmp_path / f"photos/{k}0.bmp", k)
    return tmp_path / "photos"
