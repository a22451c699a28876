"""Backbones: their identity before they are loaded, and their loading."""

from __future__ import annotations

import json
import socket
from argparse import Namespace
from contextlib import nullcontext

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants, get_session
from huggingface_hub.errors import OfflineModeIsEnabled

from transclip_fast.encode.batch_size import fitting_batch_size, random_images
from transclip_fast.encode.models import _hub_cache_only, identify, load_backbone
from transclip_fast.errors import InputError


@pytest.mark.parametrize(
    ("model", "weights", "quick"),
    [
        ("ViT-B-32", "openai", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("ViT-B-32", "none", False),
    ],
)
def test_weights_trained_with_quick_gelu_get_it(model, weights, quick):
    assert identify(model, weights)["quick_gelu"] is quick


def test_the_network_follows_the_weights(monkeypatch):
    created = {}

    def create(name, **options):
        created.update(options)
        raise ValueError("no weights here")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: ["a hub"])
    with pytest.raises(ValueError, match="does not load"):
        load_backbone("ViT-B-32", "openai", torch.device("cpu"))
    assert created["force_quick_gelu"] is True


def test_random_weights_are_always_the_same():
    first, second = (load_backbone("ViT-S-32", "none", torch.device("cpu")) for _ in range(2))
    image = torch.ones(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(first.model.encode_image(image), second.model.encode_image(image))
    assert first.dim == 384
    assert not first.model.training


@pytest.mark.parametrize("cached", [True, False])
def test_the_hub_is_asked_only_for_what_is_not_in_its_cache(monkeypatch, cached):
    create, offline = open_clip.create_model_and_transforms, []

    def create_from_hub(name, **options):
        offline.append(constants.HF_HUB_OFFLINE)
        if offline == [True] and not cached:
            raise FileNotFoundError("not in the cache")
        return create(name, **{**options, "pretrained": None})

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create_from_hub)
    before = constants.HF_HUB_OFFLINE
    load_backbone("ViT-S-32", "none", torch.device("cpu"))
    assert offline == ([True] if cached else [True, before])
    assert before == constants.HF_HUB_OFFLINE


def test_the_hub_can_be_asked_after_its_cache(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    errors = []
    for block in (_hub_cache_only(), nullcontext()):
        with block:
            try:
                get_session().get("http://127.0.0.1:9")
            except Exception as error:  # noqa: BLE001 - whatever the library for HTTP raises
                errors.append(isinstance(error, OfflineModeIsEnabled))
    assert errors[:1] == [True]
    assert True not in errors[1:]


def saved(tmp_path, wrap, name="tuned.pt"):
    """A checkpoint of random weights as training scripts write it; its tensors."""
    draw = torch.Generator().manual_seed(3)
    net = open_clip.create_model("small-clip")
    weights = {k: torch.randn(v.shape, generator=draw) / 9 for k, v in net.state_dict().items()}
    torch.save(wrap(weights), tmp_path / name)
    return weights


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in weights.items()}},
        lambda weights: {"model": {f"clip_model.{k}": v for k, v in weights.items()}, "step": 1},
        lambda weights: {
            "model": {"state_dict": {f"module._orig_mod.{k}": v for k, v in weights.items()}}
        },
        lambda weights: {k: v for k, v in weights.items() if k != "logit_scale"},
        lambda weights: weights | {"input_resolution": torch.tensor(224)},
    ],
)
def test_checkpoints_of_training_scripts(small, tmp_path, wrap):
    weights = saved(tmp_path, wrap)
    backbone = load_backbone("small-clip", str(tmp_path / "tuned.pt"), torch.device("cpu"))
    for name, tensor in backbone.model.state_dict().items():
        assert name == "logit_scale" or torch.equal(tensor, weights[name])


def trained(net_weights):
    """What an optimizer keeps of these weights; open_clip's schedule makes its rates NumPy's."""
    weight = torch.nn.Parameter(net_weights["text_projection"].clone())
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5 * (1 + np.cos(np.pi / 3)) * 1e-6
    return optimizer.state_dict()


PUBLISHED = {
    "NegCLIP": lambda weights: {
        "epoch": 5,
        "name": "negclip_256_1e-6",
        "state_dict": weights,
        "optimizer": trained(weights),
        "scaler": {"scale": 65536.0, "_growth_tracker": 7},
    },
    "CLIP-KD": lambda weights: {
        "epoch": 32,
        "state_dict": {f"module.{name}": tensor for name, tensor in weights.items()},
        "optimizer": trained(weights),
        "best": np.array([np.float32(42.1)]),
    },
    "CoN-CLIP": lambda weights: {
        "model": weights,
        "optimizer": trained(weights),
        "args": Namespace(learning_rate=1e-6, experiment_name="conclip_b32"),
    },
    "NegationCLIP": lambda weights: {name: tensor.float() for name, tensor in weights.items()},
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_as_they_are_published(small, tmp_path, name, zipped):
    """With the optimizer and the options of the training beside the weights."""
    net = open_clip.create_model("small-clip")
    weights = {name: tensor + 0.25 for name, tensor in net.state_dict().items()}
    file = tmp_path / f"{name}.pt"
    torch.save(PUBLISHED[name](weights), file, _use_new_zipfile_serialization=zipped)
    backbone = load_backbone("small-clip", str(file), torch.device("cpu"))
    loaded = backbone.model.state_dict()
    assert loaded.keys() == weights.keys()
    for tensor in weights:
        assert torch.equal(loaded[tensor], weights[tensor])


def test_a_distilled_student_is_a_folder(tmp_path):
    """CLIP-KD's own architectures: a network of timm beside a small text tower."""
    config = {
        "embed_dim": 12,
        "vision_cfg": {
            "timm_model_name": "test_resnet",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 32,
        },
        "text_cfg": {"context_length": 77, "width": 32, "heads": 2, "layers": 2},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    net = open_clip.CLIP(**config).eval()
    torch.save(PUBLISHED["CLIP-KD"](net.state_dict()), tmp_path / "epoch_32.pt")
    backbone = load_backbone(str(tmp_path), None, torch.device("cpu"))
    image, tokens = torch.ones(1, 3, 32, 32), backbone.tokenizer(["a cat"])
    with torch.inference_mode():
        assert torch.equal(backbone.model.encode_image(image), net.encode_image(image))
        assert torch.equal(backbone.model.encode_text(tokens), net.encode_text(tokens))


class Marks:
    """Makes a file if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_other_objects_beside_the_weights_are_refused(small, tmp_path, zipped):
    mark = tmp_path / "mark"
    content = {"state_dict": {"a": torch.ones(1)}, "args": Namespace(hook=Marks(mark))}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="pickled Python objects, which are never loaded"):
        load_backbone("small-clip", str(tmp_path / "w.pt"), torch.device("cpu"))
    assert not mark.exists()


@pytest.mark.parametrize("beside", [np.float64(1), np.ones(2), Namespace(lr=1)])
def test_what_stands_beside_the_weights_is_no_weight(small, tmp_path, beside):
    torch.save({"state_dict": {"logit_scale": beside}}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="expected a tensor"):
        load_backbone("small-clip", str(tmp_path / "w.pt"), torch.device("cpu"))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_file_gives_what_open_clip_gives(small, tmp_path, precision):
    """Types, outputs and preprocessing are those of open_clip's own loading."""
    saved(tmp_path, lambda weights: weights)
    path = str(tmp_path / "tuned.pt")
    backbone = load_backbone("small-clip", path, torch.device("cpu"), precision)
    net, _, preprocess = open_clip.create_model_and_transforms(
        "small-clip", pretrained=path, precision=precision
    )
    net.eval()
    types = {name: tensor.dtype for name, tensor in net.state_dict().items()}
    assert {n: t.dtype for n, t in backbone.model.state_dict().items()} == types
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = backbone.tokenizer(["a cat", "a dog"])
    with torch.inference_mode():
        assert torch.equal(
            backbone.model.encode_image(image.to(backbone.dtype)),
            net.encode_image(image.to(backbone.dtype)),
        )
        assert torch.equal(backbone.model.encode_text(tokens), net.encode_text(tokens))
    assert backbone.identity["preprocessing"] == open_clip.get_model_preprocess_cfg(net)
    assert str(backbone.preprocess) == str(preprocess)
    assert backbone.identity["precision"] == precision


def a_folder(tmp_path, **preprocess):
    """A model as a folder: configuration and weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_cfg": open_clip.get_model_config("small-clip"), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_with_its_configuration(small, tmp_path):
    folder = a_folder(tmp_path, mean=[0.5] * 3, std=[0.25] * 3, resize_mode="squash")
    weights = saved(folder, lambda weights: weights, "open_clip_pytorch_model.bin")
    backbone = load_backbone(str(folder), None, torch.device("cpu"))
    assert torch.equal(backbone.model.state_dict()["visual.proj"], weights["visual.proj"])
    assert backbone.identity["preprocessing"]["mean"] == [0.5] * 3
    assert backbone.identity["preprocessing"]["resize_mode"] == "squash"
    first = identify(str(folder), None)
    folder.rename(tmp_path / "elsewhere")
    assert identify(str(tmp_path / "elsewhere"), None) == first


def test_folders_that_are_none(small, tmp_path):
    folder = a_folder(tmp_path)
    with pytest.raises(InputError, match="holds no checkpoints"):
        identify(str(folder), None)
    for name in ("a.pt", "b.pt"):
        (folder / name).write_bytes(b"")
    with pytest.raises(InputError, match="holds several checkpoints"):
        identify(str(folder), None)
    (folder / "a.pt").unlink()
    (folder / "b.pt").unlink()
    (tmp_path / "outside.pt").write_bytes(b"")
    (folder / "a.pt").symlink_to(tmp_path / "outside.pt")
    with pytest.raises(InputError, match="leads out of"):
        identify(str(folder), None)
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(InputError, match="has no vision_cfg and text_cfg"):
        load_backbone(str(folder), "none", torch.device("cpu"))
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(InputError, match="has no open_clip_config.json"):
        identify(str(folder), None)


def test_a_name_needs_weights(small):
    with pytest.raises(InputError, match="needs --pretrained"):
        identify("small-clip", None)


def test_a_compiled_tower_sees_whole_batches(small, monkeypatch):
    seen = []

    def compile_(function, dynamic):
        assert dynamic is False

        def compiled(images):
            seen.append(len(images))
            return function(images)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    device = torch.device("cpu")
    compiled = load_backbone("small-clip", "none", device, "fp32", True)
    plain = load_backbone("small-clip", "none", device)
    images = random_images(plain, 3)
    with torch.inference_mode():
        torch.testing.assert_close(compiled.embed(images, 8), plain.embed(images, 8))
    assert seen == [8]
    assert compiled.identity == {**plain.identity, "compiled": True}


def test_a_cpu_takes_the_usual_batch(small):
    backbone = load_backbone("small-clip", "none", torch.device("cpu"))
    assert fitting_batch_size(backbone, 4096) == 16
    assert fitting_batch_size(backbone, 10) == 10


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("text_cfg", "context_length", 50_000),
        ("text_cfg", "layers", 10**6),
        ("text_cfg", "heads", 0),
        ("text_cfg", "vocab_size", -1),
        ("vision_cfg", "image_size", 10**6),
        ("vision_cfg", "image_size", [32, 10**6]),
        ("vision_cfg", "width", "64"),
        ("vision_cfg", "patch_size", True),
        ("preprocess_cfg", "mean", None),
        ("preprocess_cfg", "mean", [0.5, 0.5]),
        ("preprocess_cfg", "mean", [0.5, 0.5, None]),
        ("preprocess_cfg", "std", [0.5, 0.5, 0]),
        ("preprocess_cfg", "std", [0.5, 0.5, float("nan")]),
        ("preprocess_cfg", "interpolation", "lanczos"),
        ("preprocess_cfg", "resize_mode", ["shortest"]),
    ],
)
def test_values_of_a_folder_that_cannot_be(part, name, value, small, tmp_path):
    parts = {**open_clip.get_model_config(small), "preprocess_cfg": {}}
    parts[part] = {**parts[part], name: value}
    preprocessing = parts.pop("preprocess_cfg")
    config = {"model_cfg": parts, "preprocess_cfg": preprocessing}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"open_clip_config\.json: {name} (is|has) "):
        load_backbone(str(tmp_path), "none", torch.device("cpu"))


@pytest.mark.parametrize(("side", "patch"), [(512, 1), ([512, 256], 1), ([256, 512], [1, 1])])
def test_more_patches_than_an_image_can_have(side, patch, small, tmp_path):
    config = open_clip.get_model_config(small)
    config["vision_cfg"] |= {"image_size": side, "patch_size": patch}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"an image of .* pixels has too many patches of "):
        load_backbone(str(tmp_path), "none", torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "length", "expected"),
    [
        (
            "visual.positional_embedding",
            10,
            "visual.positional_embedding (10, 64), not (5, 64); its images are of another size: "
            "name the model of that size",
        ),
        (
            "positional_embedding",
            248,
            "positional_embedding (248, 32), not (77, 32); its texts are of another length: name "
            "the model of that size",
        ),
    ],
)
def test_positions_of_another_size_are_refused(name, length, expected, small, weights, save):
    load_backbone(small, save(weights), torch.device("cpu"))
    longer = weights[name].repeat(4, 1)[:length]
    file = save({**weights, name: longer}, "longer.safetensors")
    with pytest.raises(InputError) as error:
        load_backbone(small, file, torch.device("cpu"))
    assert str(error.value) == (
        f"{file}: is not a checkpoint of this model: it has in other shapes {expected}"
    )
