"""A backbone small enough for tests."""

from __future__ import annotations

import numpy as np
import torch

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


def tiny_backbone():
    """Linear towers, their preprocessing and tokenizer."""
    return Backbone(
        TinyTowers().eval(), preprocess, tokenizer, {"model": "tiny", "weights": "none"}
    )


def padded_tokenizer(texts):
    """The same in a context of 40: an embedding does not depend on the other texts of a batch."""
    return tokenizer([text.ljust(40, "\0") for text in texts])
