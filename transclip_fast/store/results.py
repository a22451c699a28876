"""Result folders: predictions.parquet, mixture.safetensors and run.json."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save

from transclip_fast.errors import InputError
from transclip_fast.inputs import as_labels
from transclip_fast.mixture import Mixture
from transclip_fast.store.arrays import read_arrays
from transclip_fast.store.atomic import read_json, write_json
from transclip_fast.store.features import Features, inside, read_table

CONTENTS = frozenset({"predictions.parquet", "mixture.safetensors", "run.json"})
TOP = 5


@dataclass(frozen=True)
class Result:
    """A result folder: `run` is run.json, `predictions` the parquet table."""

    folder: Path
    run: dict[str, Any]
    predictions: pa.Table

    def labels(self, name: str) -> np.ndarray:
        """
        A column of class indices, (N,) int64.

        Raises
        ------
        InputError
            There is none of that name, or it holds something else.
        """
        file = self.folder / "predictions.parquet"
        if name not in self.predictions.column_names:
            raise InputError(f"{file}: has no column {name!r}; solve again")
        return as_labels(
            self.predictions.column(name).to_numpy(),
            f"{file}: {name}",
            rows=self.predictions.num_rows,
            n_classes=self.run["n_classes"],
        ).numpy()


def predictions_table(
    distributions: np.ndarray,
    zero_shot: tuple[np.ndarray, np.ndarray],
    features: Features,
    labels: np.ndarray | None = None,
) -> pa.Table:
    """
    One row a query: its label with its five most likely classes, and what zero-shot said.

    Parameters
    ----------
    distributions : ndarray (N, K) float32
    zero_shot : ndarray (N,), ndarray (N,)
        Labels and confidences.
    features : Features
        Source rows, keys and class names.
    labels : ndarray (N,), optional
        The truth, kept as `true_label`.
    """
    rows = np.arange(len(distributions))
    values, classes = _top(torch.from_numpy(distributions))
    label = classes[:, 0].numpy()
    names = np.asarray(features.class_names or [str(k) for k in range(distributions.shape[1])])
    columns = {
        "row": rows,
        "source_row": rows if features.source_rows is None else features.source_rows,
        "key": pa.array(features.keys or [None] * len(rows), pa.string()),
        "label": label,
        "label_name": pa.array(names[label], pa.string()),
        "confidence": values[:, 0].numpy(),
        "zero_shot_label": zero_shot[0],
        "zero_shot_confidence": zero_shot[1],
        "top5_labels": _lists(classes.numpy()),
        "top5_confidences": _lists(values.numpy()),
    }
    if labels is not None:
        columns["true_label"] = labels
    return pa.table(columns)


def save_result(
    folder: Path, table: pa.Table, run: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """Write the files of a result into a folder that `new_folder` gave."""
    pq.write_table(table, folder / "predictions.parquet")
    # As bytes: a full disk is then the OSError that it is everywhere else.
    (folder / "mixture.safetensors").write_bytes(save(tensors))
    write_json(folder / "run.json", run)


def load_result(path: str | Path) -> Result:
    """
    A result folder.

    Raises
    ------
    InputError
        Missing, not a result folder, or damaged.
    """
    run = load_run(path)
    file = inside(Path(path), "predictions.parquet")
    return Result(Path(path), run, read_table(file))


def load_run(path: str | Path) -> dict[str, Any]:
    """
    run.json of a result folder, with `n_classes`, `class_names` (or None) and `config`.

    Raises
    ------
    InputError
        Missing, not a result folder, or damaged.
    """
    folder = Path(path)
    if not os.path.isfile(folder / "run.json"):
        raise InputError(f"{path}: is not a result folder (no run.json); name one that solve wrote")
    file = inside(folder, "run.json")
    run = read_json(file)
    n_classes, names = run.get("n_classes"), run.setdefault("class_names", None)
    if not isinstance(n_classes, int) or not isinstance(run.get("config"), dict):
        raise InputError(f"{file}: has no n_classes or config; solve again")
    if names is not None and (
        not isinstance(names, list)
        or len(names) != n_classes
        or not all(isinstance(name, str) for name in names)
    ):
        raise InputError(f"{file}: class_names are not {n_classes} names; solve again")
    return run


def load_mixture(path: str | Path) -> tuple[Mixture, dict[str, torch.Tensor]]:
    """
    The fitted mixture of a result folder, and the tensors saved beside it.

    Raises
    ------
    InputError
        Missing, or damaged.
    """
    file = inside(Path(path), "mixture.safetensors")
    tensors = read_arrays(file)
    shape = tensors["means"].shape if "means" in tensors else ()
    for name, tensor in tensors.items():
        expected = shape[1:] if name == "variances" else shape
        if len(shape) != 2 or tensor.shape != expected or not tensor.isfinite().all():
            raise InputError(f"{file}: {name} is damaged; solve again")
    if "variances" not in tensors or not (tensors["variances"] > 0).all():
        raise InputError(f"{file}: means or variances are missing or damaged; solve again")
    return Mixture(tensors.pop("means"), tensors.pop("variances")), tensors


def _top(distributions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest entries (N, 5) of each row and their classes; of equal ones the first class."""
    n = min(TOP, distributions.shape[1])
    values, classes = distributions.topk(n, dim=1)
    tied = (distributions >= values[:, -1:]).sum(1) > n  # topk breaks ties as it likes
    tied |= (values[:, 1:] == values[:, :-1]).any(1)
    ordered = distributions[tied].sort(dim=1, descending=True, stable=True)
    classes[tied] = ordered.indices[:, :n]
    return values, classes


def _lists(array: np.ndarray) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    offsets = pa.array(np.arange(0, array.size + 1, array.shape[1], dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, flat)
