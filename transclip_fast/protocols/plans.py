"""Which runs each protocol has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from transclip_fast.encode.sources import plain_name
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.heads import TRANSFERABLE, check_head
from transclip_fast.heads.base import Head
from transclip_fast.protocols.data import DataSet
from transclip_fast.protocols.runs import Row, Run, measure, measure_few_shot, timed, train_head
from transclip_fast.protocols.table import BASE, NEW
from transclip_fast.store.features import read_names

TRANSCLIP_FS = "transclip-fs"


@dataclass(frozen=True)
class Target:
    """
    Where a trained head is measured.

    Parameters
    ----------
    data : DataSet
    columns : dict
        That tell it from others.
    move : callable
        The trained head to the same over the classes of `data`.
    classes : list of int, optional
        The classes of the source that these are.
    """

    data: DataSet
    columns: dict[str, Any]
    move: Callable[[Head], Head]
    classes: list[int] | None = None


def few_shot(
    sets: Sequence[DataSet],
    heads: Sequence[str],
    shots: Sequence[int],
    seeds: int,
    model: Callable[[], TransCLIP],
) -> list[Run]:
    """
    Each head trained on so many shots a class, and TransCLIP on top of it.

    "transclip-fs" among the heads is TransCLIP with the shots as its own support.
    """
    for name in heads:
        if name != TRANSCLIP_FS:
            check_head(name)

    def work(data: DataSet, name: str, n: int, seed: int) -> Callable[[], Row]:
        def run() -> Row:
            if name == TRANSCLIP_FS:
                return measure_few_shot(data, model(), n, seed)
            return measure(data, model(), *_train(data, name, n, seed, model))

        return run

    return [
        Run(
            {"protocol": "few-shot", "data": data.name, "head": name, "shots": n, "seed": seed},
            {"data": data.sha256},
            work(data, name, n, seed),
        )
        for data in sets
        for name in heads
        for n in shots
        for seed in range(seeds)
    ]


def base_to_new(
    sets: Sequence[DataSet],
    heads: Sequence[str],
    shots: Sequence[int],
    seeds: int,
    model: Callable[[], TransCLIP],
) -> list[Run]:
    """
    Each head trained on the first half of a data set's classes, and measured on either half alone.

    Source: Zhou et al. 2022, Conditional Prompt Learning for Vision-Language Models, section 4.1.
    """
    _check_transferable(heads)
    runs = []
    for data in sets:
        base, new = data.halves
        targets = [
            Target(base, {"data": data.name, "classes": BASE}, lambda head: head),
            Target(new, {"data": data.name, "classes": NEW}, _transfer_to(new)),
        ]
        runs += _transfers("base-to-new", base, targets, heads, shots, seeds, model)
    return runs


def cross_dataset(
    source: DataSet,
    targets: Sequence[DataSet],
    heads: Sequence[str],
    shots: Sequence[int],
    seeds: int,
    model: Callable[[], TransCLIP],
) -> list[Run]:
    """Each head trained on the source, with the texts of each target in place of the source's."""
    _check_transferable(heads)
    for target in targets:
        if target.text.shape[1] != source.text.shape[1]:
            raise InputError(
                f"{target.name}: has {target.text.shape[1]} dimensions, {source.name} "
                f"{source.text.shape[1]}; encode both with one model"
            )
    moved = [
        Target(target, {"source": source.name, "data": target.name}, _transfer_to(target))
        for target in targets
    ]
    return _transfers("cross-dataset", source, moved, heads, shots, seeds, model)


def domains(
    source: DataSet,
    targets: Sequence[DataSet],
    subsets: Mapping[str, str],
    heads: Sequence[str],
    shots: Sequence[int],
    seeds: int,
    model: Callable[[], TransCLIP],
) -> list[Run]:
    """
    Each head trained on the source, on targets that have some of its classes.

    Parameters
    ----------
    subsets : mapping
        Name of a target to a file of its classes' names, or of their positions in the source, one a
        line in the order of the target's labels; see `class_subset` for targets without.
    """
    for name in heads:
        check_head(name)
    unknown = sorted(subsets.keys() - {target.name for target in targets})
    if unknown:
        raise InputError(f"{unknown[0]}: is no target; give --subset a target's name and a file")
    moved = []
    for target in targets:
        classes = class_subset(source, target, subsets.get(target.name))
        columns = {"source": source.name, "data": target.name}
        moved.append(Target(target, columns, _restrict_to(classes), classes))
    return _transfers("domains", source, moved, heads, shots, seeds, model)


def class_subset(source: DataSet, target: DataSet, file: str | None) -> list[int]:
    """
    The source's class of each class of a target.

    From the lines of `file`; without one from the class names of both, and where one of them has
    none, the classes are the same.

    Raises
    ------
    InputError
        A class that the source does not have, or another number of classes.
    """
    n_source, n_target = len(source.text), len(target.text)
    if file is not None:
        names, origin = read_names(file), file
    elif source.class_names is not None and target.class_names is not None:
        names, origin = target.class_names, target.name
    elif n_source == n_target:
        return list(range(n_source))
    else:
        raise InputError(
            f"{target.name}: has {n_target} classes, {source.name} {n_source}, and class names are "
            f"missing; give --subset {target.name} FILE"
        )
    positions = {str(k): k for k in range(n_source)}
    if not all(name.isdecimal() for name in names):
        positions = {plain_name(name): k for k, name in enumerate(source.class_names or [])}
    found = []
    for line, name in enumerate(names, 1):
        position = positions.get(plain_name(name))
        if position is None:
            raise InputError(
                f"{origin}: class {line} ({name}) is none of the {n_source} of {source.name}"
            )
        found.append(position)
    if len(found) != n_target:
        raise InputError(
            f"{origin}: {len(found)} classes, but {target.name} has {n_target}; give one of them "
            "a line"
        )
    return found


def _check_transferable(heads: Sequence[str]) -> None:
    for name in heads:
        check_head(name)
        if name not in TRANSFERABLE:
            raise InputError(
                f"head {name} is bound to the classes it was trained on; choose one of "
                f"{', '.join(sorted(TRANSFERABLE))}"
            )


def _transfer_to(target: DataSet) -> Callable[[Head], Head]:
    return lambda head: head.transfer(target.text)


def _restrict_to(classes: list[int]) -> Callable[[Head], Head]:
    return lambda head: head.restrict(torch.tensor(classes))


def _transfers(
    protocol: str,
    source: DataSet,
    targets: Sequence[Target],
    heads: Sequence[str],
    shots: Sequence[int],
    seeds: int,
    model: Callable[[], TransCLIP],
) -> list[Run]:
    """Runs that train on the source, once for all targets, and measure on a target."""

    @cache
    def trained(name: str, n: int, seed: int) -> tuple[Head, float]:
        return _train(source, name, n, seed, model)

    def work(target: Target, name: str, n: int, seed: int) -> Callable[[], Row]:
        def run() -> Row:
            head, seconds = trained(name, n, seed)
            return measure(target.data, model(), target.move(head), seconds)

        return run

    return [
        Run(
            {"protocol": protocol, **target.columns, "head": name, "shots": n, "seed": seed},
            {
                "source": source.sha256,
                "data": target.data.sha256,
                "classes": target.classes,
            },
            work(target, name, n, seed),
        )
        for name in heads
        for n in shots
        for seed in range(seeds)
        for target in targets
    ]


def _train(
    data: DataSet, name: str, shots: int, seed: int, model: Callable[[], TransCLIP]
) -> tuple[Head, float]:
    return timed(lambda: train_head(data, name, shots, seed, model().logit_scale))
