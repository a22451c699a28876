"""Which runs each protocol has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from transclip_fast.data.patches import PatchedRows
from transclip_fast.encode.sources import plain_name
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.heads import LEARNERS, TRANSFERABLE, WITH_PATCHES, check_head
from transclip_fast.heads.prompts import Prompting
from transclip_fast.heads.prompts.cocoop import ConditionalHead
from transclip_fast.heads.prompts.coop import PromptHead
from transclip_fast.heads.prompts.plot import TransportHead
from transclip_fast.heads.task import Head
from transclip_fast.protocols.data import DataSet
from transclip_fast.protocols.runs import Row, Run, measure, measure_few_shot, timed, train_head
from transclip_fast.protocols.table import BASE, NEW
from transclip_fast.store.features import read_names

TRANSCLIP_FS = "transclip-fs"


@dataclass(frozen=True)
class Trials:
    """
    What is tried on every data set.

    Parameters
    ----------
    heads : sequence of str
    shots : sequence of int
        A class.
    seeds : int
        Draws of the shots.
    model : callable
        A new TransCLIP to put on top.
    prompter : callable
        Text tower, class names and settings with which a prompt learner trains on a data set.
    """

    heads: Sequence[str]
    shots: Sequence[int]
    seeds: int
    model: Callable[[], TransCLIP]
    prompter: Callable[[DataSet, str], Prompting]

    def prompting(self, data: DataSet, head: str) -> Prompting | None:
        """What a head needs beside the data set; None for one on features alone."""
        return self.prompter(data, head) if head in LEARNERS else None

    def train(self, data: DataSet, head: str, shots: int, seed: int) -> tuple[Head, float]:
        """A head trained on a data set, and the seconds that it took."""
        prompting, scale = self.prompting(data, head), self.model().logit_scale
        return timed(lambda: train_head(data, head, shots, seed, scale, prompting))


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
        A trained head, and its `Prompting` where it has one, to the same over the classes of
        `data`.
    classes : list of int, optional
        The classes of the source that these are.
    """

    data: DataSet
    columns: dict[str, Any]
    move: Callable[[Head, Prompting | None], Head]
    classes: list[int] | None = None


def few_shot(
    sets: Sequence[DataSet],
    trials: Trials,
) -> list[Run]:
    """
    Each head trained on so many shots a class, and TransCLIP on top of it.

    "transclip-fs" among the heads is TransCLIP with the shots as its own support.
    """
    for name in trials.heads:
        if name != TRANSCLIP_FS:
            check_head(name)

    for data in sets:
        _check_patches(trials.heads, data, [data])

    def work(data: DataSet, name: str, n: int, seed: int) -> Callable[[], Row]:
        def run() -> Row:
            if name == TRANSCLIP_FS:
                return measure_few_shot(data, trials.model(), n, seed)
            return measure(data, trials.model(), *trials.train(data, name, n, seed))

        return run

    return [
        Run(
            {"protocol": "few-shot", "data": data.name, "head": name, "shots": n, "seed": seed},
            {"data": data.sha256, **_identity(trials.prompting(data, name))},
            work(data, name, n, seed),
        )
        for data in sets
        for name in trials.heads
        for n in trials.shots
        for seed in range(trials.seeds)
    ]


def base_to_new(
    sets: Sequence[DataSet],
    trials: Trials,
) -> list[Run]:
    """
    Each head trained on the first half of a data set's classes, and measured on either half alone.

    Source: Zhou et al. 2022, Conditional Prompt Learning for Vision-Language Models, section 4.1.
    """
    _check_transferable(trials.heads, sets)
    runs = []
    for data in sets:
        base, new = data.halves
        targets = [
            Target(base, {"data": data.name, "classes": BASE}, lambda head, _: head),
            Target(new, {"data": data.name, "classes": NEW}, _transfer_to(new)),
        ]
        runs += _transfers("base-to-new", base, targets, trials)
    return runs


def cross_dataset(
    source: DataSet,
    targets: Sequence[DataSet],
    trials: Trials,
) -> list[Run]:
    """Each head trained on the source, with the texts of each target in place of the source's."""
    _check_transferable(trials.heads, targets)
    for target in targets:
        if target.dim != source.dim:
            raise InputError(
                f"{target.name}: has {target.dim} dimensions, {source.name} {source.dim}; encode "
                "both with one model"
            )
    moved = [
        Target(target, {"source": source.name, "data": target.name}, _transfer_to(target))
        for target in targets
    ]
    return _transfers("cross-dataset", source, moved, trials)


def domains(
    source: DataSet,
    targets: Sequence[DataSet],
    subsets: Mapping[str, str],
    trials: Trials,
) -> list[Run]:
    """
    Each head trained on the source, on targets that have some of its classes.

    Parameters
    ----------
    subsets : mapping
        Name of a target to a file of its classes' names, or of their positions in the source, one a
        line in the order of the target's labels; see `class_subset` for targets without.
    """
    for name in trials.heads:
        check_head(name)
    unknown = sorted(subsets.keys() - {target.name for target in targets})
    if unknown:
        raise InputError(f"{unknown[0]}: is no target; give --subset a target's name and a file")
    moved = []
    for target in targets:
        classes = class_subset(source, target, subsets.get(target.name))
        columns = {"source": source.name, "data": target.name}
        moved.append(Target(target, columns, _restrict_to(classes), classes))
    return _transfers("domains", source, moved, trials)


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


def _check_patches(heads: Sequence[str], source: DataSet, targets: Sequence[DataSet]) -> None:
    """Raise InputError where a head would be trained with patches that queries do not have."""
    if WITH_PATCHES & set(heads) and isinstance(source.pools["support"].features, PatchedRows):
        for target in targets:
            if target.patched is None:
                raise InputError(
                    f"{target.name}: has no local_features, which the shots of {source.name} have; "
                    "encode both with --local-features, or neither"
                )


def _check_transferable(heads: Sequence[str], targets: Sequence[DataSet]) -> None:
    movable = sorted(TRANSFERABLE | LEARNERS.keys())
    for name in heads:
        check_head(name)
        if name not in movable:
            raise InputError(
                f"head {name} is bound to the classes it was trained on; choose one of "
                f"{', '.join(movable)}"
            )
    for target in targets:
        if target.class_names is None and LEARNERS.keys() & set(heads):
            raise InputError(f"{target.name}: has no class_names to make prompts of")


def _transfer_to(target: DataSet) -> Callable[[Head, Prompting | None], Head]:
    def move(head: Head, prompting: Prompting | None) -> Head:
        if isinstance(head, PromptHead | ConditionalHead | TransportHead) and prompting:
            return head.for_classes(prompting.tower, target.class_names or [])
        return head.transfer(target.text)

    return move


def _restrict_to(classes: list[int]) -> Callable[[Head, Prompting | None], Head]:
    return lambda head, _: head.restrict(torch.tensor(classes))


def _identity(prompting: Prompting | None, *targets: DataSet) -> dict[str, Any]:
    """All that the outcome of a prompt learner depends on, beside its data."""
    if prompting is None:
        return {}
    return {
        "prompting": {
            "tower": prompting.tower.identity,
            "context": asdict(prompting.context),
            "schedule": asdict(prompting.schedule),
            "class_names": [list(prompting.class_names), *(data.class_names for data in targets)],
        }
    }


def _transfers(
    protocol: str,
    source: DataSet,
    targets: Sequence[Target],
    trials: Trials,
) -> list[Run]:
    """Runs that train on the source, once for all targets, and measure on a target."""
    _check_patches(trials.heads, source, [target.data for target in targets])

    @cache
    def trained(name: str, n: int, seed: int) -> tuple[Head, float]:
        return trials.train(source, name, n, seed)

    def work(target: Target, name: str, n: int, seed: int) -> Callable[[], Row]:
        def run() -> Row:
            head, seconds = trained(name, n, seed)
            moved = target.move(head, trials.prompting(source, name))
            return measure(target.data, trials.model(), moved, seconds)

        return run

    return [
        Run(
            {"protocol": protocol, **target.columns, "head": name, "shots": n, "seed": seed},
            {
                "source": source.sha256,
                "data": target.data.sha256,
                "classes": target.classes,
                **_identity(trials.prompting(source, name), target.data),
            },
            work(target, name, n, seed),
        )
        for name in trials.heads
        for n in trials.shots
        for seed in range(trials.seeds)
        for target in targets
    ]
