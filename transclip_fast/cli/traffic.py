"""
Bytes that ranks send each other in a solve, by arithmetic: the steps of `ops.exchange`.

Where data decide, these are the most, spread evenly over the ranks: all neighbours of a row are on
other ranks, and no two rows of a rank share one while there are others; lists are full, and none
is in part that of the last sweep; and "auto" solves with and without a class cost.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from transclip_fast.cli.class_outlook import SAMPLE_ENTRIES
from transclip_fast.errors import InputError
from transclip_fast.memory import show_bytes
from transclip_fast.ops.exchange import Partition
from transclip_fast.solver.layout import START_BYTES, Layout, Size
from transclip_fast.solver.parameters import Parameters
from transclip_fast.solver.problem import ORDER_SAMPLE_ROWS, PRIOR_SAMPLE_ROWS
from transclip_fast.solver.runs import AGREEMENT_ROWS
from transclip_fast.solver.sharpened import sharpness_rows


@dataclass(frozen=True)
class Sender:
    """One rank, or all of them together."""

    size: Size
    ranks: int  # how many these are
    rows: int  # that they own
    sums: int  # how often they send a sum over all rows: up the tree, and to all

    def to_others(self, data: int) -> int:
        """Bytes of what each rank sends to all others."""
        return data * self.ranks * (self.size.ranks - 1)

    def picked(self, data: int) -> int:
        """Bytes of rows from all ranks, which each of them sends to all others."""
        return -(-data * self.rows // self.size.n_rows) * (self.size.ranks - 1)


@dataclass(frozen=True)
class Traffic:
    """The most bytes that ranks send in each stage of a solve (`bytes_sent`), and in "all"."""

    by_rank: dict[str, int]  # of the rank that sends most
    by_all: dict[str, int]  # of all together

    @classmethod
    def of(cls, size: Size, layout: Layout, parameters: Parameters) -> Traffic:
        """The traffic of a solve that is laid out."""
        partition, sums = size.partition, _sums(size.partition)
        firsts = [partition.first_row(rank) for rank in range(size.ranks + 1)]
        rows = [last - first for first, last in pairwise(firsts)]
        each = [Sender(size, 1, n, count) for n, count in zip(rows, sums, strict=True)]
        sent = [
            bytes_sent(sender, layout, parameters)
            for sender in (*each, Sender(size, size.ranks, size.n_rows, sum(sums)))
        ]
        for stages in sent:
            run = stages["start"] + parameters.max_iter * stages["step"] + stages["end"]
            stages["all"] = stages["load"] + (size.runs + size.undecided) * run + stages["write"]
        by_all = sent.pop()
        return cls({name: max(stages[name] for stages in sent) for name in by_all}, by_all)

    def table(self, network: float | None) -> str:
        """The traffic as text, a line a stage; with its seconds at so many bytes a second."""
        lines = [
            f"{'sent':<8}{'by a rank':>12}{'by all':>12}" + (f"{'takes':>12}" if network else "")
        ]
        for name, sent in self.by_rank.items():
            cells = [show_bytes(sent), show_bytes(self.by_all[name])]
            if network:
                cells.append(f"{sent / network:.3g} s")
            lines.append(f"{name:<8}" + "".join(f"{cell:>12}" for cell in cells))
        return "\n".join(lines)


def bytes_sent(sender: Sender, layout: Layout, parameters: Parameters) -> dict[str, int]:
    """
    Bytes that ranks send, at most, by stage.

    `load` and `write` are once; `start`, each `step` and `end` in each of `size.runs`, and in the
    second solve of one that is undecided.
    """
    size, picked, sums = sender.size, sender.picked, sender.sums
    n, n_classes, d, k = size.n_rows, size.n_classes, size.dim, size.n_neighbors
    remote = size.most_remote * sender.rows  # rows of others; as often own ones are in halos
    prior = 4 * (d if size.linear else n_classes)  # of a row
    few = min(n, PRIOR_SAMPLE_ROWS)
    charged = parameters.class_cost is not False

    load = sender.to_others(16 * k * size.labelled)
    if size.known:
        load += 8 * ((n_classes + 1) * (d + 1) - 1) * sums
        load += picked(4 * d * min(n, ORDER_SAMPLE_ROWS))
    if not size.linear:
        shown = max(PRIOR_SAMPLE_ROWS, SAMPLE_ENTRIES // max(n_classes, d))
        sampled = few if layout.candidates is not None else 0
        load += picked(prior * (min(n, shown) + sampled + size.labelled))

    fetch, kept, more = 4 * n_classes * remote, 0, 0
    if layout.candidates is not None:
        kept = min(parameters.rank or layout.candidates, layout.candidates)
        fetch = (4 + 8 * kept) * remote + sender.to_others(8)  # as if all lists were new
        dropping = charged and size.linear  # of absent classes
        more = picked(4 * layout.candidates * few) if dropping else 0
    class_sums = 8 * n_classes * (d + 1) * sums
    scalars = 8 * (3 + (not size.linear) + bool(size.labelled)) * sums
    step = parameters.inner_iter * fetch + class_sums + scalars + more

    sample = min(n, sharpness_rows(n_classes))
    edges = 20 * k * sender.rows + 16 * remote if size.ranks > 1 else 0
    start = (
        sender.to_others(START_BYTES * n_classes + 16) + edges + 8 * (1 + n_classes + 2 * d) * sums
    )
    start += picked(4 * d * min(8, n) * n_classes + sample * (16 * k + 8 + prior)) + fetch
    if layout.candidates is not None:
        start += picked(few * (prior + 8 * kept))
    if charged:
        start += parameters.inner_iter * fetch + class_sums
    end = step + 8 * sums + 20 * remote + sender.to_others(4) + picked(8 * size.labelled)
    if size.undecided:  # by labels of neighbours and class sizes
        end += picked((16 * k + 8) * min(n, AGREEMENT_ROWS)) + 8 * n_classes * sums
    write = picked(20 * n) + 8 * d * sums
    return {"load": load, "start": start, "step": step, "end": end, "write": write}


def bytes_a_second(text: str) -> float:
    """The rate of "25GB/s"; K, M and G are powers of 1000, as networks count."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)B/s", text)
    if match is None or not float(match[1]):
        raise InputError(f"--network: expected a rate like 25GB/s, got {text!r:.60}")
    return float(match[1]) * 1000.0 ** " KMG".index(match[2] or " ")


def _sums(partition: Partition) -> list[int]:
    """How often each rank sends in a sum over all rows."""
    size = partition.ranks.size
    counts = [size - 1] + [0] * (size - 1)

    def join(low: int, high: int) -> None:
        if high - low < 2:
            return
        middle = (low + high) // 2
        giver = partition.owner(middle)
        counts[giver] += partition.owner(low) != giver
        join(low, middle)
        join(middle, high)

    join(0, partition.n_parts)
    return counts
