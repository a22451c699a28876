"""`transclip-fast protocol`: tables over data sets, shots and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq

from transclip_fast.cli import common
from transclip_fast.estimator import TransCLIP
from transclip_fast.heads import HEADS, WITHOUT_SHOTS
from transclip_fast.protocols import plans
from transclip_fast.protocols.data import DataSet, load_data
from transclip_fast.protocols.runs import Run, do_runs
from transclip_fast.protocols.table import markdown, summarise
from transclip_fast.store.atomic import check_replaceable, locked, publish_file, write_json, writing

SHOTS = (1, 2, 4, 8, 16)
NAMES = (*HEADS, plans.TRANSCLIP_FS)
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
                    help="Few-shot methods, one or several.",
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
                common.device_option,
                common.json_option,
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
    and run.json. A killed protocol goes on where it stopped.

    \b
    Example:
      transclip-fast protocol few-shot pets.npz dtd.npz --head taskres --shots 4 16 --out table
    """


@command.command("few-shot", cls=_Lists, short_help="Heads over numbers of shots.")
@click.argument("features", nargs=-1, required=True, type=click.Path())
@_options(tuple(name for name in NAMES if name not in WITHOUT_SHOTS), SHOTS)
def few_shot(
    features: tuple[str, ...],
    heads: tuple[str, ...],
    shots: tuple[int, ...],
    seeds: int,
    out: str,
    device: str,
    as_json: bool,
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

    def plan(model: Callable[[], TransCLIP], notes: list[str]) -> list[Run]:
        sets = load_data(features, pools=True, device=device)
        _note_shortages(sets, shots, notes)
        return plans.few_shot(sets, heads, shots, seeds, model)

    _carry_out(plan, out, device, as_json)


@command.command("base-to-new", cls=_Lists, short_help="From half of the classes to the others.")
@click.argument("features", nargs=-1, required=True, type=click.Path())
@_options(("clip-adapter",), (16,))
def base_to_new(
    features: tuple[str, ...],
    heads: tuple[str, ...],
    shots: tuple[int, ...],
    seeds: int,
    out: str,
    device: str,
    as_json: bool,
) -> None:
    """Train each head on the first half of the classes, and measure it on each half alone.

    Base classes are the first half (of an odd number one more), new ones the others; queries of
    one half are told apart among its own classes only, and TransCLIP goes on top of each. The
    table has base, new and their harmonic mean. Only heads that are not bound to the classes they
    were trained on can do that.

    \b
    Example:
      transclip-fast protocol base-to-new pets.npz dtd.npz --shots 16 --out table
    """

    def plan(model: Callable[[], TransCLIP], notes: list[str]) -> list[Run]:
        sets = load_data(features, pools=True, device=device)
        _note_shortages([data.halves[0] for data in sets], shots, notes)
        return plans.base_to_new(sets, heads, shots, seeds, model)

    _carry_out(plan, out, device, as_json)


@command.command("cross-dataset", cls=_Lists, short_help="From one data set to others.")
@click.argument("source", type=click.Path())
@click.argument("targets", nargs=-1, required=True, type=click.Path())
@_options(("clip-adapter",), (16,))
def cross_dataset(
    source: str,
    targets: tuple[str, ...],
    heads: tuple[str, ...],
    shots: tuple[int, ...],
    seeds: int,
    out: str,
    device: str,
    as_json: bool,
) -> None:
    """Train each head on SOURCE and use it on TARGETS, which have other classes.

    Only heads that are not bound to the classes they were trained on can do that.

    \b
    Example:
      transclip-fast protocol cross-dataset imagenet.npz pets.npz dtd.npz --out table
    """

    def plan(model: Callable[[], TransCLIP], notes: list[str]) -> list[Run]:
        start, others = _source_and_targets(source, targets, device)
        _note_shortages([start], shots, notes)
        return plans.cross_dataset(start, others, heads, shots, seeds, model)

    _carry_out(plan, out, device, as_json)


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
    heads: tuple[str, ...],
    shots: tuple[int, ...],
    seeds: int,
    out: str,
    device: str,
    as_json: bool,
) -> None:
    """Train each head on SOURCE and use it on TARGETS, which have all or some of its classes.

    \b
    Example:
      transclip-fast protocol domains imagenet.npz imagenet-v2.npz imagenet-a.npz \\
          --subset imagenet-a classes-of-a.txt --head taskres --out table
    """

    def plan(model: Callable[[], TransCLIP], notes: list[str]) -> list[Run]:
        start, others = _source_and_targets(source, targets, device)
        _note_shortages([start], shots, notes)
        return plans.domains(start, others, dict(subsets), heads, shots, seeds, model)

    _carry_out(plan, out, device, as_json)


def _source_and_targets(
    source: str, targets: Sequence[str], device: str
) -> tuple[DataSet, list[DataSet]]:
    (start,) = load_data([source], pools=True, device=device)
    return start, load_data(targets, pools=False, device=device)


def _note_shortages(sets: Sequence[DataSet], shots: Sequence[int], notes: list[str]) -> None:
    for data in sets:
        for n in shots:
            shortage = data.shortage(n)
            if shortage is not None:
                common.warn(notes, shortage)


def _carry_out(
    plan: Callable[[Callable[[], TransCLIP], list[str]], list[Run]],
    out: str,
    device: str,
    as_json: bool,
) -> None:
    """Do the runs, write the tables, and print them."""
    stages = common.Stages()
    folder = Path(out)
    with common.collected_warnings({}) as notes:
        with stages.time("load"):
            runs = plan(lambda: TransCLIP(device=device), notes)
        with locked(out):
            with writing(out):
                check_replaceable(folder, out, CONTENTS)
            with stages.time("runs"), common.progress("protocol", "runs") as show:
                rows = do_runs(runs, folder / "runs", show)
            table = summarise(rows)
            text = markdown(table)
            summary = {
                "kind": "protocol",
                "table": table,
                "runs": len(rows),
                "seconds": stages.seconds,
                "versions": common.versions(),
                "warnings": notes,
            }
            with writing(out):
                _write_tables(folder, rows, table, text)
                _publish(folder / "run.json", lambda file: write_json(file, summary))
    written = f"written to {out}: {', '.join(FILES)}"
    common.summarise(summary, f"{text}\n{written}", as_json)


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
    unfinished = target.with_name(f".{target.name}.partial")
    write(unfinished)
    publish_file(unfinished, target)
