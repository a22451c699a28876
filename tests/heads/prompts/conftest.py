"""Text towers as open_clip has them, but tiny."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from transclip_fast.encode.models import Backbone
from transclip_fast.heads.prompts import TextTower

LENGTH, WIDTH, DIM = 16, 16, 12
END = SimpleTokenizer(context_length=LENGTH).eot_token_id
VISION = {"image_size": 8, "layers": 1, "width": 64, "patch_size": 4}
NAMES = ["cat", "red fox", "dog", "old oak tree"]
# Where the words "a photo of the" stand around a name, by its position.
WRITTEN = {
    "end": "a photo of the {}.",
    "middle": "a photo {} of the.",
    "front": "{} a photo of the.",
}


def text_config(file):
    """What a model's text tower is made with, shrunk; None where transformers has it."""
    config = json.loads(file.read_text())
    text = config["text_cfg"]
    if "hf_model_name" in text:
        return None
    kept = {name: value for name, value in text.items() if "tokenizer" not in name}
    kept |= {"width": WIDTH, "heads": 2, "layers": 2}
    kept |= {"context_length": LENGTH, "vocab_size": END + 1}
    if "eos_id" in kept:
        kept["eos_id"] = END
    return bool(config.get("custom_text")), "multimodal_cfg" in config, kept


FILES = sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json"))
CONFIGS = {file.stem: found for file in FILES if (found := text_config(file)) is not None}
# One model of each kind of text tower: they differ in more than size.
TOWERS = list({repr(found): name for name, found in reversed(CONFIGS.items())}.values())


def tiny(name="ViT-B-32", dtype=torch.float32, **changes):
    """The tower of a model by that name, with random weights large enough to matter."""
    custom, coca, text = CONFIGS[name]
    torch.manual_seed(0)
    vision, text = dict(VISION), {**text, **changes}
    dim = text["width"] if text.get("proj_type") == "none" else DIM
    if coca:
        vision |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
        decoder = {**{k: text[k] for k in ("width", "heads", "layers")}, "context_length": LENGTH}
        model = open_clip.CoCa(dim, decoder | {"vocab_size": 9}, text, vision)
    else:
        model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(dim, vision, text)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding" in name:  # as large as what the layers add
                parameter.mul_(20)
    model.to(dtype)
    tokenizer = SimpleTokenizer(context_length=text["context_length"])
    identity = {"model": name, "weights": "none"}
    return TextTower(Backbone(model.eval(), lambda image: image, tokenizer, identity))


@pytest.fixture
def tower():
    return tiny()


@pytest.fixture
def tower64():
    return tiny(dtype=torch.float64)
