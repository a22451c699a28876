"""Options of the commands that train heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import click

from transclip_fast.errors import InputError
from transclip_fast.heads import HEADS, LEARNERS, SETTINGS
from transclip_fast.heads.prompts import ContextSettings, Schedule
from transclip_fast.heads.prompts.settings import POSITIONS
from transclip_fast.heads.prompts.tower import AUTOCAST
from transclip_fast.protocols.plans import TRANSCLIP_FS

HEAD_NAMES = (*HEADS, *LEARNERS, TRANSCLIP_FS)
TOWER_OPTIONS = ("model", "pretrained", "precision")


class ListsCommand(click.Command):
    """Accepts `--shots 1 2 4` and `--head a b`, where click needs `--shots 1 --shots 2 ...`.

    Only whole numbers and names of heads continue a list, so that FEATURES may follow.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words: list[str] = []
        flag, first = "", False  # of the list that is read, and whether its first value comes next
        for word in args:
            if flag and not first:
                if word.isdecimal() if flag == "--shots" else word in HEAD_NAMES:
                    words.append(flag)
                else:
                    flag = ""
            first = word in ("--shots", "--head")
            flag = word if first else flag
            words.append(word)
        return super().parse_args(ctx, words)


def unique(ctx: click.Context, param: click.Parameter, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values of a list without repetitions."""
    return tuple(dict.fromkeys(values))


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
    The settings of `prompt_options`, with published values for those that are missing.

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
    changes = {key: options[key] for key in ("epochs", "rate") if options[key] is not None}
    return context, replace(schedule, **changes)
