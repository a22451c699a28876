"""A tiny text tower in float64, written out once more, and a task for prompt learners."""

from __future__ import annotations

import numpy as np
import open_clip
import torch
import torch.nn.functional as F

from transclip_fast.data.labelled_rows import LabelledRows
from transclip_fast.encode.models import Backbone
from transclip_fast.heads.prompts import ContextSettings, Prompting, Schedule, TextTower
from transclip_fast.heads.task import HeadTask

NAMES = ("cat", "grey owl", "elk")
DIM, WIDTH = 32, 16
TAU = 20.0


def tiny_tower(seed=0):
    """A tower of open_clip's with random weights, large enough for what is not linear to show."""
    torch.manual_seed(seed)
    net = open_clip.CLIP(
        DIM,
        {"image_size": 8, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
        {"context_length": 14, "width": WIDTH, "heads": 2, "layers": 2, "vocab_size": 49408},
    )
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            size = 0.3 if "embedding" in name else 1.0 / parameter.shape[-1] ** 0.5
            parameter.data = size * torch.randn(parameter.shape, generator=draw)
    tokenizer = open_clip.SimpleTokenizer(context_length=14)
    identity = {"model": "tiny", "weights": str(seed)}
    return TextTower(Backbone(net.double().eval(), lambda image: image, tokenizer, identity))


def plain_text(tower, name, context):
    """
    The unit embedding (d,) of [context] name. by open_clip's own parts, one prompt, whole length.

    Source: open_clip's CLIP.encode_text, with the embeddings behind the first token replaced.
    """
    net = tower.backbone.model
    tokens = tower.tokenize([" ".join(["a"] * len(context)) + f" {name}."])
    vectors = net.token_embedding(tokens).clone()
    vectors[0, 1 : 1 + len(context)] = context
    found = net.transformer(vectors + net.positional_embedding, attn_mask=net.attn_mask)
    found = net.ln_final(found)[0, tokens[0].argmax()] @ net.text_projection
    return F.normalize(found, dim=0)


def task(tower, n_ctx, *, patches=0, seed=0, epochs=4, batch_size=4, checkpoint=None, start=None):
    """Three classes with four shots each."""
    draw = np.random.default_rng(seed)
    shape = (12, 1 + patches, DIM) if patches else (12, DIM)
    centres = draw.normal(size=(3, *[1] * (len(shape) - 2), DIM))
    rows = centres[np.arange(12) % 3] + 0.5 * draw.normal(size=shape)
    rows = F.normalize(torch.from_numpy(rows).float(), dim=-1)
    shots = LabelledRows(rows, torch.arange(12) % 3)
    more = {} if checkpoint is None else {"checkpoint": checkpoint}
    text = F.normalize(torch.from_numpy(draw.normal(size=(3, DIM))).float(), dim=1)
    prompting = Prompting(
        tower,
        NAMES,
        ContextSettings(n_ctx=n_ctx, start=start),
        Schedule(epochs=epochs, batch_size=batch_size, rate=0.1),
        **more,
    )
    return HeadTask(text, shots, None, TAU, seed, lambda done, of, **figures: None, prompting)


def numerical(loss, parameter, step=1e-5):
    """The gradient of a function of no arguments by central differences, entry by entry."""
    found = torch.zeros_like(parameter)
    flat, out = parameter.data.view(-1), found.view(-1)
    for entry in range(len(flat)):
        kept = float(flat[entry])
        values = []
        for moved in (kept + step, kept - step):
            flat[entry] = moved
            with torch.no_grad():
                values.append(float(loss()))
        flat[entry] = kept
        out[entry] = (values[0] - values[1]) / (2 * step)
    return found


class Killed(Exception):
    """Stands for a signal."""


class Memory:
    """A checkpoint in memory; after `steps` more steps whoever keeps one is killed."""

    def __init__(self, steps=None):
        self.state, self.steps, self.loads = None, steps, 0

    def load(self):
        self.loads += 1
        return self.state

    def keep(self, state):
        self.state = {name: array.copy() for name, array in state().items()}
        if self.steps is not None:
            self.steps -= 1
            if self.steps == 0:
                raise Killed
