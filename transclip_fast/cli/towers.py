"""The text tower of the model that encoded features, and the input of prompt learners."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import click

from transclip_fast.cli.encode import ENCODE
from transclip_fast.cli.options import options_of
from transclip_fast.device import resolve_device
from transclip_fast.encode.architectures import DEMO
from transclip_fast.encode.models import Backbone, load_backbone
from transclip_fast.errors import InputError
from transclip_fast.heads import SETTINGS
from transclip_fast.heads.prompts import ContextSettings, Prompting, Schedule, TextTower
from transclip_fast.heads.text_tower import AUTOCAST
from transclip_fast.protocols.data import DataSet
from transclip_fast.store.features import ENCODER, SHA256_DIGITS, Features, describe_encoder

TOWER = ("model", "pretrained", "allow_hub", "precision")
tower_options = options_of(
    click.option(
        "--model",
        help="Text tower of a prompt learner: open_clip model, a folder with an "
        "open_clip_config.json, or demo.  [default: what encoded FEATURES]",
    ),
    click.option(
        "--pretrained", help="Its weights, as for `encode`.  [default: what encoded FEATURES]"
    ),
    click.option("--allow-hub", is_flag=True, help=ENCODE["allow_hub"]),
    click.option(
        "--precision",
        type=click.Choice([*AUTOCAST]),
        help="Of the text tower's matrix products.  [default: bf16 on CUDA, else fp32]",
    ),
)


def load_tower(features: Features | DataSet, options: Mapping[str, Any]) -> TextTower:
    """The text tower of the model that encoded features, or that `tower_options` name."""
    from transclip_fast.demo import backbone as demo_backbone  # needs open_clip

    model, pretrained = options["model"], options["pretrained"]
    if model is None:
        model, weights = _encoder_names(features)
        pretrained = pretrained or weights
    device = resolve_device(options["device"])
    if model == DEMO:
        backbone = demo_backbone(device=device)
    else:
        backbone = load_backbone(model, pretrained, device, allow_hub=options["allow_hub"])
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
    return TextTower(backbone, options["precision"])


class Prompter:
    """Returns the text tower, class names and settings of a prompt learner for features."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._towers: dict[str, TextTower] = {}  # by the encoder of the features

    def __call__(self, features: Features | DataSet, head: str) -> Prompting:
        context, schedule = self._settings(head)
        if features.class_names is None:
            raise InputError(
                f"{features.path}: has no class_names, of which {head} makes prompts; add them, or "
                "give --class-names to `train-head`"
            )
        key = json.dumps([features.encoder, features.dim], sort_keys=True)
        if key not in self._towers:
            self._towers[key] = load_tower(features, self._options)
        return Prompting(self._towers[key], features.class_names, context, schedule)

    def _settings(self, head: str) -> tuple[ContextSettings, Schedule]:
        """The published settings with the options applied."""
        changed = {name: value for name, value in self._options.items() if value is not None}
        if {"n_ctx", "start"} <= changed.keys():
            raise InputError("--start determines the length of the context; leave --context out")
        if "n_ctx" in changed:
            changed["start"] = None

        def chosen(*names: str) -> dict[str, Any]:
            return {name: changed[name] for name in names if name in changed}

        context, schedule = SETTINGS[head]
        context = replace(context, **chosen("n_ctx", "start", "class_specific", "position"))
        return context, replace(schedule, **chosen("epochs", "rate"))


def encoder_of(backbone: Backbone) -> dict[str, Any]:
    """The encoder entry that a manifest has for a backbone."""
    return {name: backbone.identity[name] for name in ENCODER if name in backbone.identity}


def _encoder_names(features: Features | DataSet) -> tuple[str, str | None]:
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
