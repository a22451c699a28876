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


def text_configs():
    """The text towers of open_clip's models that differ in more than size, by one model's name."""
    found = {}
    folder = Path(open_clip.__file__).parent / "model_configs"
    for file in sorted(folder.glob("*.json")):
        config = json.loads(file.read_text())
        text = config["text_cfg"]
        if "hf_model_name" in text:
            continue
        kept = {name: value for name, value in text.items() if "tokenizer" not in name}
        kept |= {"width": WIDTH, "heads": 2, "layers": 2}
        kept |= {"context_length": LENGTH, "vocab_size": END + 1}
        if "eos_id" in kept:
            kept["eos_id"] = END
        kind = (
            bool(config.get("custom_text")),
            "multimodal_cfg" in config,
            repr(sorted(kept.items())),
        )
        found.setdefault(kind, (file.stem, kept))
    return {name: (*kind[:2], text) for kind, (name, text) in found.items()}


CONFIGS = text_configs()


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
        for parameter in model.parameters():
            parameter.mul_(3)
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
