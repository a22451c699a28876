"""What is known of a backbone before it is loaded, and how it is loaded."""

from __future__ import annotations

import open_clip
import pytest
import torch
from huggingface_hub import constants

from transclip_fast.encode.models import identify, load_backbone


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
