"""The text tower that belongs to stored features, and the options of prompt learners."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import click

from transclip_fast.device import resolve_device
from transclip_fast.encode.models import Backbone, load_backbone
from transclip_fast.errors import InputError
from transclip_fast.heads import SETTINGS
from transclip_fast.heads.prompts import ContextSettings, Schedule, TextTower
from transclip_fast.heads.prompts.settings import POSITIONS
from transclip_fast.heads.prompts.tower import AUTOCAST
from transclip_fast.store.features import ENCODER

DEMO = "demo"
SHA256_DIGITS = 64  # model names and weight tags are shorter
TOWER_OPTIONS = ("model", "pretrained", "precision")


def _rates() -> str:
    by_rate: dict[float, list[str]] = {}
    for name, (_, schedule) in SETTINGS.items():
        by_rate.setdefault(schedule.rate, []).append(name)
    return "; ".join(f"{', '.join(names)}: {rate:g}" for rate, names in by_rate.items())


def options_of(*options: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that adds options to a command, in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


tower_options = options_of(
    click.option(
        "--model",
        help="Text tower of a prompt learner: open_clip model, a folder with an "
        "open_clip_config.json, or demo.  [default: what encoded FEATURES]",
    ),
    click.option(
        "--pretrained", help="Its weights, as for `encode`.  [default: what encoded FEATURES]"
    ),
    click.option(
        "--precision",
        type=click.Choice([*AUTOCAST]),
        help="Of the text tower's matrix products.  [default: bf16 on CUDA, else fp32]",
    ),
)
prompt_options = options_of(
    click.option(
        "--context",
        "n_ctx",
        type=click.IntRange(1, 64),
        help="Learned vectors of a prompt, from random ones.  [default: as published: 16, "
        "cocoop has --start]",
    ),
    click.option("--start", help='Words to start from.  [default: none, cocoop "a photo of a"]'),
    click.option(
        "--class-specific", is_flag=True, help="Vectors of each class, instead of shared."
    ),
    click.option(
        "--position",
        default="end",
        show_default=True,
        type=click.Choice(POSITIONS),
        help="Of the class name in the prompt.",
    ),
    click.option(
        "--epochs",
        type=click.IntRange(min=1),
        help="Over the shots.  [default: coop, prograd: 50 with one shot, 100 up to four, else "
        f"200; plot: {SETTINGS['plot'][1].epochs}, cocoop: {SETTINGS['cocoop'][1].epochs}]",
    ),
    click.option(
        "--rate",
        type=click.FloatRange(0, min_open=True),
        help=f"Of the gradient descent.  [default: {_rates()}]",
    ),
)


def settings_of(name: str, options: Mapping[str, Any]) -> tuple[ContextSettings, Schedule]:
    """
    The settings of `prompt_options`, with published values for those not given.

    Raises
    ------
    InputError
        Both words to start from and a number of vectors.
    """
    n_ctx, start = options["n_ctx"], options["start"]
    if n_ctx is not None and start is not None:
        raise InputError("--start says by its words how long the context is; leave --context out")
    context, schedule = SETTINGS[name]
    if n_ctx is not None:
        context = replace(context, n_ctx=n_ctx, start=None)
    if start is not None:
        context = replace(context, start=start)
    context = replace(
        context, class_specific=options["class_specific"], position=options["position"]
    )
    given = {key: options[key] for key in ("epochs", "rate") if options[key] is not None}
    return context, replace(schedule, **given)


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
    The text tower of the model that encoded stored features.

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
