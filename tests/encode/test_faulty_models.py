"""Models that would give wrong features without a word: refused, or a warning."""

from __future__ import annotations

import json
import logging
import socket
import sys
import types
import warnings

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import LocalEntryNotFoundError

from tests.encode.test_encoder import encode
from tests.encode.test_models import a_folder
from transclip_fast.encode.architectures import network_config, preprocessing_of, tokenizer_of
from transclip_fast.encode.folder import encode_images
from transclip_fast.encode.models import identify, load_backbone
from transclip_fast.encode.text import ClassPrompts, encode_text
from transclip_fast.encode.weights import read_checkpoint
from transclip_fast.errors import InputError
from transclip_fast.store.features import load_features

CPU = torch.device("cpu")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["visual.proj", "logit_scale"])
def test_weights_that_are_not_finite_are_refused(weights, save, name, value):
    weights[name].view(-1)[0] = value
    with pytest.raises(InputError, match=f"w.safetensors: weight {name} has values that are not"):
        load_backbone("small-clip", save(weights), CPU)


def test_weights_too_large_for_fp16_stop_at_the_first_shard(weights, save, images, tmp_path):
    """In bf16 the same weights are fine."""
    weights["visual.proj"] *= 1e6
    options = {"model": "small-clip", "pretrained": save(weights), "device": "cpu", "workers": 0}
    folder = images(7)
    message = "cat/000.png: its embedding is not finite in fp16; give --precision bf16 or fp32"
    with pytest.raises(InputError, match=message):
        encode_images(folder, tmp_path / "fp16", precision="fp16", shard_rows=3, **options)
    with pytest.raises(InputError, match="is not finished"):
        load_features(tmp_path / "fp16")
    files = list((tmp_path / "fp16").rglob("*.npy"))
    assert len(files) == 1  # of seven images in shards of three
    assert np.load(files[0]).shape == (0, 12)
    assert encode_images(folder, tmp_path / "bf16", precision="bf16", **options).n_rows == 7


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_one_embedding_that_is_not_finite_is_named(images, backbone, tmp_path, value):
    good = backbone.model.encode_image

    def odd(batch):
        embedded = good(batch).clone()
        embedded[batch.flatten(1).sum(1) == bad] = value
        return embedded

    folder = images(7)
    backbone.identity["precision"] = "bf16"
    expected = encode(folder, backbone, tmp_path / "good")
    assert not expected.failures
    bad = backbone.read((folder / "dog/001.png").read_bytes()).sum()
    backbone.model.encode_image = odd
    message = r"dog/001.png: its embedding is not finite in bf16; give --precision fp32"
    for _ in range(2):  # the second run stops there again
        with pytest.raises(InputError, match=message):
            encode(folder, backbone, tmp_path / "out")
    del backbone.model.encode_image
    assert encode(folder, backbone, tmp_path / "out").n_kept == 5
    for name in ("img_emb/img_emb_00001.npy", "metadata/metadata_00001.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "good" / name).read_bytes()


def test_a_text_that_is_not_finite_is_named(backbone):
    with torch.no_grad():
        backbone.model.text[ord("x")] = torch.inf
    with pytest.raises(InputError, match="class 'b': its text embedding is not finite in fp32"):
        encode_text(backbone, ClassPrompts(["a", "b"], [["y"], ["y", "x"]], "here"))


def preprocessing(found):
    return found.mean, found.std, found.interpolation, found.resize_mode


def test_a_checkpoint_gets_the_preprocessing_of_its_models_weights(tmp_path):
    """Values as the models' authors give them: MobileCLIP2, SigLIP, CLIP."""
    mobile = preprocessing_of("MobileCLIP2-S0", tmp_path / "w.pt", 256)
    assert preprocessing(mobile) == ((0, 0, 0), (1, 1, 1), "bilinear", "shortest")
    siglip = preprocessing_of("ViT-B-16-SigLIP", tmp_path / "w.pt", 224)
    assert preprocessing(siglip) == ((0.5,) * 3, (0.5,) * 3, "bicubic", "squash")
    clip = preprocessing_of("ViT-B-32", tmp_path / "w.pt", 224)
    assert np.allclose(clip.mean, (0.48145466, 0.4578275, 0.40821073))
    assert (clip.size, clip.interpolation) == (224, "bicubic")


def test_preprocessing_that_differs_between_weights_is_a_warning(tmp_path):
    """ViT-L-14 has weights with mean 0.5 and with CLIP's."""
    with pytest.warns(UserWarning, match=r"w.pt: .* weights of ViT-L-14 differ .* mean \(0.48"):
        found = preprocessing_of("ViT-L-14", tmp_path / "w.pt", 224)
    assert np.allclose(found.mean, (0.48145466, 0.4578275, 0.40821073))
    preprocessing_of("ViT-L-14", None, 224)  # of random weights: without a warning


WORDS = " ".join(["word"] * 8)


def test_prompts_that_are_cut_are_counted(small):
    backbone = load_backbone("small-clip", "none", CPU)
    backbone.tokenizer = open_clip.SimpleTokenizer(context_length=12)
    fits = [f"{WORDS} cat dog", f"{WORDS} !!", "!", "a"]  # 12 tokens with both ends
    backbone.model.encode_text = lambda tokens: torch.ones(len(tokens), 12)
    encode_text(backbone, ClassPrompts(["a", "b"], [fits, [f"{WORDS} cat"]], "here"))
    prompts = [[*fits, f"{WORDS} cat dog {name}"] for name in ("x", "y")]
    text = ClassPrompts(["x", "y", "z"], [*prompts, [f"{WORDS} cat dog !!"]], "p.json")
    message = (
        r"^p.json: 3 of 11 prompts are longer than 12 tokens and were cut \(x, y, z\); the classes "
        r"x, y have the same prompts then$"
    )
    with pytest.warns(UserWarning, match=message):
        encode_text(backbone, text)


class T5Tokenizer:
    """Ends and pads with the same token, as SigLIP's."""

    context_length = 5

    def __call__(self, texts, context_length=None):
        length = context_length or self.context_length
        rows = [[7 + ord(c) for c in text.replace(" ", "")][: length - 1] for text in texts]
        return torch.tensor([row + [1] * (length - len(row)) for row in rows])


class ClassTokenizer(T5Tokenizer):
    """Has a class token at the end of the context, behind the padding."""

    def __call__(self, texts, context_length=None):
        length = context_length or self.context_length
        rows = [[7 + ord(c) for c in text.replace(" ", "")][: length - 2] for text in texts]
        return torch.tensor([row + [2] + [0] * (length - 2 - len(row)) + [3] for row in rows])


@pytest.mark.parametrize(("tokenizer", "longest"), [(T5Tokenizer(), 4), (ClassTokenizer(), 3)])
def test_prompts_of_other_tokenizers(tokenizer, longest, backbone):
    backbone.tokenizer = tokenizer
    encode_text(backbone, ClassPrompts(["a"], [["a", "abcd"[:longest]]], "here"))
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer than 5 tokens"):
        encode_text(backbone, ClassPrompts(["a"], [["a", "abcdef"[: longest + 1]]], "here"))


def test_a_torchscript_archive_is_refused_with_the_remedy(small, tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = torch.nn.Linear(3, 3)

        def forward(self, x):
            return self.visual(x)

    with warnings.catch_warnings():  # of later versions, that TorchScript ends
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(Model(), torch.zeros(1, 3)), str(tmp_path / "ViT-B-32.pt"))
        state = torch.jit.load(str(tmp_path / "ViT-B-32.pt"), "cpu").state_dict()
    with pytest.raises(InputError, match=r"TorchScript archive.*torch.jit.load\(FILE, 'cpu'\)"):
        read_checkpoint(tmp_path / "ViT-B-32.pt")
    torch.save(state, tmp_path / "new.pt")  # the remedy
    assert read_checkpoint(tmp_path / "new.pt").keys() == {"visual.weight", "visual.bias"}


def test_without_network_there_is_one_line(monkeypatch, capfd):
    def create(name, **_):
        for retry in range(5):
            logging.getLogger("huggingface_hub").warning("Retrying in 1s [Retry %d/5].", retry)
        raise RuntimeError(
            f"Failed to download weights for tag 'openai': {LocalEntryNotFoundError('x')}"
        )

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    message = (
        r"^model ViT-B-32, pretrained openai: cannot be downloaded from here; download the "
        r"repository https://huggingface.co/timm/vit_base_patch32_clip_224.openai and give its "
        r"folder as --model, without --pretrained$"
    )
    with pytest.raises(InputError, match=message):
        load_backbone("ViT-B-32", "openai", CPU)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("proxy", [None, "http://localhost:9"])
def test_nothing_is_downloaded_from_a_hub_without_an_address(proxy, monkeypatch):
    """A proxy may know its address, so that the download is tried."""
    calls = []

    def create(name, **_):
        calls.append(constants.HF_HUB_OFFLINE)
        raise RuntimeError("Failed to download weights for tag 'openai'")

    def resolve(*_, **__):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    if proxy is not None:
        monkeypatch.setenv("https_proxy", proxy)
    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(InputError, match="cannot be downloaded from here; download the repository"):
        load_backbone("ViT-B-32", "openai", CPU)
    assert calls == ([True] if proxy is None else [True, False])


def test_a_name_on_the_hub_is_one_line_with_the_remedy():
    message = r"^hf-hub:org/name: download .*https://huggingface.co/org/name and give its folder"
    with pytest.raises(InputError, match=message):
        identify("hf-hub:org/name", None)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({"hf_model_name": "org/name"}, "org/name"),
        ({"timm_model_name": "hf-hub:org/name"}, "hf-hub:org/name"),
        ({"timm_model_name": "local-dir:/etc"}, "local-dir:/etc"),
        ({"timm_model_name": "hf_hub:org/name"}, "hf_hub:org/name"),
        ({"timm_model_name": " HF-hub:org/name"}, " HF-hub:org/name"),
        ({"any": [{"deep": ["hf-hub:org/name"]}]}, "hf-hub:org/name"),
        ({"text": {"hf_model_name": ["org/name"]}}, "org/name"),
        ({"tokenizer_kwargs": {"bpe_path": "/etc/shadow"}}, "/etc/shadow"),
        ({"tokenizer_kwargs": {"subfolder": ".."}}, ".."),
    ],
)
def test_a_folder_names_parts_elsewhere_only_if_that_is_allowed(part, name, small, tmp_path):
    folder = a_folder(tmp_path)
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    tower = "text_cfg" if "hf_model_name" in part else "vision_cfg"
    config["model_cfg"][tower] |= part
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"names '{name}', .*--allow-hub"):
        load_backbone(str(folder), "none", CPU)
    assert network_config(str(folder), allow_hub=True)[tower].items() >= part.items()


def test_a_folders_leave_to_run_code_is_dropped_at_any_depth(small, tmp_path):
    folder = a_folder(tmp_path)
    file = folder / "open_clip_config.json"
    plain = file.read_text()
    config = json.loads(plain)
    config["model_cfg"] |= {"trust_remote_code": True}
    config["model_cfg"]["text_cfg"] |= {"act_kwargs": {}, "trust_remote_code": "yes"}
    config["model_cfg"]["vision_cfg"] |= {"act_kwargs": {"trust_remote_code": [1]}}
    file.write_text(json.dumps(config))
    assert "trust" not in json.dumps(network_config(str(folder)))
    deep = "[" * 900 + '{"trust_remote_code": 1}' + "]" * 900
    file.write_text(plain.replace('"text_cfg": {', f'"text_cfg": {{"deep": {deep}, '))
    assert "trust" not in str(network_config(str(folder)))


def test_a_folders_tokenizer_runs_no_code(small, tmp_path, monkeypatch):
    asked = {}

    class AutoTokenizer:
        @classmethod
        def from_pretrained(cls, name, **options):
            asked.update(options, name=str(name))
            return cls()

    fake = types.SimpleNamespace(AutoTokenizer=AutoTokenizer)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    folder = a_folder(tmp_path)
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"] |= {
        "hf_tokenizer_name": "org/name",
        "tokenizer_kwargs": {"trust_remote_code": True, "use_fast": True},
    }
    file.write_text(json.dumps(config))
    tokenizer_of(str(folder))
    assert asked["name"] == str(folder)
    assert asked["trust_remote_code"] is False
    assert asked["use_fast"] is True


def test_a_terminal_shows_that_a_model_is_loaded(weights, save, monkeypatch, capsys):
    file = save(weights)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    load_backbone("small-clip", file, CPU)
    shown = capsys.readouterr().err
    assert f"reading {file} ...\r" in shown
    assert f"loading model small-clip, pretrained {file} ...\r" in shown
    assert shown.endswith(" \r")
