"""Golden features (`TRANSCLIP_GOLDEN`), and how labels on them are compared."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.common import unit_rows
from bench.names import FEATURES


class Golden(NamedTuple):
    """Real features and labels, and assignments of the published code where there are any."""

    name: str
    features: np.ndarray  # (N, d)
    prototypes: np.ndarray  # (K, d)
    labels: np.ndarray  # (N,)
    published: np.ndarray | None  # z (N, K)


def golden_folder() -> Path:
    """Return the folder that `TRANSCLIP_GOLDEN` names."""
    return Path(os.environ["TRANSCLIP_GOLDEN"])


def problems() -> Iterator[Golden]:
    """Yield WHU-RS19 with its texts, Pets and DTD with validation means as prototypes."""
    for name in FEATURES:
        with np.load(golden_folder() / f"{name}.npz", allow_pickle=False) as arrays:
            if "image_features" in arrays:
                names = "image_features", "text_features", "labels", "official_assignments"
                yield Golden(name, *(arrays[x] for x in names))
                continue
            rows, labels = arrays["val_features"].astype(np.float64), arrays["val_labels"]
            means = np.stack([rows[labels == k].mean(0) for k in range(labels.max() + 1)])
            prototypes = unit_rows(means).astype(np.float32)
            yield Golden(name, arrays["test_features"], prototypes, arrays["test_labels"], None)


def accuracy(found: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of right labels in percent."""
    return 100 * float((found == labels).mean())


def effects(found: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, dict[str, float]]:
    """Return the accuracy of each variant's labels, and their share that differs from "default"."""
    return {
        name: {
            "accuracy": accuracy(labels_found, labels),
            "changed": float((labels_found != found["default"]).mean()),
        }
        for name, labels_found in found.items()
    }


def rows_of_each_class(
    labels: np.ndarray, sizes: tuple[int, ...], draw: np.random.Generator
) -> list[np.ndarray]:
    """Return disjoint groups of rows with `sizes` random rows of each class, class by class."""
    orders = [draw.permutation(np.flatnonzero(labels == k)) for k in range(labels.max() + 1)]
    ends = np.cumsum((0, *sizes))
    return [
        np.concatenate([order[start:stop] for order in orders]) for start, stop in pairwise(ends)
    ]
