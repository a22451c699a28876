"""EVA-CLIP in open_clip's terms: against plain torch, its names, its sizes, its files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.encode.plain_eva import (
    HEADS,
    PATCH,
    TEXT_HEADS,
    embeddings,
    image_embedding,
    made_checkpoint,
    register_tiny,
    text_embedding,
)
from transclip_fast.encode import eva
from transclip_fast.encode.architectures import network_config
from transclip_fast.encode.models import load_backbone
from transclip_fast.encode.networks import empty_network, match_weights
from transclip_fast.encode.weights import read_checkpoint
from transclip_fast.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["pre", "post"])
def tiny(request, tmp_path_factory):
    """A registered EVA-CLIP of small sizes: its name, and whether norms come last."""
    post = request.param == "post"
    return register_tiny(tmp_path_factory.mktemp("configs"), post), post


@pytest.fixture(scope="module")
def weights():
    return made_checkpoint()


def test_the_network_computes_what_the_description_says(tiny, weights, tmp_path):
    name, post = tiny
    save_file(weights, tmp_path / "official.safetensors")
    backbone = load_backbone(name, str(tmp_path / "official.safetensors"), CPU)
    images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    tokens = backbone.tokenizer(["a photo of a cat", "dog"])
    image, text = embeddings(backbone, images, tokens)
    exact = {name: tensor.double() for name, tensor in weights.items()}
    expected = image_embedding(exact, images.double(), heads=HEADS, patch=PATCH, post_norm=post)
    torch.testing.assert_close(image.double(), expected, atol=1e-5, rtol=0)
    expected = text_embedding(exact, tokens, heads=TEXT_HEADS)
    torch.testing.assert_close(text.double(), expected, atol=1e-5, rtol=0)
    assert expected.abs().max() > 0.1
    assert backbone.dim == 10


def test_preprocessing_is_openais(tiny, weights, tmp_path):
    save_file(weights, tmp_path / "official.safetensors")
    backbone = load_backbone(tiny[0], str(tmp_path / "official.safetensors"), CPU)
    draw = np.random.default_rng(0)
    image = Image.fromarray(draw.integers(0, 256, (40, 70, 3), dtype=np.uint8))
    small = image.resize((49, 28), Image.Resampling.BICUBIC).crop((10, 0, 38, 28))
    expected = np.asarray(small, float).transpose(2, 0, 1) / 255
    mean = np.array([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = np.array([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    got = backbone.preprocess(image)
    np.testing.assert_allclose(got, (expected - mean) / std, atol=1e-5)


@pytest.mark.parametrize(
    ("official", "ours"),
    [
        ("visual.cls_token", "visual.trunk.cls_token"),
        ("visual.blocks.31.mlp.fc1.bias", "visual.trunk.blocks.31.mlp.fc1.bias"),
        ("visual.head.weight", "visual.head.proj.weight"),
        ("text.transformer.resblocks.0.attn.in_proj_weight",) * 2,
        ("text.logit_scale", "logit_scale"),
        ("logit_scale", "logit_scale"),
    ],
)
def test_names(official, ours):
    assert eva.open_clip_name(official) == ours


@pytest.mark.parametrize(
    ("model", "width", "layers", "dim", "billions"),
    [("EVA-CLIP-8B", 4096, 32, 1280, 8.22), ("EVA-CLIP-18B", 5120, 48, 1536, 18.33)],
)
def test_the_large_models_on_the_meta_device(model, width, layers, dim, billions):
    net = empty_network(network_config(model), "bf16")
    parameters = dict(net.named_parameters())
    assert all(parameter.is_meta for parameter in parameters.values())
    assert round(sum(p.numel() for p in parameters.values()) / 1e9, 2) == billions
    assert len(net.visual.trunk.blocks) == layers
    assert parameters["visual.trunk.pos_embed"].shape == (1, 257, width)
    assert parameters["visual.trunk.blocks.0.mlp.fc1.weight"].shape == (5 * width, width)
    assert parameters["visual.trunk.blocks.0.attn.qkv.weight"].dtype == torch.bfloat16
    assert parameters["visual.head.proj.weight"].shape == (dim, width)
    assert "visual.head.proj.bias" not in parameters
    assert net.visual.trunk.blocks[0].attn.num_heads == width // 128
    assert torch.isneginf(net.text.attn_mask[0, 1])  # real, though the parameters are not
    official = [name.replace("visual.trunk.", "visual.") for name in parameters]
    official = [name.replace("head.proj.", "head.") for name in official]
    assert {eva.open_clip_name(name) for name in official} == set(parameters)


def test_what_does_not_fit_is_named(tiny, weights):
    net = empty_network(network_config(tiny[0]))
    changed = dict(weights, extra=torch.zeros(1))
    del changed["visual.norm.weight"]
    changed["text.ln_final.bias"] = torch.zeros(3)
    with pytest.raises(InputError) as error:
        match_weights(net, changed, "file.pt")
    for message in ("file.pt: ", "lacks visual.trunk.norm.weight;", "also has extra;",
                 "text.ln_final.bias (3,), not (16,)"):  # fmt: skip
        assert message in str(error.value)


def test_weights_are_no_view_of_their_file(tiny, weights, tmp_path):
    """A file that is truncated while the network runs changes nothing, and kills no process."""
    save_file(weights, tmp_path / "official.safetensors")
    backbone = load_backbone(tiny[0], str(tmp_path / "official.safetensors"), CPU)
    addresses = {p.data_ptr() for p in backbone.model.parameters()}
    maps = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0] for line in maps if str(tmp_path) in line]
    spans = [tuple(int(end, 16) for end in span.split("-")) for span in ranges]
    assert not any(low <= address < high for low, high in spans for address in addresses)
    images, tokens = torch.ones(2, 3, 28, 28), backbone.tokenizer(["a", "b"])
    before = embeddings(backbone, images, tokens)
    os.truncate(tmp_path / "official.safetensors", 0)
    for after, expected in zip(embeddings(backbone, images, tokens), before, strict=True):
        assert torch.equal(after, expected)


def test_an_index_names_files_beside_it(weights, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for file, message in (
        ("../up.safetensors", "leads out of"),
        ("gone.safetensors", "no such file"),
    ):
        index.write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(InputError, match=message):
            read_checkpoint(index)
    index.write_text("{}")
    with pytest.raises(InputError, match="no weight_map"):
        read_checkpoint(index)


def test_the_shipped_models_are_open_clips():
    eva.register_shipped()
    assert {"EVA-CLIP-8B", "EVA-CLIP-8B-448", "EVA-CLIP-18B"} <= set(open_clip.list_models())


def test_random_weights(tiny):
    """Drawn where they will be, always the same, without a copy in float32."""
    first, again = (load_backbone(tiny[0], "none", CPU, "bf16") for _ in range(2))
    images = torch.ones(2, 3, 28, 28, dtype=torch.bfloat16)
    tokens = first.tokenizer(["a", "b"])
    for ours, other in zip(
        embeddings(first, images, tokens), embeddings(again, images, tokens), strict=True
    ):
        assert torch.equal(ours, other)
        assert ours.isfinite().all()
        assert ours.abs().max() > 0
