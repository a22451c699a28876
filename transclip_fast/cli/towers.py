"""The text tower of the model that encoded features."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from transclip_fast.cli.head_options import TOWER_OPTIONS
from transclip_fast.device import resolve_device
from transclip_fast.encode.models import Backbone, load_backbone
from transclip_fast.errors import InputError
from transclip_fast.heads import SETTINGS
from transclip_fast.heads.prompts import Prompting, TextTower
from transclip_fast.protocols.data import DataSet
from transclip_fast.store.features import ENCODER

DEMO = "demo"
SHA256_DIGITS = 64  # model names and weight tags are shorter


class EncodedFeatures(Protocol):
    """Features with the encoder that their manifest names."""

    @property
    def path(self) -> str: ...

    @property
    def encoder(self) -> dict[str, Any] | None: ...

    @property
    def dim(self) -> int: ...


def load_tower(
    features: EncodedFeatures,
    device: str = "auto",
    model: str | None = None,
    pretrained: str | None = None,
    precision: str | None = None,
) -> TextTower:
    """
    The text tower of the model that encoded features.

    Parameters
    ----------
    features : EncodedFeatures
        Features, or a data set of them.
    device : str
    model, pretrained : str, optional
        As for `encode`; by default those in the manifest of the features.
    precision : str, optional
        As for `TextTower`.

    Raises
    ------
    InputError
        A model that is unknown or does not load, that did not encode the features, or that neither
        the options nor the features name.
    """
    from transclip_fast.demo import backbone as demo_backbone  # needs open_clip

    if model is None:
        model, weights = _encoder_names(features)
        pretrained = pretrained or weights
    chosen = resolve_device(device)
    if model == DEMO:
        backbone = demo_backbone()
        backbone.model.to(chosen)
    else:
        backbone = load_backbone(model, pretrained, chosen)
    expected, found = features.encoder, encoder_of(backbone)
    if expected not in (None, found):
        raise InputError(
            f"{features.path}: was encoded with {describe_encoder(expected)}, not with "
            f"{describe_encoder(found)}; give --model and --pretrained of the former"
        )
    if backbone.dim != features.dim:
        raise InputError(
            f"{features.path}: has {features.dim} dimensions, embeddings of {model} have "
            f"{backbone.dim}; give --model and --pretrained of what encoded it"
        )
    return TextTower(backbone, precision)


class Prompter:
    """Returns the text tower, class names and settings of a prompt learner for a data set."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._tower_options = {name: options[name] for name in ("device", *TOWER_OPTIONS)}
        self._epochs = options["epochs"]
        self._towers: dict[str, TextTower] = {}  # by the encoder of the features

    def __call__(self, data: DataSet, head: str) -> Prompting:
        if data.class_names is None:
            raise InputError(f"{data.path}: has no class_names, of which {head} makes prompts")
        key = json.dumps([data.encoder, data.dim], sort_keys=True)
        if key not in self._towers:
            self._towers[key] = load_tower(data, **self._tower_options)
        context, schedule = SETTINGS[head]
        schedule = replace(schedule, epochs=self._epochs or schedule.epochs)
        return Prompting(self._towers[key], data.class_names, context, schedule)


def encoder_of(backbone: Backbone) -> dict[str, Any]:
    """The encoder entry that a manifest has for a backbone."""
    return {name: backbone.identity[name] for name in ENCODER if name in backbone.identity}


def describe_encoder(encoder: Mapping[str, Any] | None) -> str:
    """Model and weights for a reader."""
    model, weights = (str((encoder or {}).get(name)) for name in ("model", "weights"))
    gelu = ", QuickGELU" if (encoder or {}).get("quick_gelu") else ""
    return f"{model[:12] if len(model) == SHA256_DIGITS else model} ({weights[:12]}{gelu})"


def _encoder_names(features: EncodedFeatures) -> tuple[str, str | None]:
    """Model and weights by the names in the manifest of the features."""
    encoder = features.encoder
    if encoder is None:
        raise InputError(
            f"{features.path}: does not say what encoded it; give --model and --pretrained"
        )
    model, weights = str(encoder["model"]), str(encoder["weights"])
    if model == DEMO:
        return model, None
    if SHA256_DIGITS in (len(model), len(weights)):
        raise InputError(
            f"{features.path}: was encoded with files ({describe_encoder(encoder)}); give --model "
            "and --pretrained"
        )
    return model, weights
