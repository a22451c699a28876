"""`transclip-fast protocol`: tables over data sets, shots and seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from transclip_fast.cli import session
from transclip_fast.cli.command import Command
from transclip_fast.cli.options import (
    PATH,
    POSITIVE,
    device_option,
    json_option,
    options_of,
    refuse_unused,
)
from transclip_fast.cli.towers import TOWER, Prompter, tower_options
from transclip_fast.errors import InputError
from transclip_fast.heads import HEADS, LEARNERS
from transclip_fast.progress_bar import progress_bar
from transclip_fast.protocols import plans
from transclip_fast.protocols.runs import CONTENTS, TABLES, Run, do_runs, write_tables
from transclip_fast.protocols.table import markdown, summarise
from transclip_fast.store.atomic import check_replaceable, locked, writing

SHOTS = (1, 2, 4, 8, 16)
HEAD_NAMES = (*HEADS, *LEARNERS, plans.TRANSCLIP_FS)
FEW_SHOT_HEADS = (*(x for x in HEADS if HEADS[x].needs_shots), plans.TRANSCLIP_FS)


class ListsCommand(Command):
    """Accepts `--shots 1 2 4` and `--head a b`, where click needs `--shots 1 --shots 2 ...`.

    Only whole numbers and names of heads continue a list, so that FEATURES may follow.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words, flag = [], ""  # of the list that is read
        for previous, word in pairwise(["", *args]):
            if previous in ("--shots", "--head"):
                flag = previous
            elif flag and (word.isdecimal() if flag == "--shots" else word in HEAD_NAMES):
                words.append(flag)
            else:
                flag = ""
            words.append(word)
        return super().parse_args(ctx, words)


def unique(ctx: click.Context, param: click.Parameter, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values of a list without repetitions."""
    return tuple(dict.fromkeys(values))


def _options(heads: Sequence[str], shots: Sequence[int]) -> Callable[..., Any]:
    """The options of every protocol, with its defaults."""
    return options_of(
        click.option(
            "--head",
            "heads",
            multiple=True,
            default=heads,
            callback=unique,
            help="Few-shot methods, one or several; "
            f"{', '.join(LEARNERS)} run the text tower of what encoded FEATURES.",
        ),
        click.option(
            "--shots",
            multiple=True,
            default=shots,
            type=POSITIVE,
            callback=unique,
            help="Labelled rows of a class, one number or several.",
        ),
        click.option("--seeds", default=3, type=POSITIVE, help="Draws of the shots."),
        click.option(
            "--out",
            required=True,
            type=PATH,
            help="Folder of the tables; runs that it has are not done again.",
        ),
        click.option(
            "--epochs",
            type=POSITIVE,
            help="Of the prompt learners' training.  [default: as in `train-head`]",
        ),
        tower_options,
        device_option,
        json_option,
    )


@click.group("protocol")
def command() -> None:
    """Compare methods as papers do: over data sets, shots and seeds.

    A data set is FEATURES (see `solve`) with labels, text_features and the pools that shots are
    drawn from, support_* and perhaps validation_*; or a folder of the feature folders test/, train/
    and val/. --out receives table.md, table.parquet (mean and deviation over seeds), runs.parquet
    and run.json. Run the same command again after a crash: it resumes with the runs that are
    missing. The prompt learners coop, prograd, cocoop and plot also need class_names, and run the
    text tower of what encoded FEATURES.

    \b
    Example:
      transclip-fast protocol few-shot pets.npz dtd.npz --head taskres --shots 4 16 --out table
    """


_protocol = partial(
    command.command, cls=ListsCommand, shown="heads shots seeds subsets epochs device as_json"
)


@_protocol("few-shot", short_help="Heads over numbers of shots.")
@click.argument("features", nargs=-1, required=True, type=PATH)
@_options(FEW_SHOT_HEADS, SHOTS)
def few_shot(features: tuple[str, ...], **options: Any) -> None:
    """Train each head on a few shots of each class, and put TransCLIP on top.

    Shots are drawn from the support rows, the same for every head, and up to four validation rows a
    class, if there are any, choose hyperparameters. The head transclip-fs is TransCLIP with the
    shots as its own support; prompt-ensemble takes no shots: its row, with 0 of them, is that of
    zero-shot.

    \b
    Example:
      transclip-fast protocol few-shot pets.npz --head taskres transclip-fs \\
          --shots 1 2 4 8 16 --seeds 3 --out table
    """
    _carry_out(partial(plans.few_shot, features), options)


@_protocol("base-to-new", short_help="From half of the classes to the others.")
@click.argument("features", nargs=-1, required=True, type=PATH)
@_options(("clip-adapter",), (16,))
def base_to_new(features: tuple[str, ...], **options: Any) -> None:
    """Train each head on the first half of the classes, and measure it on each half alone.

    Base classes are the first half (of an odd number one more), new ones the others; queries of
    one half are classified among its own classes only, and TransCLIP runs on top of each head. The
    table has base, new and their harmonic mean. Prompt learners go to the new classes with their
    names; the forms of clip-adapter, unmix-clip and prompt-ensemble go with their texts; other
    heads are bound to the classes they were trained on.

    \b
    Example:
      transclip-fast protocol base-to-new pets dtd --head coop cocoop --shots 16 --out table
    """
    _carry_out(partial(plans.base_to_new, features), options)


@_protocol("cross-dataset", short_help="From one data set to others.")
@click.argument("source", type=PATH)
@click.argument("targets", nargs=-1, required=True, type=PATH)
@_options(("clip-adapter",), (16,))
def cross_dataset(source: str, targets: tuple[str, ...], **options: Any) -> None:
    """Train each head on SOURCE and use it on TARGETS, which have other classes.

    Prompt learners go to TARGETS with the names of their classes; the forms of clip-adapter,
    unmix-clip and prompt-ensemble go with their texts; other heads are bound to the classes they
    were trained on.

    \b
    Example:
      transclip-fast protocol cross-dataset imagenet pets dtd --head coop --out table
    """
    _carry_out(partial(plans.cross_dataset, source, targets), options)


@_protocol("domains", short_help="From a data set to its variants.")
@click.argument("source", type=PATH)
@click.argument("targets", nargs=-1, required=True, type=PATH)
@click.option(
    "--subset",
    "subsets",
    multiple=True,
    nargs=2,
    metavar="TARGET FILE",
    help="Classes of a target, by its name: a text file with one name, or position in SOURCE, a "
    "line.  [default: by class names]",
)
@_options(tuple(HEADS), (16,))
def domains(
    source: str, targets: tuple[str, ...], subsets: tuple[tuple[str, str], ...], **options: Any
) -> None:
    """Train each head on SOURCE and use it on TARGETS, which have all or some of its classes.

    \b
    Example:
      transclip-fast protocol domains imagenet.npz imagenet-v2.npz imagenet-a.npz \\
          --subset imagenet-a classes-of-a.txt --head taskres --out table
    """
    files = dict(subsets)
    if len(files) < len(subsets):
        target = next(name for name in files if sum(name == named for named, _ in subsets) > 1)
        raise InputError(f"--subset {target}: is given twice; give one file a target")
    _carry_out(partial(plans.domains, source, targets, files), options)


def _carry_out(plan: Callable[[plans.Trials], list[Run]], options: Mapping[str, Any]) -> None:
    """Do the runs, write the tables, and print them."""
    if not LEARNERS.keys() & {*options["heads"]}:
        refuse_unused(("epochs", *TOWER), "none of the heads learns prompts")
    stages, out = session.Stages(), options["out"]
    folder = Path(out)
    tried = {name: options[name] for name in ("heads", "shots", "seeds", "device")}
    with session.collected_warnings({}) as warnings:
        with stages.time("load"):
            runs = plan(plans.Trials(**tried, prompter=Prompter(options)))
        with locked(out):
            with writing(out):
                check_replaceable(folder, out, CONTENTS)
            with stages.time("runs"), progress_bar("protocol", "runs") as show:
                rows = do_runs(runs, folder / "runs", show)
            table = summarise(rows)
            text = markdown(table)
            summary = {
                "kind": "protocol",
                "table": table,
                "runs": len(rows),
                "seconds": stages.seconds,
                "versions": session.versions(),
                "warnings": warnings,
            }
            with writing(out):
                write_tables(folder, rows, table, text, summary)
    session.print_summary(
        summary, f"{text}\nwritten to {out}: {', '.join(TABLES)}", options["as_json"]
    )
