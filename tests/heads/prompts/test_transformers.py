"""The same of text towers that are transformers' own, as roberta, mt5 and nllb models have them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.heads.prompts.conftest import LENGTH, NAMES, WRITTEN
from transclip_fast.encode.models import Backbone
from transclip_fast.heads.prompts import ContextSettings, TextTower
from transclip_fast.heads.prompts.context import class_prompts, first_context
from transclip_fast.heads.prompts.settings import POSITIONS

START = "a photo of the"
WORDS = [*sorted({word for text in (START, *NAMES) for word in text.split()}), "."]


class Words:
    """A tokenizer of a few words behind a mark of the start, where there is one."""

    def __init__(self, start, end, padding):
        self.start, self.end, self.padding = start, end, padding

    def __call__(self, texts):
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            ids = [5 + WORDS.index(word) for word in text.replace(".", " .").split()]
            row = [*self.start, *ids, self.end]
            rows.append(row + [self.padding] * (LENGTH - len(row)))
        return torch.tensor(rows)


def made(name):
    """A tiny tower of that family, with random weights, inside open_clip's wrapper."""
    transformers = pytest.importorskip("transformers")
    from open_clip.hf_model import HFTextEncoder

    sizes = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    if name == "roberta":
        config = transformers.RobertaConfig(
            **sizes, hidden_size=16, intermediate_size=32, max_position_embeddings=40
        )
        pooler, marks = "mean_pooler", Words([0], 2, 1)
    elif name == "mt5":
        config = transformers.MT5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
        )
        pooler, marks = "mean_pooler", Words([], 1, 0)
    else:
        config = transformers.M2M100Config(
            vocab_size=40,
            d_model=16,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=32,
        )
        pooler, marks = "cls_pooler", Words([3], 2, 1)
    encoder = HFTextEncoder(
        "", output_dim=12, config=config, pooler_type=pooler, proj_type="linear"
    )
    if config.is_encoder_decoder:  # as the wrapper does with models by name
        encoder.transformer = encoder.transformer.get_encoder()
    return TextTower(Backbone(_Model(encoder).eval(), lambda image: image, marks, {}))


class _Model(torch.nn.Module):
    """What is left of open_clip's CustomTextCLIP without an image tower."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def encode_text(self, tokens):
        return self.text(tokens)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", ["roberta", "mt5", "nllb"])
def test_words_as_vectors(name, position):
    tower = made(name)
    written = WRITTEN[position]
    tokens = tower.backbone.tokenizer([written.format(name) for name in NAMES])
    with torch.no_grad():
        expected = F.normalize(tower.backbone.model.encode_text(tokens), dim=1)
    context = first_context(tower, ContextSettings(start=START), len(NAMES), 0)
    prompts = class_prompts(tower, NAMES, len(context), position)
    assert prompts.tokens.shape[1] < LENGTH
    found = tower.encode(prompts, context.requires_grad_())
    torch.testing.assert_close(found.detach(), expected, atol=2e-6, rtol=0)
    found[:, 0].sum().backward()
    assert context.grad.abs().max() > 1e-6
    assert tower.chunk(prompts.tokens.shape[1]) > 1
