"""The protocols, and the runs of each."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from typing import Any

import torch

from transclip_fast.data.labels import UNKNOWN, label_positions
from transclip_fast.data.names import class_name, first_difference
from transclip_fast.data.patches import PatchedRows
from transclip_fast.data.texts import moved_text
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.heads import HEADS, LEARNERS, fit_head, method_named
from transclip_fast.heads.base import Head
from transclip_fast.heads.prompts import Prompting
from transclip_fast.heads.task import as_fit_arguments
from transclip_fast.protocols.data import DataSet, draw_shots, load_data
from transclip_fast.protocols.runs import Run, measure, measure_few_shot
from transclip_fast.protocols.table import BASE, NEW
from transclip_fast.store.features import LOCAL
from transclip_fast.store.names import place, read_names

TRANSCLIP_FS = "transclip-fs"


@dataclass(frozen=True)
class Trials:
    """The heads, shots and seeds that are tried on every data set."""

    heads: Sequence[str]
    shots: Sequence[int]  # of each class
    seeds: int  # number of draws of the shots
    device: str  # of TransCLIP
    prompter: Callable[[DataSet, str], Prompting]  # of a prompt learner for a data set

    @property
    def take_patches(self) -> bool:
        """True if a head takes patches."""
        methods = [method_named(name) for name in self.heads if name != TRANSCLIP_FS]
        return any(method.takes_patches for method in methods)

    def model(self) -> TransCLIP:
        """A new TransCLIP to put on top of a head."""
        return TransCLIP(device=self.device)

    def draws(self, head: str) -> list[tuple[int, int]]:
        """Shots and seed of each run of a head; one without shots if it takes none."""
        return [*product(self.shots, range(self.seeds))] if takes_shots(head) else [(0, 0)]

    def load(self, paths: Sequence[str], *, pools: bool = True) -> list[DataSet]:
        """Load data sets, with pools and with patches if a head takes them."""
        pools = pools and any(map(takes_shots, self.heads))
        return load_data(paths, pools=pools, device=self.device, local=self.take_patches)

    def prompting(self, data: DataSet, head: str) -> Prompting | None:
        """The prompting of a prompt learner; None for a head on features alone."""
        return self.prompter(data, head) if head in LEARNERS else None

    def train(self, data: DataSet, head: str, shots: int, seed: int) -> tuple[Head, float]:
        """A head trained on a data set, and the seconds that it took; 0 shots are none at all."""
        prompting, start = self.prompting(data, head), time.perf_counter()
        drawn = draw_shots(data.pools, shots, seed) if shots else {}
        if prompting is not None:  # prompt learners choose nothing by validation rows
            drawn.pop("validation", None)
        arrays = as_fit_arguments(drawn, patches=method_named(head).takes_patches)
        scale = self.model().logit_scale
        fitted = fit_head(
            head, data.text, **arrays, logit_scale=scale, seed=seed, prompting=prompting
        )
        return fitted, time.perf_counter() - start


def takes_shots(head: str) -> bool:
    """False if a head is made of texts alone, so that its rows are those of zero-shot."""
    return head == TRANSCLIP_FS or method_named(head).needs_shots


@dataclass(frozen=True)
class Target:
    """A data set on which trained heads are measured."""

    data: DataSet
    columns: dict[str, Any]  # identify it in the table
    classes: list[int] | None = None  # of the source; its own, other classes if None
    is_source: bool = False  # heads are trained on it

    def move(self, head: Head, prompting: Prompting | None) -> Head:
        """A trained head, over the classes of the data set."""
        if self.is_source:
            return head
        if self.classes is not None:
            return head.restrict(torch.tensor(self.classes))
        if prompting is None:
            return head.transfer(self.data.text)
        return head.for_classes(prompting.tower, self.data.class_names or [])


def few_shot(paths: Sequence[str], trials: Trials) -> list[Run]:
    """
    Each head trained on so many shots a class, and TransCLIP on top of it.

    "transclip-fs" among the heads is TransCLIP with the shots as its own support.
    """
    runs = []
    for data in trials.load(paths):
        target = Target(data, {"data": data.name}, is_source=True)
        runs += _runs("few-shot", data, [target], trials)
    return runs


def base_to_new(paths: Sequence[str], trials: Trials) -> list[Run]:
    """
    Each head trained on the first half of a data set's classes, and measured on each half alone.

    Source: Zhou et al. 2022, Conditional Prompt Learning for Vision-Language Models, section 4.1.
    """
    sets = trials.load(paths)
    _check_transferable(trials, sets)
    runs = []
    for data in sets:
        base, new = data.halves
        targets = [
            Target(base, {"data": data.name, "classes": BASE}, is_source=True),
            Target(new, {"data": data.name, "classes": NEW}),
        ]
        runs += _runs("base-to-new", base, targets, trials)
    return runs


def cross_dataset(path: str, targets: Sequence[str], trials: Trials) -> list[Run]:
    """Each head trained on a source, with the texts of each target in place of the source's."""
    (source,), sets = trials.load([path]), trials.load(targets, pools=False)
    _check_transferable(trials, sets)
    _check_dims(source, sets)
    moved = [Target(data, {"source": source.name, "data": data.name}) for data in sets]
    return _runs("cross-dataset", source, moved, trials)


def domains(
    path: str, targets: Sequence[str], subsets: Mapping[str, str], trials: Trials
) -> list[Run]:
    """
    Each head trained on a source, on targets that have some of its classes.

    `subsets` maps the name of a target to a file of its classes' names, or of their positions in
    the source, one a line in the order of the target's labels; see `class_subset` for others.
    """
    for name in trials.heads:
        method_named(name)
    (source,), sets = trials.load([path]), trials.load(targets, pools=False)
    unknown = sorted(subsets.keys() - {data.name for data in sets})
    if unknown:
        raise InputError(f"{unknown[0]}: is no target; give --subset a target's name and a file")
    _check_dims(source, sets)
    moved = []
    for data in sets:
        file = subsets.get(data.name)
        classes = class_subset(source, data, file)
        if file is not None or not (source.class_names and data.class_names):
            _check_order(source, data, classes, file or data.name)
        moved.append(Target(data, {"source": source.name, "data": data.name}, classes))
    return _runs("domains", source, moved, trials)


def class_subset(source: DataSet, target: DataSet, file: str | None) -> list[int]:
    """
    The source's class of each class of a target.

    It follows from the lines of `file`; without a file from the class names of both; without class
    names both have the same classes.
    """
    n_source, n_target = len(source.text), len(target.text)
    if file is not None:
        names, origin = read_names(file).names, file
    elif source.class_names is not None and target.class_names is not None:
        names, origin = target.class_names, target.name
    elif n_source == n_target:
        return list(range(n_source))
    else:
        raise InputError(
            f"{target.name}: has {n_target} classes, {source.name} {n_source}, and class names are "
            f"missing; give --subset {target.name} FILE"
        )
    known = source.class_names or [str(k) for k in range(n_source)]
    if first_difference(names, known) is None:  # also where two classes have one name
        return list(range(n_source))
    found = [*map(int, label_positions(names, known, lambda k: f"{origin}: {place(origin, k)}"))]
    if UNKNOWN in found:  # what is no label among labels
        k = found.index(UNKNOWN)
        raise InputError(f"{origin}: {place(origin, k)}: {names[k]!r} is no class of {source.name}")
    if len(found) != n_target:
        raise InputError(
            f"{origin}: {len(found)} classes, but {target.name} has {n_target}; give one of them "
            "a line"
        )
    return found


def _check_dims(source: DataSet, targets: Sequence[DataSet]) -> None:
    """Raise InputError unless source and targets are of one model, as far as their sizes tell."""
    for data in targets:
        if data.dim != source.dim:
            raise InputError(
                f"{data.name}: has {data.dim} dimensions, {source.name} {source.dim}; encode "
                "both with one model"
            )


def _check_order(source: DataSet, target: DataSet, classes: Sequence[int], origin: str) -> None:
    """Raise InputError if a class of the target has the text of another of these classes."""
    moved = moved_text(source.text[[*classes]], target.text)
    if moved is not None:
        k, other = moved
        taken = class_name(classes[k], source.class_names)
        raise InputError(
            f"{origin}: class {k} of {target.name} is taken as {taken!r} of {source.name}, whose "
            f"text is that of class {other}; give --subset {target.name} FILE with the classes in "
            "the order of its labels"
        )


def _check_transferable(trials: Trials, targets: Sequence[DataSet]) -> None:
    """Raise InputError unless all heads can move to the classes of the targets."""
    methods = (HEADS | LEARNERS).items()
    movable = sorted(name for name, known in methods if known.transfers or not known.needs_shots)
    for name in trials.heads:
        if name not in movable:
            raise InputError(
                f"head {name} is bound to the classes it was trained on; choose one of "
                f"{', '.join(movable)}"
            )
    for target in targets:
        if target.class_names is None and LEARNERS.keys() & {*trials.heads}:
            raise InputError(f"{target.name}: has no class_names to make prompts of")


def _check_source(source: DataSet, targets: Sequence[Target], trials: Trials) -> None:
    """Warn of classes with too few rows; refuse targets without the patches of the shots."""
    pool = source.pools.get("support")
    if pool is None:
        return
    for shots in trials.shots:
        shortage = pool.shortage(shots)
        if shortage is not None:
            warnings.warn(f"{source.name}: {shortage}", stacklevel=2)
    if trials.take_patches and isinstance(pool.features, PatchedRows):
        for target in targets:
            if target.data.patched is None:
                raise InputError(
                    f"{target.data.name}: has no local_features, which the shots of {source.name} "
                    "have; encode both with --local-features, or neither"
                )


def _hashes(data: DataSet, head: str) -> dict[str, str]:
    """The hashes of the arrays that a head takes: patches are there if any head takes them."""
    patches = head != TRANSCLIP_FS and method_named(head).takes_patches
    return {name: x for name, x in data.sha256.items() if patches or name not in LOCAL}


def _inputs(
    protocol: str, source: DataSet, target: Target, head: str, prompting: Prompting | None
) -> dict[str, Any]:
    """Everything that the outcome of a run depends on, beside its columns."""
    inputs: dict[str, Any] = {"data": _hashes(target.data, head)}
    names: list[Any] = [] if prompting is None else [[*prompting.class_names]]
    if protocol != "few-shot":  # there source and target are the same
        inputs |= {"source": _hashes(source, head), "classes": target.classes}
        names.append(target.data.class_names)
    if prompting is not None:
        inputs["prompting"] = {**prompting.identity, "class_names": names}
    return inputs


def _runs(protocol: str, source: DataSet, targets: Sequence[Target], trials: Trials) -> list[Run]:
    """The runs that train on the source, once for all targets, and measure on each target."""
    _check_source(source, targets, trials)
    # One is enough: the targets of a head come one after the other.
    trained = lru_cache(maxsize=1)(partial(trials.train, source))

    def work(target: Target, name: str, shots: int, seed: int) -> dict[str, Any]:
        if name == TRANSCLIP_FS:
            return measure_few_shot(target.data, trials.model(), shots, seed)
        if takes_shots(name):
            head, seconds = trained(name, shots, seed)
            moved = target.move(head, trials.prompting(source, name))
        else:
            moved, seconds = trials.train(target.data, name, shots, seed)
        return measure(target.data, trials.model(), moved, seconds)

    return [
        Run(
            {"protocol": protocol, **target.columns, "head": name, "shots": n, "seed": seed},
            _inputs(protocol, source, target, name, trials.prompting(source, name)),
            partial(work, target, name, n, seed),
        )
        for name in trials.heads
        for (n, seed), target in product(trials.draws(name), targets)
    ]
