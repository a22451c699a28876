"""Head files: a written head is read back, and any other file is refused in one line."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conftest import make_problem
from transclip_fast.errors import InputError
from transclip_fast.heads import HEADS, fit_head
from transclip_fast.heads.files import ENTRY, StoredHead, read_head, save_head
from transclip_fast.heads.prompts.cocoop import ConditionalHead
from transclip_fast.heads.prompts.coop import PromptHead
from transclip_fast.heads.prompts.plot import TransportHead

NAMES = [f"class {k}" for k in range(6)]


def prompt_head(specific=False):
    draw = torch.Generator().manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(6, 33, generator=draw), dim=1)
    context = torch.randn(6 if specific else 1, 3, 8, generator=draw)
    return PromptHead(
        text=text,
        logit_scale=50.0,
        parameters={"n_ctx": 3},
        context=context if specific else context[0],
        position="middle",
        words=["é", "b", "c"] * len(context),
    )


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def file(tmp_path):
    """A file of a CoOp head."""
    path = tmp_path / "coop.safetensors"
    encoder = {"model": "ViT-B-32", "weights": "openai", "quick_gelu": True}
    save_head(path, StoredHead(prompt_head(), "coop", NAMES, encoder, {"shots": 4, "seed": 0}))
    return path


def changed(path, tensors=None, entry=None, raw=None):
    """The file with some tensors or entries replaced, or without them where None."""
    with safe_open(path, "pt") as stored:
        metadata = stored.metadata()
    kept = {**load_file(path), **(tensors or {})}
    entries = {**json.loads(metadata[ENTRY]), **(entry or {})}
    text = raw if raw is not None else json.dumps({k: v for k, v in entries.items() if v != "gone"})
    kept = {name: tensor for name, tensor in kept.items() if tensor is not None}
    save_file(kept, path, {ENTRY: text})


@pytest.mark.parametrize("name", HEADS)
def test_every_head_on_features(name, tmp_path, short):
    features, text, labels = make_problem(n=137)
    head = fit_head(
        name,
        text,
        features[:40],
        labels[:40],
        validation_features=features[40:60],
        validation_labels=labels[40:60],
    )
    save_head(tmp_path / "head.safetensors", StoredHead(head, name, None, None))
    found = read_head(tmp_path / "head.safetensors")
    assert (found.name, found.class_names, found.encoder, found.training) == (name, None, None, {})
    assert type(found.head) is type(head)
    assert found.head.parameters == head.parameters
    rows = torch.from_numpy(features[60:])
    assert torch.equal(found.head.logits(rows), head.logits(rows))
    assert found.head.prior(rows).keys() == head.prior(rows).keys()


@pytest.mark.parametrize("specific", [False, True])
def test_prompts(specific, tmp_path):
    head, encoder = prompt_head(specific), {"model": "a", "weights": "b"}
    stored = StoredHead(head, "prograd", NAMES, encoder, {"shots": None, "seed": 3})
    save_head(tmp_path / "head.safetensors", stored)
    found = read_head(tmp_path / "head.safetensors")
    for name in ("text", "context"):
        assert torch.equal(getattr(found.head, name), getattr(head, name))
    for name in ("logit_scale", "parameters", "position", "words"):
        assert getattr(found.head, name) == getattr(head, name)
    assert found.class_names == NAMES
    assert (found.encoder, found.training) == (encoder, {"shots": None, "seed": 3})


def other_heads():
    """CoCoOp's and PLOT's, made up."""
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=draw)

    rest = {"logit_scale": 50.0, "parameters": {"n_ctx": 3}, "position": "end"}
    text = torch.nn.functional.normalize(drawn(6, 33), dim=1)
    conditional = {"context": drawn(3, 8), "down": drawn(2, 33), "down_bias": drawn(2)}
    conditional |= {"up": drawn(8, 2), "up_bias": drawn(8)}
    transport = {"texts": drawn(6, 4, 33), "contexts": drawn(4, 3, 8)}
    return (
        ConditionalHead(text=text, words=["a"] * 3, **conditional, **rest),
        TransportHead(text=text, words=["a"] * 12, patches=5, **transport, **rest),
    )


@pytest.mark.parametrize("place", [0, 1])
def test_learners_with_heads_of_their_own(place, tmp_path):
    head, file = other_heads()[place], tmp_path / "head.safetensors"
    save_head(file, StoredHead(head, "x", NAMES, None))
    found = read_head(file).head
    assert type(found) is type(head)
    for name, value in vars(head).items():
        read = getattr(found, name)
        assert torch.equal(read, value) if isinstance(value, torch.Tensor) else read == value
    changed(file, entry={"settings": {**other_settings(head), "words": ["a"] * 2}})
    with pytest.raises(InputError, match="words are not one for each vector"):
        read_head(file)


def test_a_truth_value_is_no_number_of_patches(tmp_path):
    head, file = other_heads()[1], tmp_path / "head.safetensors"
    save_head(file, StoredHead(head, "x", NAMES, None))
    changed(file, entry={"settings": {**other_settings(head), "patches": True}})
    with pytest.raises(InputError, match="settings: patches is True; it is damaged"):
        read_head(file)


def other_settings(head):
    return {k: getattr(head, k) for k in ("position", "words", "patches") if hasattr(head, k)}


@pytest.mark.parametrize(
    ("place", "name", "tensor", "expected"),
    [
        (0, "up_bias", torch.zeros(9), "up_bias has shape .9,., expected .v. with .*v = 8"),
        (0, "down", None, "is no head of this version: its tensors lacks down"),
        (1, "texts", torch.zeros(6, 4, 32), "texts has shape .6, 4, 32., expected .K, P, d."),
        (1, "contexts", torch.zeros(5, 3, 8), "contexts has shape .5, 3, 8."),
    ],
)
def test_learners_whose_parts_do_not_fit(place, name, tensor, expected, tmp_path):
    file = tmp_path / "head.safetensors"
    save_head(file, StoredHead(other_heads()[place], "x", NAMES, None))
    changed(file, {name: tensor})
    with pytest.raises(InputError, match=expected):
        read_head(file)


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("blend_ratio", torch.zeros(5), "blend_ratio has shape .5,., expected .u. with .*u = 8"),
        ("mean_text", torch.zeros(32), "mean_text has shape .32,., expected .d. with .*d = 33"),
        ("text_up", torch.zeros(33, 7), "text_up has shape .33, 7., expected .d, v. with .*v = 8"),
        ("blend_text", None, "is no head of this version: its tensors lacks blend_text"),
    ],
)
def test_blends_whose_parts_do_not_fit(name, tensor, expected, tmp_path, short):
    features, text, labels = make_problem(n=40)
    file = tmp_path / "head.safetensors"
    head = fit_head("clip-adapter-blend", text, features, labels)
    save_head(file, StoredHead(head, "clip-adapter-blend", NAMES, None))
    changed(file, {name: tensor})
    with pytest.raises(InputError, match=expected):
        read_head(file)


def test_the_same_head_is_the_same_bytes(file, tmp_path):
    save_head(tmp_path / "again.safetensors", read_head(file))
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"coop.safetensors", "again.safetensors"}


def test_a_head_is_replaced_and_nothing_else(file, tmp_path):
    save_head(file, StoredHead(prompt_head(True), "coop", NAMES, None))
    assert read_head(file).head.context.ndim == 3
    weights = tmp_path / "weights.safetensors"
    save_file({"w": torch.ones(3)}, weights)
    before = weights.read_bytes()
    with pytest.raises(InputError, match=r"weights\.safetensors: is there and is no head"):
        save_head(weights, read_head(file))
    assert weights.read_bytes() == before


@pytest.mark.parametrize("cut", [0, 7, 200, -1])
def test_truncated(file, cut):
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(InputError, match=r"coop\.safetensors: damaged or truncated"):
        read_head(file)


def test_a_pickle(file):
    with open(file, "wb") as stream:
        pickle.dump({"text": np.eye(3)}, stream)
    with pytest.raises(InputError, match=r"coop\.safetensors: damaged or truncated"):
        read_head(file)


def test_other_files(file, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_head(tmp_path / "none.safetensors")
    np.savez(tmp_path / "head.npz", text=np.eye(3))
    with pytest.raises(InputError, match=r"expected a file ending in \.safetensors"):
        read_head(tmp_path / "head.npz")
    save_file({"text": torch.eye(3)}, file)
    with pytest.raises(InputError, match="is no head; `transclip-fast train-head` writes those"):
        read_head(file)


@pytest.mark.parametrize(
    ("tensors", "entry", "expected"),
    [
        ({"context": None}, {}, "its tensors lacks? context"),
        ({"more": torch.ones(2)}, {}, "also has more"),
        ({"context": torch.ones(5, 3, 8)}, {}, r"context has shape \(5, 3, 8\), expected .*K = 6"),
        ({"text": torch.ones(6)}, {}, r"text has shape \(6,\), expected \(K, d\)"),
        ({"text": torch.eye(6, dtype=torch.float64)}, {}, "text holds torch.float64"),
        ({"text": torch.ones(6, 33)}, {}, "text holds no unit rows"),
        ({"text": torch.ones(0, 33)}, {}, "text holds no unit rows"),
        ({"context": torch.full((3, 8), torch.nan)}, {}, "context has values that are no numbers"),
        ({}, {"kind": "lora"}, "of kind 'lora'; known are prototypes"),
        ({}, {"kind": "adapter"}, "lack"),
        ({}, {"kind": "gone"}, "lacks kind"),
        ({}, {"further": 1}, "also has further"),
        ({}, {"class_names": NAMES[:5]}, "class_names are not 6 strings"),
        ({}, {"class_names": [1] * 6}, "class_names are not 6 strings"),
        ({}, {"encoder": "ViT"}, "encoder is 'ViT'"),
        ({}, {"logit_scale": -1.0}, "logit_scale is -1.0"),
        ({}, {"logit_scale": float("nan")}, "logit_scale is"),
        ({}, {"logit_scale": 10**400}, "metadata: logit_scale is 10+; it is damaged"),
        ({}, {"parameters": {"n_ctx": "3"}}, "n_ctx is '3'"),
        ({}, {"settings": {"position": "end"}}, "lacks words"),
        ({}, {"settings": {"position": "end", "words": ["a"]}}, "words are not one for each"),
        ({}, {"settings": {"position": 3, "words": ["a"] * 3}}, "settings: position is 3; it"),
    ],
)
def test_what_a_head_cannot_be(file, tensors, entry, expected):
    changed(file, tensors, entry)
    with pytest.raises(InputError, match=expected) as error:
        read_head(file)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("raw", ["{", "[]", '"text"', "[" * 100_000])
def test_metadata_that_says_nothing(file, raw):
    changed(file, raw=raw)
    with pytest.raises(InputError, match=r"coop\.safetensors: (damaged|is no head)"):
        read_head(file)


def test_classes_of_shots_are_checked(tmp_path):
    features, text, labels = make_problem(n=60)
    head = fit_head("tip-adapter", text, features, labels)
    path = tmp_path / "head.safetensors"
    save_head(path, StoredHead(head, "tip-adapter", None, None))
    changed(path, {"cache.labels": torch.full((60,), 6)})
    with pytest.raises(InputError, match="cache.labels has classes beyond the 6"):
        read_head(path)
    changed(path, {"cache.labels": torch.zeros(59, dtype=torch.int64)})
    with pytest.raises(InputError, match=r"cache.labels has shape \(59,\), expected \(M\)"):
        read_head(path)
