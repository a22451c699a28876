"""Tables of a solve that several processes share, from the newest clean line of its bench."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from bench.tables import Row, clean_lines, newest, seconds, size, source, table, widest
from transclip_fast import TransCLIP
from transclip_fast.cli.plan import plan_of_size
from transclip_fast.cli.traffic import Traffic
from transclip_fast.memory import show_bytes
from transclip_fast.solver.parameters import Parameters

BILLION, RANKS = (10**9, 21_000, 1024), 64  # rows, classes, dimensions
GPUS = (("80GiB", 16), ("131GiB", 16), ("131GiB", 32))  # memory, and candidates for which it is
NETWORK = 25e9  # bytes a second that a rank sends
HEAD_BYTES, ENTRY_BYTES = 4, 8  # of a list, and of a class and its z
SHAPE = ("queries", "classes", "dim")
CASES = {  # of `bench.speed.placement`
    "made": "made, of which a third of the neighbours is random",
    "pets, random": "Oxford Pets, in random order",
    "pets, by class": "Oxford Pets, class by class",
}


def has(kind: str) -> Callable[[Row], bool]:
    """Return a test for lines of CPUs whose widest instructions are those."""
    return lambda line: widest(line) == kind


def ranks(folder: Path) -> str:
    """Tabulate core-seconds, memory and traffic by the number of processes."""
    # They decide what one process takes, beside which the others stand.
    kinds = sorted({widest(line) for line in clean_lines("ranks", folder)})
    rows = [
        row for kind in kinds for row in newest("ranks", *SHAPE, folder=folder, shown=has(kind))
    ]
    if not rows:
        return "Not recorded yet: `python -m bench.speed.ranks`."
    cells = [
        [
            widest(row),
            *(f"{row[x]:,}" for x in SHAPE),
            "a plain solve" if name == "plain" else name,
            seconds(arm["median"]),
            f"{arm['times_one_rank']:.2f}",
            size(arm["peak_bytes"]),
            "" if name.endswith("apart") else size(arm["sweep_bytes"]),
        ]
        for row in rows
        for name, arm in row["arms"].items()
    ]
    head = ["instructions", "N", "K", "d", "processes", "core time of all", "times that of one"]
    head += ["peak of a process", "sent a sweep, by all"]
    return table(head, cells) + "\n\n" + source(rows)


def sent_entries(row: Row) -> int:
    """Entries of z, each with its class, in the bytes that were sent of a row by the most ranks."""
    shared = [arm for name, arm in row["arms"].items() if name.isdecimal()]
    arm: dict[str, float] = shared[-1]
    return math.ceil((arm["sweep_bytes"] / arm["halo_rows"] - HEAD_BYTES) / ENTRY_BYTES)


def projection(folder: Path) -> str:
    """Tabulate what a solve of a billion images would take of each GPU."""
    rows = newest("ranks", *SHAPE, folder=folder)
    if not rows:
        return "Not recorded yet: `python -m bench.speed.ranks`."
    columns = [_projected(memory, kept, sent_entries(rows[-1])) for memory, kept in GPUS]
    cells = [[name, *(column[name] for column in columns)] for name in columns[0]]
    gpus = [f"{memory}, {kept} candidates" for memory, kept in GPUS]
    return table([f"each of {RANKS} GPUs", *gpus], cells)


def _projected(memory: str, kept: int, entries: int) -> dict[str, str]:
    """What a GPU with so much memory takes, by name."""
    model = TransCLIP(candidates=kept, memory=memory)
    plan = plan_of_size(BILLION, model, None, RANKS, torch.device("cuda"))
    found = {
        "images": f"{plan.size.own_rows:,}",
        "images of others, at most": f"{plan.size.most_remote * plan.size.own_rows:,}",
        "features": "held" if plan.layout.held else f"read {plan.passes} times",
        "memory of the GPU": show_bytes(plan.peak),
        "memory of its host": show_bytes(max(stage.host for stage in plan.stages)),
        "read and written": show_bytes(sum(stage.disk for stage in plan.stages)),
        "products": f"{sum(stage.work for stage in plan.stages) / 1e15:.2f} PFLOP",
    }
    for name, rank in (("lists full", kept), (f"{entries} entries of a list", entries)):
        sent = Traffic.of(plan.size, plan.layout, Parameters(rank=rank)).by_rank
        for part, stage in (("a step", "step"), ("in all", "all")):
            found[f"sent {part}, {name}"] = show_bytes(sent[stage])
            found[f"at {NETWORK / 1e9:.0f} GB/s {part}, {name}"] = seconds(sent[stage] / NETWORK)
    return found


def placement(folder: Path) -> str:
    """Tabulate remote neighbours, and bytes of a sweep, by how rows are placed."""
    rows = newest("placement", "case", folder=folder)
    if not rows:
        return "Not recorded yet: `python -m bench.speed.placement`."
    cells = []
    for row in rows:
        for number, placed in row["ranks"].items():
            consecutive = placed["consecutive"]["sweep_bytes"]
            shares = [f"{100 * found['remote']:.0f} %" for found in placed.values()]
            cells.append([CASES[row["case"]], f"{row['queries']:,}", number, *shares])
            cells[-1].append(f"{consecutive / 1e6:.1f} MB")
            for name in ("label", "list"):
                cells[-1].append(f"{placed[name]['sweep_bytes'] / consecutive:.2f}")
    head = [
        "features",
        "N",
        "processes",
        "neighbours of others: consecutive",
        "by label",
        "by list",
    ]
    head += ["sent a sweep, by all: consecutive", "by label, times", "by list, times"]
    return table(head, cells) + "\n\n" + source(rows)


BLOCKS = {"ranks": ranks, "projection": projection, "placement": placement}
