"""The data sets of a protocol: queries, pools of labelled rows to draw shots from, class texts."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transclip_fast.data.checks import as_labels, as_unit_rows
from transclip_fast.data.labelled_rows import LabelledRows, as_labelled_rows
from transclip_fast.data.names import first_difference
from transclip_fast.data.patches import PatchedRows
from transclip_fast.device import resolve_device
from transclip_fast.errors import InputError
from transclip_fast.graph.build import build_graph
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.heads import ensemble
from transclip_fast.heads.base import PrototypeHead
from transclip_fast.metrics import check_class_order
from transclip_fast.solver.parameters import Parameters
from transclip_fast.store.features import Features, check_encoder, load_features

POOLS = {"train": "support", "val": "validation"}  # of a folder of splits
SPLIT_ARRAYS = ("image_features", "labels", "local_features")
MAX_VALIDATION_SHOTS = 4  # of a class, as in CoOp and in the paper


@dataclass(frozen=True)
class Pool:
    """Rows to draw shots from; unlike `LabelledRows`, their patches can be on disk."""

    features: torch.Tensor | PatchedRows
    labels: torch.Tensor
    n_classes: int  # K

    def of_classes(self, classes: range) -> Pool:
        """The rows of some classes, counted from 0."""
        chosen, features = _rows_of(classes, self.labels.numpy()), self.features
        taken = features.take(chosen) if isinstance(features, PatchedRows) else features[chosen]
        return Pool(taken, self.labels[chosen] - classes.start, len(classes))

    def draw(self, shots: int | None, seed: int) -> LabelledRows:
        """
        That many rows of each class, all of a class that has fewer; without `shots` all rows.

        The order of a class's rows follows from the seed and the class alone, so that more shots
        include those of fewer.
        """
        if shots is None:
            return LabelledRows(self.features[:], self.labels)
        labels = self.labels.numpy()
        drawn = [
            np.random.default_rng([seed, k]).permutation(np.flatnonzero(labels == k))[:shots]
            for k in range(self.n_classes)
        ]
        chosen = torch.from_numpy(np.concatenate(drawn))
        return LabelledRows(self.features[chosen], self.labels[chosen])

    def shortage(self, shots: int) -> str | None:
        """A warning if classes have fewer rows than that."""
        counts = torch.bincount(self.labels, minlength=self.n_classes)
        n_short = int((counts < shots).sum())
        if not n_short:
            return None
        return (
            f"{n_short} of {self.n_classes} classes have fewer than {shots} rows to draw from, at "
            f"least {int(counts.min())}; all of these are taken"
        )


def draw_shots(pools: Mapping[str, Pool], shots: int | None, seed: int) -> dict[str, LabelledRows]:
    """Shots of each pool; at most 4 validation rows a class, unless all rows are taken."""
    fewer = None if shots is None else min(shots, MAX_VALIDATION_SHOTS)
    sizes = {"support": shots, "validation": fewer}
    return {use: pool.draw(sizes[use], seed) for use, pool in pools.items()}


@dataclass(frozen=True)
class DataSet:
    """A data set in memory, checked."""

    name: str
    features: torch.Tensor  # (N, d) float32, unit rows of the queries
    labels: np.ndarray  # (N,) int64
    text: torch.Tensor  # (K, d) float32
    class_names: list[str] | None
    pools: dict[str, Pool]  # "support" and "validation", if there are any
    patched: PatchedRows | None  # the queries with their patches
    sha256: dict[str, str]  # of every array
    path: str
    encoder: dict[str, Any] | None  # model and weights that encoded it, if a manifest names them
    device: torch.device  # of the neighbour search

    @property
    def dim(self) -> int:
        """d, of the features."""
        return self.text.shape[1]

    @cached_property
    def graph(self) -> NeighborGraph:
        """The neighbour graph of the queries, which all runs share."""
        return build_graph(self.features, Parameters.n_neighbors, device=self.device)

    @cached_property
    def halves(self) -> tuple[DataSet, DataSet]:
        """The first half of the classes (of an odd number one more) and the others."""
        n_classes = len(self.text)
        if n_classes < 2:
            raise InputError(f"{self.name}: has one class, which makes no two halves")
        half = -(-n_classes // 2)
        return self.subset(range(half)), self.subset(range(half, n_classes))

    def subset(self, classes: range) -> DataSet:
        """The data set of some classes alone; InputError if no query is of these."""
        chosen = _rows_of(classes, self.labels)
        if not len(chosen):
            raise InputError(
                f"{self.name}: has no query of the classes {classes.start} to {classes.stop - 1}"
            )
        names = self.class_names
        return replace(
            self,
            features=self.features[chosen],
            labels=self.labels[chosen] - classes.start,
            text=self.text[classes.start : classes.stop],
            class_names=names and names[classes.start : classes.stop],
            pools={name: pool.of_classes(classes) for name, pool in self.pools.items()},
            patched=self.patched and self.patched.take(chosen),
        )


def _rows_of(classes: range, labels: np.ndarray) -> np.ndarray:
    """The rows with these labels, in order."""
    return np.flatnonzero((labels >= classes.start) & (labels < classes.stop))


def load_data(
    paths: Sequence[str], *, pools: bool, device: str = "cpu", local: bool = False
) -> list[DataSet]:
    """
    Load data sets, by `load_splits`; the name of each is that of its file or folder.

    They have labels, text features and, for `pools`, support and perhaps validation rows that
    shots are drawn from; with `local` also patches, if there are any.

    Raises
    ------
    InputError
        Something is missing or does not fit, or two data sets have one name.
    """
    chosen = resolve_device(device)
    found: dict[str, DataSet] = {}
    for path in paths:
        try:
            data = _load(path, pools, chosen, local)
        except InputError as error:
            if str(error).startswith(str(path)):
                raise
            raise InputError(f"{path}: {error}") from error
        if data.name in found:
            raise InputError(
                f"{data.name}: two data sets have this name; rename one file or folder"
            )
        found[data.name] = data
    return [*found.values()]


def _load(path: str, pools: bool, device: torch.device, local: bool) -> DataSet:
    arrays = load_splits(path, local=local)
    for name in ("labels", "text_features", *(("support_features",) if pools else ())):
        if arrays.get(name) is None:
            raise InputError(f"has no {name}, which the protocol needs")
    origins = arrays.origins
    text = ensemble(arrays.get("text_features"))
    n_classes, d = text.shape
    features = as_unit_rows(arrays.get("image_features"), origins["image_features"], columns=d)
    labels = as_labels(
        arrays.get("labels"), origins["labels"], rows=len(features), n_classes=n_classes
    )
    names = arrays.class_names
    if names is not None and len(names) != n_classes:
        raise InputError(f"{len(names)} class names for {n_classes} text features")
    _warn_of_order(text, features, labels, origins["labels"])
    return DataSet(
        name=_name_of(Path(path)),
        features=features,
        labels=labels.numpy(),
        text=text,
        class_names=names,
        pools=labelled_pools(arrays, d, n_classes, text) if pools else {},
        patched=patched_rows(features, arrays),
        sha256=arrays.inputs_sha256(),
        path=str(path),
        encoder=arrays.encoder,
        device=device,
    )


def _name_of(path: Path) -> str:
    """The name of a data set: that of its file without the suffix, or of its folder."""
    is_folder = stat.S_ISDIR(os.stat(path).st_mode)  # of a disk that fails, isdir would be False
    return Path(os.path.realpath(path)).name if is_folder else path.stem


def labelled_pools(
    features: Features, d: int, n_classes: int, text: torch.Tensor | None = None
) -> dict[str, Pool]:
    """
    The pools of features: unit rows (M, d), with their patches if there are any.

    With the classes' texts (K, d), labels in another order than theirs are warned of.
    """
    found = {}
    for use in POOLS.values():
        arrays = features.get(f"{use}_features"), features.get(f"{use}_labels")
        rows = as_labelled_rows(use, *arrays, d, n_classes)
        if rows is not None:
            if text is not None:
                origin = features.origins[f"{use}_labels"]
                _warn_of_order(text, rows.features, rows.labels, origin)
            patched = patched_rows(rows.features, features, f"{use}_")
            pooled = rows.features if patched is None else patched
            found[use] = Pool(pooled, rows.labels, n_classes)
    return found


def _warn_of_order(
    text: torch.Tensor, features: torch.Tensor, labels: torch.Tensor, origin: str
) -> None:
    """Warn if labels of unit rows are in another order than the texts of the classes."""
    zero_shot = PrototypeHead(text=text, logit_scale=1.0).predict(features)
    for sign in check_class_order(zero_shot.numpy(), labels.numpy()):
        warnings.warn(f"{origin}: {sign}", stacklevel=2)


def patched_rows(rows: torch.Tensor, features: Features, use: str = "") -> PatchedRows | None:
    """Unit rows (N, d) with the patches of that use; None without any."""
    name = f"{use}local_features"
    patches = features.get(name)
    return None if patches is None else PatchedRows(rows, patches, name)


def load_splits(
    path: str | Path,
    overrides: Mapping[str, str | None] | None = None,
    *,
    shots: int | None = None,
    local: bool = False,
) -> Features:
    """
    FEATURES as of `load_features`, or the arrays of the feature folders test/, train/ and val/.

    Raises
    ------
    InputError
        As `load_features`, and for splits of different backbones.
    """
    path = Path(path)
    if not os.path.isdir(path / "test"):
        return load_features(path, overrides, shots=shots, local=local)
    features = load_features(path / "test", overrides, local=local)
    named = features.class_names
    replaced = {name for name, file in (overrides or {}).items() if file is not None}
    for split, use in POOLS.items():
        if not os.path.isdir(path / split) or f"{use}_features" in replaced:
            continue
        part = load_features(path / split, local=local)
        check_encoder(path / split, part.encoder, features)
        if (
            part.class_names
            and named
            and (k := first_difference(part.class_names, named)) is not None
        ):
            raise InputError(
                f"{path / split}: its class {k} is not that of {path / 'test'}; encode both with "
                "the same class names"
            )
        for array in SPLIT_ARRAYS:
            name = f"{use}_{array.removeprefix('image_')}"
            if part.get(array) is not None and name not in replaced:
                features.arrays[name], features.origins[name] = part.get(array), part.origins[array]
    return features
