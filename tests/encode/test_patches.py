"""Local features: of which towers, what they are, and how they are kept."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from tests.encode.test_encoder import Killed, contents, dying, encode
from transclip_fast.encode.models import Backbone
from transclip_fast.encode.networks import draw_weights, empty_network
from transclip_fast.encode.patches import LocalEncoder
from transclip_fast.encode.pixels import rgb
from transclip_fast.errors import InputError
from transclip_fast.store.features import load_features

TEXT = {"width": 32, "heads": 2, "layers": 1, "context_length": 8}
VIT = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
RESNET = {"image_size": 96, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32}


def network(vision, **more):
    """A network with random weights."""
    net = empty_network({"embed_dim": 12, "vision_cfg": vision, "text_cfg": TEXT, **more})
    draw_weights(net, torch.device("cpu"))
    return net


def pictures(size, number=3):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("vision", "places"), [(VIT, 4), (RESNET, 3)])
@torch.inference_mode()
def test_the_whole_image_is_what_encode_image_gives(vision, places):
    net, images = network(vision), pictures(vision["image_size"])
    local = LocalEncoder.of(net, 7)
    found = local(images)
    assert (local.grid, local.n_patches) == ((places, places), places**2)
    assert found.shape == (3, 1 + places**2, 12)
    assert torch.equal(found[:, 0], net.encode_image(images))


@torch.inference_mode()
def test_patches_of_a_vit_take_the_way_of_its_class_token():
    net, images = network(VIT), pictures(32)
    visual = net.visual
    tokens = visual.transformer(visual._embeds(images))
    expected = visual.ln_post(tokens) @ visual.proj  # (3, 17, 12), class token first
    torch.testing.assert_close(LocalEncoder.of(net, 4)(images), expected)
    coarse = LocalEncoder.of(net, 2)(images)[:, 1:]
    quarters = expected[:, 1:].reshape(3, 2, 2, 2, 2, 12).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(coarse, quarters)


@torch.inference_mode()
def test_places_of_a_resnet_are_asked_as_its_mean_is():
    net, images = network(RESNET), pictures(96)
    visual, pool = net.visual, net.visual.attnpool
    places = images
    for stage in (visual.stem, visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        places = stage(places)
    tokens = places.flatten(2).mT
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + pool.positional_embedding
    expected, _ = F.multi_head_attention_forward(
        *[tokens.transpose(0, 1)] * 3, tokens.shape[-1], pool.num_heads, None,
        torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]), None, None, False, 0.0,
        pool.c_proj.weight, pool.c_proj.bias, training=False, need_weights=False,
        use_separate_proj_weight=True, q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight,
    )  # fmt: skip
    found = LocalEncoder.of(net, 3)(images)
    torch.testing.assert_close(found, expected.transpose(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "vision",
    [
        {**VIT, "attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
        {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "image_size": 32},
    ],
)
def test_towers_without_patches_are_refused(vision):
    net = empty_network({"embed_dim": 12, "vision_cfg": vision, "text_cfg": TEXT})
    with pytest.raises(InputError, match=r"tower of odd gives none, .* leave --local-feat"):
        LocalEncoder.of(net, 7, "odd")
    with pytest.raises(InputError, match="gives none"):
        LocalEncoder.of(torch.nn.Linear(1, 1), 7)


@pytest.fixture
def towers():
    """A backbone with patches, and the same without."""
    net = network(VIT)
    tokenizer = open_clip.SimpleTokenizer(context_length=8)

    def preprocess(image):
        pixels = np.asarray(image.resize((32, 32)), np.float32) / 255
        return torch.from_numpy(pixels).permute(2, 0, 1)

    plain, local = (Backbone(net, preprocess, tokenizer, {"model": "x"}) for _ in range(2))
    local.local = LocalEncoder.of(net, 2)
    return local, plain


def test_a_folder_with_patches(images, towers, tmp_path):
    folder = images(7)
    (folder / "dog/001.png").write_text("no picture")
    for backbone, out in zip(towers, ("local", "plain"), strict=True):
        encode(folder, backbone, tmp_path / out)
    local, plain = contents(tmp_path / "local"), contents(tmp_path / "plain")
    assert local.keys() - plain.keys() == {f"local_emb/local_emb_0000{k}.npy" for k in range(3)}
    assert all(local[name] == plain[name] for name in plain if name != "manifest.json")
    stored = load_features(tmp_path / "local", local=True)
    patches = np.asarray(stored.get("local_features"))
    assert patches.dtype == np.float16
    keys = stored.keys
    with torch.inference_mode():
        for row, key in zip(patches, keys, strict=True):
            picture = towers[0].preprocess(rgb((folder / key).read_bytes()))
            expected = F.normalize(towers[0].local(picture[None])[0, 1:], dim=1)
            np.testing.assert_allclose(row.reshape(4, 12), expected, atol=1e-3)
    assert load_features(tmp_path / "local").get("local_features") is None
    assert load_features(tmp_path / "plain", local=True).get("local_features") is None


@pytest.mark.parametrize("batches", [1, 3])
def test_an_interrupted_run_ends_in_the_same_bytes(images, towers, tmp_path, monkeypatch, batches):
    folder = images(7)
    encode(folder, towers[0], tmp_path / "whole")
    left = dying(monkeypatch, batches)
    with pytest.raises(Killed):
        encode(folder, towers[0], tmp_path / "resumed")
    left[0] = 99
    with pytest.raises(InputError, match=r"begun with local_features 2, now None"):
        encode(folder, towers[1], tmp_path / "resumed")
    encode(folder, towers[0], tmp_path / "resumed")
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def test_a_damaged_shard_is_encoded_again(images, towers, tmp_path):
    folder = images(7)
    encode(folder, towers[0], tmp_path / "out")
    whole = contents(tmp_path / "out")
    (tmp_path / "out/local_emb/local_emb_00001.npy").write_bytes(b"")
    with pytest.raises(InputError, match="local_emb_00001.npy"):
        load_features(tmp_path / "out", local=True)
    encode(folder, towers[0], tmp_path / "out")
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "local_emb_00001.npy").unlink(), "shard 1 has no local_emb file"),
        (lambda f: np.save(f / "local_emb_00001.npy", np.ones((2, 48))), "has shape"),
        (lambda f: np.save(f / "local_emb_00001.npy", np.ones((3, 47))), "has shape"),
        (
            lambda f: np.save(f / "local_emb_00001.npy", np.ones((3, 48))),
            "differs from its manifest",
        ),
    ],
)
def test_patches_that_do_not_fit(change, message, images, towers, tmp_path):
    encode(images(7), towers[0], tmp_path / "out")
    change(tmp_path / "out/local_emb")
    with pytest.raises(InputError, match=message):
        load_features(tmp_path / "out", local=True)


def test_arrays_of_a_file(tmp_path):
    arrays = {"image_features": np.ones((3, 4)), "local_features": np.ones((3, 5, 4))}
    np.savez(tmp_path / "x.npz", **arrays)
    assert load_features(tmp_path / "x.npz", local=True).get("local_features").shape == (3, 5, 4)
    assert load_features(tmp_path / "x.npz").get("local_features") is None
