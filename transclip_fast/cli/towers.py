"""The text tower that belongs to stored features."""

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
from transclip_fast.heads.prompts.context import POSITIONS
from transclip_fast.heads.prompts.tower import AUTOCAST
from transclip_fast.store.features import ENCODER

DEMO = "demo"
SHA256 = 64  # digits; a name or tag has fewer


def _epochs(name: str) -> str:
    return f"{name}: {SETTINGS[name][1].epochs}"


def _rates() -> str:
    by_rate: dict[float, list[str]] = {}
    for name, (_, schedule) in SETTINGS.items():
        by_rate.setdefault(schedule.rate, []).append(name)
    return "; ".join(f"{', '.join(names)}: {rate:g}" for rate, names in by_rate.items())


def tower_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that runs the text tower of what encoded FEATURES."""
    for option in reversed(
        (
            click.option(
                "--model",
                help="Text tower of a prompt learner: open_clip model, a folder with an "
                "open_clip_config.json, or demo.  [default: what encoded FEATURES]",
            ),
            click.option(
                "--pretrained",
                help="Its weights, as for `encode`.  [default: what encoded FEATURES]",
            ),
            click.option(
                "--precision",
                type=click.Choice([*AUTOCAST]),
                help="Of the text tower's matrix products.  [default: bf16 on CUDA, else fp32]",
            ),
        )
    ):
        command = option(command)
    return command


def prompt_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What prompts are learned, and how."""
    for option in reversed(
        (
            click.option(
                "--context",
                "n_ctx",
                type=click.IntRange(1, 64),
                help="Learned vectors of a prompt, from random ones.  [default: as published: 16, "
                "cocoop has --start]",
            ),
            click.option(
                "--start",
                help='Words to start from.  [default: none, cocoop "a photo of a"]',
            ),
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
                help="Over the shots.  [default: coop, prograd: 50 with one shot, 100 up to four, "
                f"else 200; {_epochs('plot')}, {_epochs('cocoop')}]",
            ),
            click.option(
                "--rate",
                type=click.FloatRange(0, min_open=True),
                help=f"Of the gradient descent.  [default: {_rates()}]",
            ),
        )
    ):
        command = option(command)
    return command


def settings_of(name: str, options: Mapping[str, Any]) -> tuple[ContextSettings, Schedule]:
    """
    What `prompt_options` say of contexts and training, and what is published for the rest.

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


class Encoded(Protocol):
    """Features that say what encoded them."""

    @property
    def path(self) -> str: ...

    @property
    def encoder(self) -> dict[str, Any] | None: ...

    @property
    def dim(self) -> int: ...


def load_tower(
    stored: Encoded,
    device: str = "auto",
    model: str | None = None,
    pretrained: str | None = None,
    precision: str | None = None,
) -> TextTower:
    """
    The text tower of the model that encoded stored features.

    Parameters
    ----------
    stored : Encoded
        Features, or a data set of them.
    device : str
    model, pretrained : str, optional
        As for `encode`; without them, what the manifest of the features says.
    precision : str, optional
        As for `TextTower`.

    Raises
    ------
    InputError
        A model that is not known or does not load, is not the one that encoded the features, or
        that they do not name.
    """
    from transclip_fast.demo import backbone as demo_backbone  # needs open_clip

    made = stored.encoder
    if model is None:
        model, weights = _named(stored)
        pretrained = pretrained or weights
    chosen = resolve_device(device)
    if model == DEMO:
        backbone = demo_backbone()
        backbone.model.to(chosen)
    else:
        backbone = load_backbone(model, pretrained, chosen)
    if made is not None:
        found = encoder_of(backbone)
        if found != made:
            raise InputError(
                f"{stored.path}: was encoded with {told(made)}, not with {told(found)}; give "
                "--model and --pretrained of the former"
            )
    if backbone.dim != stored.dim:
        raise InputError(
            f"{stored.path}: has {stored.dim} dimensions, embeddings of {model} have "
            f"{backbone.dim}; give --model and --pretrained of what encoded it"
        )
    return TextTower(backbone, precision)


def encoder_of(backbone: Backbone) -> dict[str, Any]:
    """What a manifest would know a backbone by."""
    return {name: backbone.identity[name] for name in ENCODER if name in backbone.identity}


def told(encoder: Mapping[str, Any]) -> str:
    """Model and weights for a reader."""
    model, weights = (str(encoder.get(name)) for name in ("model", "weights"))
    gelu = ", QuickGELU" if encoder.get("quick_gelu") else ""
    return f"{model[:12] if len(model) == SHA256 else model} ({weights[:12]}{gelu})"


def _named(stored: Encoded) -> tuple[str, str | None]:
    """Model and weights by the names that the manifest has of them."""
    made = stored.encoder
    if made is None:
        raise InputError(
            f"{stored.path}: does not say what encoded it; give --model and --pretrained"
        )
    model, weights = str(made["model"]), str(made["weights"])
    if model == DEMO:
        return model, None
    if SHA256 in (len(model), len(weights)):
        raise InputError(
            f"{stored.path}: was encoded with files ({told(made)}); give --model and --pretrained"
        )
    return model, weights
