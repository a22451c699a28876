"""A result as arrays, and what its text, its mixture and its neighbours say of some rows."""

from __future__ import annotations

import csv
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from transclip_fast.data.checks import unit_sample, unread_matrix
from transclip_fast.errors import InputError, reading
from transclip_fast.solver.loop import predict
from transclip_fast.solver.prior import LinearPrior
from transclip_fast.store.feature_writer import FAILURES
from transclip_fast.store.features import Features, load_features
from transclip_fast.store.results import (
    CALIBRATED,
    TRANSCLIP,
    TRUTH,
    Result,
    load_mixture,
    load_result,
)

COLUMNS = (
    *("key", "label", "confidence", "zero_shot_label", "zero_shot_confidence"),
    *(CALIBRATED, "neighbors", "known", TRUTH),
)
TOP = ("top5_labels", "top5_confidences")
PREDICT = "predict"  # the kind of its results
SHOWN_CLASSES = 3  # of an opinion
SCORED_ROWS = 256  # at a time: 21,000 classes of each take 22 MB
Opinion = list[tuple[int, float]]  # classes and probabilities, the largest first


@dataclass(frozen=True)
class View:
    """A result, and one that its labels are compared with."""

    result: Result
    before: Result | None = None  # before corrections, of the same rows in the same order

    @classmethod
    def open(cls, folder: str | Path, before: str | None = None) -> View:
        """Read what a report needs; InputError if the two are not of the same rows."""
        result = load_result(folder, (*COLUMNS, *TOP))
        if before is None:
            return cls(result)
        earlier = load_result(before, COLUMNS)
        own, other = ((x.features_sha256, x.run["n_classes"]) for x in (result, earlier))
        if own != other or len(result) != len(earlier):
            raise InputError(f"{before}: is of other images or classes than {folder}")
        return cls(result, earlier)

    @property
    def run(self) -> dict[str, Any]:
        """run.json."""
        return self.result.run

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled_by(self) -> str:
        """The method that gave the labels, or `PREDICT`."""
        if self.run.get("kind") == PREDICT:
            return PREDICT
        method = self.run.get("method")
        return method if isinstance(method, str) else TRANSCLIP

    def path(self, path: str) -> str:
        """A path in run.json, which starts at the folder, as an absolute one."""
        return os.path.normpath(os.path.join(os.path.realpath(self.result.folder), path))

    def solve_again(self, corrections: str) -> list[str] | None:
        """
        The command that solves again with a file of corrections, into a folder beside the result.

        None if the result does not name its features, or its method takes none.
        """
        features = self.run.get("features")
        if not isinstance(features, str) or self.labelled_by != TRANSCLIP:
            return None
        out = f"{os.path.realpath(self.result.folder)}-corrected"
        words = ["solve", self.path(features), *(self.options or ())]
        return [*words, "--corrections", corrections, "--out", out]

    @property
    def options(self) -> list[str] | None:
        """The words of the options that it was solved with; None if the result does not say."""
        found = self.run.get("options")
        if not isinstance(found, list):
            return None
        words = []
        for option in found:
            known = isinstance(option, dict) and {*option} <= {"option", "value", "file"}
            if not known or not all(isinstance(text, str) for text in option.values()):
                return None
            words.append(option.get("option", ""))
            if "file" in option:
                words.append(self.path(option["file"]))
            elif "value" in option:
                words.append(option["value"])
        return words

    @functools.cached_property
    def labels(self) -> np.ndarray:
        return self.result.labels("label")

    @functools.cached_property
    def zero_shot(self) -> np.ndarray:
        return self.result.labels("zero_shot_label")

    @functools.cached_property
    def truth(self) -> np.ndarray | None:
        return self.result.labels(TRUTH) if self.result.has(TRUTH) else None

    @functools.cached_property
    def confidence(self) -> np.ndarray:
        return self.result.confidence()

    @property
    def confidence_name(self) -> str:
        """What `confidence` is: an estimate, or where there is none the solution's own."""
        return "how likely right" if self.result.has(CALIBRATED) else "confidence"

    @functools.cached_property
    def zero_shot_confidence(self) -> np.ndarray:
        return self.result.shares("zero_shot_confidence")

    @functools.cached_property
    def known(self) -> np.ndarray:
        """Whether the class of each row was given."""
        return self.result.flags("known")

    @functools.cached_property
    def earlier(self) -> np.ndarray | None:
        """Labels before the corrections."""
        return None if self.before is None else self.before.labels("label")

    @functools.cached_property
    def corrected(self) -> np.ndarray:
        """Rows whose class was given since `before`, or given otherwise."""
        if self.before is None or self.earlier is None:
            return np.zeros(len(self), bool)
        found: np.ndarray = self.known & (
            ~self.before.flags("known") | (self.labels != self.earlier)
        )
        return found

    @functools.cached_property
    def moved(self) -> np.ndarray:
        """Rows whose label has changed since `before`, without being corrected."""
        if self.earlier is None:
            return np.zeros(len(self), bool)
        found: np.ndarray = (self.labels != self.earlier) & ~self.corrected
        return found

    @functools.cached_property
    def moved_back(self) -> np.ndarray:
        """Those of them that have zero-shot's label again."""
        found: np.ndarray = self.moved & (self.labels == self.zero_shot)
        return found

    @functools.cached_property
    def links(self) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of neighbours in both directions, each once, sorted by the first."""
        lists = self.result.lists("neighbors", len(self))
        ends = lists.flatten().to_numpy()
        starts = np.repeat(np.arange(len(self)), pc.list_value_length(lists).to_numpy())
        codes = np.concatenate([starts * len(self) + ends, ends * len(self) + starts])
        codes.sort()
        first, second = np.divmod(codes[np.diff(codes, prepend=-1) > 0], len(self))
        return first, second

    def keys(self, rows: Sequence[int]) -> dict[int, str | None]:
        """The key of each of these rows."""
        column = pc.cast(self.result.predictions.column("key"), pa.string())
        found = column.take(list(rows)).to_pylist()
        return dict(zip(map(int, rows), found, strict=True))

    def neighbors(self, row: int, most: int) -> list[int]:
        """Rows linked to a row in either direction: its own list first, best first."""
        if not self.result.has("neighbors"):
            return []
        first, second = self.links
        start, stop = np.searchsorted(first, [row, row + 1])
        linked = second[start:stop].tolist()
        own = self.result.predictions.column("neighbors")[row].as_py()
        return [*own, *(other for other in linked if other not in own)][:most]

    def joint(self, rows: Sequence[int]) -> dict[int, Opinion]:
        """The most likely classes of each row."""
        columns = self.result.lists(TOP[0], self.run["n_classes"]), self.result.lists(TOP[1])
        labels, values = (column.take(pa.array(rows, pa.int64())).to_pylist() for column in columns)
        if [*map(len, labels)] != [*map(len, values)]:
            raise InputError(f"{self.result.folder}: {TOP[0]} are damaged; solve again")
        return {
            row: [*zip(some, sure, strict=True)][:SHOWN_CLASSES]
            for row, some, sure in zip(rows, labels, values, strict=True)
        }


def solved_features(view: View) -> Features:
    """The features that a result was solved from; InputError if they are gone or others."""
    path = view.run.get("features")
    if not isinstance(path, str):
        raise InputError("the result does not name its features; solve again")
    path = view.path(path)
    if not os.path.exists(path):
        raise InputError(f"the features are gone: {path}")
    features = load_features(path, shots=0 if os.path.isdir(path) else None)
    if features.sha256() != view.result.features_sha256:
        raise InputError(f"the features have changed, or a map was put on them: {path}")
    return features


def opinions(
    result: Result, features: Features, rows: Sequence[int]
) -> tuple[dict[int, Opinion], dict[int, Opinion]]:
    """The opinion of the text alone on each row, and that of the mixture; {} if unknown."""
    mixture, weights = load_mixture(result.folder)
    text = weights.get("zero_shot_weights", weights.get("prior_weights"))
    strength = result.run["config"].get("likelihood_weight")
    matrix = unread_matrix(features.get("image_features"), "image_features")
    by_text, by_mixture = dict[int, Opinion](), dict[int, Opinion]()
    for start in range(0, len(rows), SCORED_ROWS):
        some = rows[start : start + SCORED_ROWS]
        unit = unit_sample(matrix, torch.tensor(some))
        if text is not None:
            scores = LinearPrior(text).at(unit).exp()
            by_text |= _most_likely(some, scores)
        if isinstance(strength, int | float):
            prior = LinearPrior(torch.zeros_like(mixture.means, dtype=torch.float32))
            found = predict(unit, mixture, prior, likelihood_weight=strength, kl_weight=0.0)
            by_mixture |= _most_likely(some, torch.cat([*found]))
    return by_text, by_mixture


def _most_likely(rows: Sequence[int], scores: torch.Tensor) -> Mapping[int, Opinion]:
    best = scores.topk(min(SHOWN_CLASSES, scores.shape[1]), dim=1)
    classes, values = best.indices.tolist(), best.values.tolist()
    return {row: [*zip(classes[i], values[i], strict=True)] for i, row in enumerate(rows)}


def feature_folder(features: Features | None) -> Path | None:
    """The folder with the metadata of the features' images, if it is one."""
    if features is None or not (Path(features.path) / "metadata").is_dir():
        return None
    return Path(features.path)


def failures_in(folder: Path) -> int:
    """How many images of a feature folder could not be read."""
    file = folder / FAILURES
    if not file.exists():  # of other programs
        return 0
    with reading(file), open(file, newline="", encoding="utf-8") as lines:
        return sum(1 for _ in csv.DictReader(lines))
