"""A backbone small enough for tests, and folders of images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from transclip_fast.encode.models import Backbone

SIZE, DIM = 8, 5


class TinyTowers(torch.nn.Module):
    """Linear image and text towers with fixed weights."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.image = torch.nn.Parameter(torch.randn(3 * SIZE * SIZE, DIM, generator=draw))
        self.text = torch.nn.Parameter(torch.randn(128, DIM, generator=draw))

    def encode_image(self, images):
        return images.flatten(1) @ self.image

    def encode_text(self, tokens):
        return self.text[tokens].sum(1)


def preprocess(image):
    """PIL image to tensor (3, SIZE, SIZE) in [0, 1]."""
    small = np.asarray(image.resize((SIZE, SIZE)), np.float32) / 255
    return torch.from_numpy(small).permute(2, 0, 1)


def tokenizer(texts):
    """Character codes, padded with zeros."""
    length = max(map(len, texts))
    return torch.tensor([[ord(c) % 128 for c in text.ljust(length, "\0")] for text in texts])


@pytest.fixture
def backbone():
    return Backbone(
        TinyTowers().eval(), preprocess, tokenizer, {"model": "tiny", "weights": "none"}
    )


@pytest.fixture
def images(tmp_path):
    """Maker of a folder of PNG files in two sub-folders; returns the folder."""

    def make(number=7, seed=0):
        draw = np.random.default_rng(seed)
        for i in range(number):
            file = tmp_path / "images" / ("cat", "dog")[i % 2] / f"{i:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(file)
        return tmp_path / "images"

    return make
