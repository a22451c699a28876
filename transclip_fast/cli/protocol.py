"""`transclip-fast protocol`: tables over data sets, shots and seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq

from transclip_fast.cli import session
from transclip_fast.cli.options import device_option, json_option
from transclip_fast.cli.towers import load_tower, tower_options
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.heads import HEADS, LEARNERS, SETTINGS, WITH_PATCHES, WITHOUT_SHOTS
from transclip_fast.heads.prompts import Prompting, TextTower
from transclip_fast.progress_bar import progress_bar
from transclip_fast.protocols import plans
from transclip_fast.protocols.data import DataSet, load_data
from transclip_fast.protocols.plans import Trials
from transclip_fast.protocols.runs import Run, do_runs
from transclip_fast.protocols.table import markdown, summarise
from transclip_fast.store.atomic import check_replaceable, locked, new_file, write_json, writing

SHOTS = (1, 2, 4, 8, 16)
NAMES = (*HEADS, *LEARNERS, plans.TRANSCLIP_FS)
FILES = ("table.md", "table.parquet", "runs.parquet", "run.json")
CONTENTS = frozenset({"runs", *FILES, *(f".{name}.partial" for name in FILES)})


class _Lists(click.Command):
    """Takes `--shots 1 2 4` and `--head a b` for what click wants to be `--shots 1 --shots 2 ...`.

    A further value is a whole number, or the name of a head, so that FEATURES may follow.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        flag, first = "", False
        for word in args:
            further = word.isdecimal() if flag == "--shots" else word in NAMES
            if flag and not first and further:
                spread.append(flag)
            elif flag and not first:
                flag = ""
            first = False
            if word in ("--shots", "--head"):
                flag, first = word, True
            spread.append(word)
        return super().parse_args(ctx, spread)


def _once(ctx: click.Context, param: click.Parameter, values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def _options(heads: Sequence[str], shots: Sequence[int]) -> Callable[..., Any]:
    """The options of every protocol, with its defaults."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(
            (
                click.option(
                    "--head",
                    "heads",
                    multiple=True,
                    default=heads,
                    show_default=True,
                    callback=_once,
                    help="Few-shot methods, one or several; "
                    f"{', '.join(LEARNERS)} run the text tower of what encoded FEATURES.",
                ),
                click.option(
                    "--shots",
                    multiple=True,
                    default=shots,
                    show_default=True,
                    type=click.IntRange(min=1),
                    callback=_once,
                    help="Labelled rows of a class, one number or several.",
                ),
                click.option(
                    "--seeds",
                    default=3,
                    show_default=True,
                    type=click.IntRange(min=1),
                    help="Draws of the shots.",
                ),
                click.option(
                    "--out",
                    required=True,
                    type=click.Path(),
                    help="Folder of the tables; runs that it has are not done again.",
                ),
                click.option(
                    "--epochs",
                    type=click.IntRange(min=1),
                    help="Of the prompt learners' training.  [default: as in `train-head`]",
                ),
                tower_options,
                device_option,
                json_option,
            )
        ):
            command = option(command)
        return command

    return add


@click.group("protocol")
def command() -> None:
    """Compare methods as papers do: over data sets, shots and seeds.

    A data set is FEATURES (see `solve`) with labels, text_features and the pools that shots are
    drawn from, support_* and perhaps validation_*; or a folder of the feature folders test/, train/
    and val/. --out receives table.md, table.parquet (mean and deviation over seeds), runs.parquet
    and run.json. A killed protocol goes on where it stopped. The prompt learners coop, prograd,
    cocoop and plot also need class_names, and run the text tower of what encoded FEATURES.

    \b
    Example:
      transclip-fast protocol few-shot pets.npz dtd.npz --head taskres --shots 4 16 --out table
    """


@command.command("few-shot", cls=_Lists, short_help="Heads over numbers of shots.")
@click.argument("features", nargs=-1, required=True, type=click.Path())
@_options(tuple(x for x in (*HEADS, plans.TRANSCLIP_FS) if x not in WITHOUT_SHOTS), SHOTS)
def few_shot(
    features: tuple[str, ...],
    **options: Any,
) -> None:
    """Train each head on a few shots of each class, and put TransCLIP on top.

    Shots are drawn from the support rows, the same for every head, and up to four validation rows a
    class choose hyperparameters. The head transclip-fs is TransCLIP with the shots as its own
    support; prompt-ensemble takes no shots, and TransCLIP on top is the zero-shot one.

    \b
    Example:
      transclip-fast protocol few-shot pets.npz --head taskres transclip-fs \\
          --shots 1 2 4 8 16 --seeds 3 --out table
    """

    def plan(trials: Trials, notes: list[str]) -> list[Run]:
        sets = _load(features, trials, options, pools=True)
        _note_shortages(sets, trials, notes)
        return plans.few_shot(sets, trials)

    _carry_out(plan, options)


@command.command("base-to-new", cls=_Lists, short_help="From half of the classes to the others.")
@click.argument("features", nargs=-1, required=True, type=click.Path())
@_options(("clip-adapter",), (16,))
def base_to_new(
    features: tuple[str, ...],
    **options: Any,
) -> None:
    """Train each head on the first half of the classes, and measure it on each half alone.

    Base classes are the first half (of an odd number one more), new ones the others; queries of
    one half are told apart among its own classes only, and TransCLIP goes on top of each. The
    table has base, new and their harmonic mean. Prompt learners go to the new classes with their
    names, clip-adapter with their texts; other heads are bound to the classes they were trained on.

    \b
    Example:
      transclip-fast protocol base-to-new pets dtd --head coop cocoop --shots 16 --out table
    """

    def plan(trials: Trials, notes: list[str]) -> list[Run]:
        sets = _load(features, trials, options, pools=True)
        _note_shortages([data.halves[0] for data in sets], trials, notes)
        return plans.base_to_new(sets, trials)

    _carry_out(plan, options)


@command.command("cross-dataset", cls=_Lists, short_help="From one data set to others.")
@click.argument("source", type=click.Path())
@click.argument("targets", nargs=-1, required=True, type=click.Path())
@_options(("clip-adapter",), (16,))
def cross_dataset(
    source: str,
    targets: tuple[str, ...],
    **options: Any,
) -> None:
    """Train each head on SOURCE and use it on TARGETS, which have other classes.

    Prompt learners go to TARGETS with the names of their classes, clip-adapter with their texts;
    other heads are bound to the classes they were trained on.

    \b
    Example:
      transclip-fast protocol cross-dataset imagenet pets dtd --head coop --out table
    """

    def plan(trials: Trials, notes: list[str]) -> list[Run]:
        (start,) = _load([source], trials, options, pools=True)
        _note_shortages([start], trials, notes)
        return plans.cross_dataset(start, _load(targets, trials, options), trials)

    _carry_out(plan, options)


@command.command("domains", cls=_Lists, short_help="From a data set to its variants.")
@click.argument("source", type=click.Path())
@click.argument("targets", nargs=-1, required=True, type=click.Path())
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
    source: str,
    targets: tuple[str, ...],
    subsets: tuple[tuple[str, str], ...],
    **options: Any,
) -> None:
    """Train each head on SOURCE and use it on TARGETS, which have all or some of its classes.

    \b
    Example:
      transclip-fast protocol domains imagenet.npz imagenet-v2.npz imagenet-a.npz \\
          --subset imagenet-a classes-of-a.txt --head taskres --out table
    """

    def plan(trials: Trials, notes: list[str]) -> list[Run]:
        (start,) = _load([source], trials, options, pools=True)
        _note_shortages([start], trials, notes)
        return plans.domains(start, _load(targets, trials, options), dict(subsets), trials)

    _carry_out(plan, options)


def _load(
    paths: Sequence[str], trials: Trials, options: Mapping[str, Any], *, pools: bool = False
) -> list[DataSet]:
    local = bool(WITH_PATCHES & set(trials.heads))
    return load_data(paths, pools=pools, device=options["device"], local=local)


def _note_shortages(sets: Sequence[DataSet], trials: Trials, notes: list[str]) -> None:
    for data in sets:
        for n in trials.shots:
            shortage = data.shortage(n)
            if shortage is not None:
                session.warn(notes, shortage)


class _Prompter:
    """Text tower, class names and settings of a prompt learner on a data set."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._named = {x: options[x] for x in ("device", "model", "pretrained", "precision")}
        self._epochs = options["epochs"]
        self._towers: dict[str, TextTower] = {}

    def __call__(self, data: DataSet, head: str) -> Prompting:
        if data.class_names is None:
            raise InputError(f"{data.path}: has no class_names, of which {head} makes prompts")
        key = json.dumps([data.encoder, data.dim], sort_keys=True)
        if key not in self._towers:
            self._towers[key] = load_tower(data, **self._named)
        context, schedule = SETTINGS[head]
        schedule = replace(schedule, epochs=self._epochs or schedule.epochs)
        return Prompting(self._towers[key], data.class_names, context, schedule)


def _carry_out(
    plan: Callable[[Trials, list[str]], list[Run]],
    options: Mapping[str, Any],
) -> None:
    """Do the runs, write the tables, and print them."""
    stages, out = session.Stages(), options["out"]
    folder = Path(out)
    trials = Trials(
        options["heads"],
        options["shots"],
        options["seeds"],
        lambda: TransCLIP(device=options["device"]),
        _Prompter(options),
    )
    with session.collected_warnings({}) as notes:
        with stages.time("load"):
            runs = plan(trials, notes)
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
                "warnings": notes,
            }
            with writing(out):
                _write_tables(folder, rows, table, text)
                _publish(folder / "run.json", lambda file: write_json(file, summary))
    written = f"written to {out}: {', '.join(FILES)}"
    session.print_summary(summary, f"{text}\n{written}", options["as_json"])


def _write_tables(
    folder: Path, rows: list[dict[str, Any]], table: list[dict[str, Any]], text: str
) -> None:
    flat = [
        {**row, "head_parameters": ", ".join(f"{k} {v:g}" for k, v in parameters.items())}
        for row in rows
        for parameters in [row["head_parameters"]]
    ]
    for name, content in (("runs", flat), ("table", table)):
        columns = pa.Table.from_pylist(content)
        _publish(folder / f"{name}.parquet", partial(pq.write_table, columns))
    _publish(folder / "table.md", lambda file: file.write_text(text, encoding="utf-8"))


def _publish(target: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name first, so that it is whole under its own."""
    with new_file(target) as unfinished:
        write(unfinished)
