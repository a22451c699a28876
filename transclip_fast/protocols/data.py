"""Data sets of a protocol: queries, labelled pools to draw shots from, and class texts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transclip_fast.data.checks import as_labelled_rows, as_labels, as_unit_rows
from transclip_fast.data.patches import PatchedRows
from transclip_fast.device import resolve_device
from transclip_fast.errors import InputError
from transclip_fast.graph.build import build_graph
from transclip_fast.heads import ensemble
from transclip_fast.heads.task import Labelled
from transclip_fast.solver.parameters import Parameters
from transclip_fast.store.features import Features, load_features
from transclip_fast.types import NeighborGraph

SPLITS = {"train": "support", "val": "validation"}  # sub-folder and what its rows are here
PARTS = {"features": "image_features", "labels": "labels", "local_features": "local_features"}
VALIDATION_SHOTS = 4  # a class has at most so many, as in CoOp and in the paper


@dataclass(frozen=True)
class Pool:
    """Labelled rows to draw from: `Labelled`, or the same whose patches are not read yet."""

    features: torch.Tensor | PatchedRows
    labels: torch.Tensor

    def rows(self, which: torch.Tensor | slice) -> Labelled:
        """Some of them."""
        return Labelled(self.features[which], self.labels[which])

    def of_classes(self, classes: range) -> Pool:
        """Those of some classes, counted from 0."""
        labels = self.labels.numpy()
        held = np.flatnonzero((labels >= classes.start) & (labels < classes.stop))
        features = self.features
        taken = features.take(held) if isinstance(features, PatchedRows) else features[held]
        return Pool(taken, self.labels[held] - classes.start)


@dataclass(frozen=True)
class DataSet:
    """
    A data set, ready to run.

    Parameters
    ----------
    name : str
    features : Tensor (N, d) float32
        Unit rows of the queries.
    labels : ndarray (N,) int64
    text : Tensor (K, d) float32
    class_names : list of str, optional
    pools : dict
        "support" and "validation" rows to draw from, where there are any.
    patched : PatchedRows, optional
        The queries with their patches.
    sha256 : dict
        Hash of every array.
    path : str
    encoder : dict, optional
        Model and weights that encoded it, where a manifest says so.
    device : torch.device
        Where neighbours are searched.
    """

    name: str
    features: torch.Tensor
    labels: np.ndarray
    text: torch.Tensor
    class_names: list[str] | None
    pools: dict[str, Pool]
    patched: PatchedRows | None
    sha256: dict[str, str]
    path: str
    encoder: dict[str, Any] | None
    device: torch.device

    @property
    def dim(self) -> int:
        """d."""
        return self.text.shape[1]

    @cached_property
    def graph(self) -> NeighborGraph:
        """Neighbours of the queries, the same for every run."""
        return build_graph(
            self.features, Parameters.n_neighbors, anchors=self.text, device=self.device
        )

    def draw(self, pool: str, shots: int, seed: int) -> Labelled | None:
        """
        Some rows of a pool, None where there is no such pool.

        See `draw`.
        """
        if pool not in self.pools:
            return None
        return draw(self.pools[pool], len(self.text), shots, seed)

    @cached_property
    def halves(self) -> tuple[DataSet, DataSet]:
        """
        The first half of the classes, of an odd number one more, and the others.

        Raises
        ------
        InputError
            There is one class only, or no query of one of the halves.
        """
        n_classes = len(self.text)
        if n_classes < 2:
            raise InputError(f"{self.name}: has one class, which makes no two halves")
        half = -(-n_classes // 2)
        return self.subset(range(half)), self.subset(range(half, n_classes))

    def subset(self, classes: range) -> DataSet:
        """
        The rows of some classes, counted from 0, and the texts of these alone.

        Raises
        ------
        InputError
            No query is of these classes.
        """
        held = np.flatnonzero((self.labels >= classes.start) & (self.labels < classes.stop))
        if not len(held):
            raise InputError(
                f"{self.name}: has no query of the classes {classes.start} to {classes.stop - 1}"
            )
        names = self.class_names
        return replace(
            self,
            features=self.features[held],
            labels=self.labels[held] - classes.start,
            text=self.text[classes.start : classes.stop],
            class_names=names and names[classes.start : classes.stop],
            pools={name: pool.of_classes(classes) for name, pool in self.pools.items()},
            patched=self.patched and self.patched.take(held),
        )

    def shortage(self, shots: int) -> str | None:
        """A warning where classes have fewer rows to draw from."""
        short = shortage(self.pools["support"], len(self.text), shots)
        return short and f"{self.name}: {short}"


def draw(rows: Pool, n_classes: int, shots: int, seed: int) -> Labelled:
    """
    Some labelled rows: `shots` of each class, all of a class that has fewer.

    A class's rows come in an order that follows from the seed and the class alone, so that more
    shots keep those of fewer.
    """
    taken = [
        np.random.default_rng([seed, k]).permutation(np.flatnonzero(rows.labels.numpy() == k))
        for k in range(n_classes)
    ]
    chosen = torch.from_numpy(np.concatenate([order[:shots] for order in taken]))
    return rows.rows(chosen)


def shortage(rows: Pool, n_classes: int, shots: int) -> str | None:
    """A warning where classes have fewer rows to draw from."""
    counts = torch.bincount(rows.labels, minlength=n_classes)
    short = int((counts < shots).sum())
    if not short:
        return None
    return (
        f"{short} of {len(counts)} classes have fewer than {shots} rows to draw from, at least "
        f"{int(counts.min())}; all of these are taken"
    )


def load_data(
    paths: Sequence[str], *, pools: bool, device: str = "cpu", local: bool = False
) -> list[DataSet]:
    """
    Data sets by their paths, each called by the name of its file or folder.

    Parameters
    ----------
    paths : sequence of str
        FEATURES with labels, text features and, for `pools`, support and perhaps validation rows;
        or a folder of the feature folders test/, train/ and val/, as `encode` makes them.
    pools : bool
        Shots will be drawn.
    device : str
        Where neighbours are searched.
    local : bool
        With the features of patches, where there are any.

    Raises
    ------
    InputError
        Something is missing or does not fit, or two data sets have one name.
    """
    chosen = resolve_device(device)
    found = [_load(path, pools, chosen, local) for path in paths]
    names = [data.name for data in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name}: two data sets have this name; rename one file or folder")
    return found


def _load(path: str, pools: bool, device: torch.device, local: bool) -> DataSet:
    try:
        return _checked(path, pools, device, local)
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path}: {error}") from error


def _checked(path: str, pools: bool, device: torch.device, local: bool) -> DataSet:
    stored = stored_splits(path, local=local)
    for name in ("labels", "text_features", *(("support_features",) if pools else ())):
        if stored.get(name) is None:
            raise InputError(f"has no {name}, which the protocol needs")
    origins = stored.origins
    text = ensemble(stored.get("text_features"))
    n_classes, d = text.shape
    features = as_unit_rows(stored.get("image_features"), origins["image_features"], columns=d)
    labels = as_labels(
        stored.get("labels"), origins["labels"], rows=len(features), n_classes=n_classes
    )
    names = stored.class_names
    if names is not None and len(names) != n_classes:
        raise InputError(f"{len(names)} class names for {n_classes} text features")
    return DataSet(
        name=Path(path).stem if os.path.isfile(path) else Path(os.path.realpath(path)).name,
        features=features,
        labels=labels.numpy(),
        text=text,
        class_names=names,
        pools=labelled_pools(stored, d, n_classes) if pools else {},
        patched=patched_rows(features, stored),
        sha256=stored.inputs_sha256(),
        path=str(path),
        encoder=stored.encoder,
        device=device,
    )


def labelled_pools(stored: Features, d: int, n_classes: int) -> dict[str, Pool]:
    """
    The support and validation rows that there are, as unit rows (M, d), or with their patches.

    Raises
    ------
    InputError
        As `as_labelled_rows` and `PatchedRows`.
    """
    found = {}
    for pool in SPLITS.values():
        arrays = [stored.get(f"{pool}_{kind}") for kind in ("features", "labels")]
        rows = as_labelled_rows(pool, arrays[0], arrays[1], d, n_classes)
        if rows is not None:
            patched = patched_rows(rows[0], stored, f"{pool}_")
            found[pool] = Pool(rows[0] if patched is None else patched, rows[1])
    return found


def patched_rows(rows: torch.Tensor, stored: Features, use: str = "") -> PatchedRows | None:
    """Unit rows (N, d) with their patches, where `stored` has any of that use."""
    name = f"{use}local_features"
    patches = stored.get(name)
    return None if patches is None else PatchedRows(rows, patches, name)


def stored_splits(
    path: str | Path,
    overrides: Mapping[str, str | None] | None = None,
    *,
    shots: int | None = None,
    local: bool = False,
) -> Features:
    """
    FEATURES, see `load_features`, or the feature folders test/, train/ and val/ put together.

    Raises
    ------
    InputError
        As `load_features`, and splits of different backbones.
    """
    path = Path(path)
    if not os.path.isdir(path / "test"):
        return load_features(path, overrides, shots=shots, local=local)
    stored = load_features(path / "test", overrides, local=local)
    given = {name for name, file in (overrides or {}).items() if file is not None}
    for split, pool in SPLITS.items():
        if not os.path.isdir(path / split) or f"{pool}_features" in given:
            continue
        part = load_features(path / split, local=local)
        if part.encoder != stored.encoder:
            raise InputError(f"{path / split}: was not encoded with the model of {path / 'test'}")
        for name, array in PARTS.items():
            if part.get(array) is not None and f"{pool}_{name}" not in given:
                stored.arrays[f"{pool}_{name}"] = part.get(array)
                stored.origins[f"{pool}_{name}"] = part.origins[array]
    return stored
