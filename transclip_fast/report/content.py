"""The content of a page: galleries, images with all that is known of them, classes and flows."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from transclip_fast.errors import InputError
from transclip_fast.report.class_table import class_table
from transclip_fast.report.gallery import LISTED_FLOWS, Gallery, flows, galleries
from transclip_fast.report.thumbnails import Pictures, pictures_in, pictures_of, thumbnails
from transclip_fast.report.view import (
    PREDICT,
    Opinion,
    View,
    failures_in,
    feature_folder,
    opinions,
    solved_features,
)
from transclip_fast.store.feature_writer import FAILURES
from transclip_fast.store.features import Features
from transclip_fast.store.results import CALIBRATED, TRANSCLIP
from transclip_fast.store.tables import GUARDED

NEIGHBORS = 6  # of an image that are shown
SIDE, NEIGHBOR_SIDE = 160, 80  # pixels of a thumbnail
# Bytes of thumbnails and characters of a key, so that a page has at most 20 MB.
THUMBNAIL_BYTES, KEY_LENGTH = 8_000_000, 400
MOVED = "give `report --images` where they are"


@dataclass(frozen=True)
class Content:
    """The content of one page."""

    view: View
    galleries: list[Gallery]
    neighbors: Mapping[int, list[int]]  # around each row of the galleries
    opinions: Mapping[str, Mapping[int, Opinion]]  # of these rows, by "text", "mixture" and "joint"
    keys: Mapping[int, str | None]  # of all these rows
    thumbnails: Mapping[int, str]  # of those that have one: JPEGs in base64
    notes: list[str]  # what cannot be shown, and why

    @classmethod
    def of(cls, view: View, images: str | None = None) -> Content:
        """Choose and read what is shown; `images` are elsewhere than the features say."""
        shown, notes = galleries(view), list[str]()
        main = [*dict.fromkeys(row for gallery in shown for row in gallery.rows)]
        around = {row: view.neighbors(row, NEIGHBORS) for row in main}
        if not view.result.has("neighbors") and view.labelled_by != PREDICT:
            notes.append("Neighbours are not shown: the result does not hold them.")
        sides = dict.fromkeys((row for rows in around.values() for row in rows), NEIGHBOR_SIDE)
        sides = dict.fromkeys(main, SIDE) | {k: v for k, v in sides.items() if k not in around}
        keys, features, said = view.keys([*sides]), None, {"joint": view.joint(main)}
        try:
            features = solved_features(view)
            if view.labelled_by in (TRANSCLIP, PREDICT):
                said["text"], said["mixture"] = opinions(view.result, features, main)
        except InputError as error:
            notes.append(f"What text and mixture say alone is not shown: {error}.")
        notes += _about(view, features)
        pictures = _pictures(features, images, keys, notes)
        found, missing = thumbnails(pictures, sides.items(), THUMBNAIL_BYTES)
        for why, number in missing.most_common():
            remedy = f"; if they have moved, {MOVED}" if why.startswith("cannot be read") else ""
            notes.append(f"{number:,} of {len(sides):,} images are not shown: {why}{remedy}.")
        return cls(view, shown, around, said, keys, found, notes)

    def data(self) -> dict[str, Any]:
        """All this for the script of the page, as JSON."""
        view = self.view
        changes = flows(view, LISTED_FLOWS)
        images = {row: self._image(row) for row in self.keys}
        named = {k for change in changes for k in change[:2]}
        named |= {k for image in images.values() for k in _named(image)}
        return {
            "identity": self._identity(),
            "calibrated": view.result.has(CALIBRATED),
            "keyColumn": self._key_column(),
            "guarded": GUARDED,
            "commands": self._commands(),
            "classes": class_table(view, named),
            "images": images,
            "flows": changes,
            "galleries": [
                {**vars(gallery), "groups": [vars(group) for group in gallery.groups]}
                for gallery in self.galleries
            ],
        }

    def _image(self, row: int) -> dict[str, Any]:
        view, key = self.view, self.keys[row]
        found: dict[str, Any] = {
            "key": None if key is None else key[:KEY_LENGTH],
            "label": int(view.labels[row]),
            "confidence": _number(view.confidence[row]),
            "zeroShot": int(view.zero_shot[row]),
            "zeroShotConfidence": _number(view.zero_shot_confidence[row]),
        }
        if row in self.thumbnails:
            found["picture"] = self.thumbnails[row]
        if view.truth is not None and view.truth[row] >= 0:
            found["truth"] = int(view.truth[row])
        if view.known[row]:
            found["known"] = True
        if view.earlier is not None:
            found["earlier"] = int(view.earlier[row])
        if row in self.neighbors:
            found["neighbors"] = self.neighbors[row]
            for name, said in self.opinions.items():
                if row in said:
                    found[name] = [(k, _number(p)) for k, p in said[row]]
        return found

    def _identity(self) -> str:
        """A hash of this result alone, under which a browser keeps corrections."""
        view = self.view
        names = json.dumps([view.result.features_sha256, view.run["class_names"]])
        return hashlib.sha256(names.encode() + view.labels.tobytes()).hexdigest()

    def _key_column(self) -> str:
        """The column of a row in corrections: its key, unless keys are missing, shared or long."""
        keys = self.view.result.predictions.column("key")
        if keys.null_count or pc.count_distinct(keys).as_py() < len(keys):
            return "row"
        long = any(len(key or "") > KEY_LENGTH for key in self.keys.values())
        return "row" if long else "key"

    def _commands(self) -> list[str]:
        """The commands that solve again with the page's corrections, and show it; none if not."""
        solve = self.view.solve_again("corrections.csv")
        if solve is None:
            return []
        result = os.path.realpath(self.view.result.folder)
        look = ["report", solve[-1], "--before", result, "--out", "corrected.html"]
        return [shlex.join(["transclip-fast", *words]) for words in (solve, look)]


def _about(view: View, features: Features | None) -> list[str]:
    """Notes for the reader about the whole result."""
    notes = []
    if view.labelled_by == PREDICT:
        notes.append(
            "Labelled by predict: each row by itself, with the mixture of another result, and so "
            "without neighbours. Corrections are for a solve of these features."
        )
    elif view.labelled_by != TRANSCLIP:
        notes.append(
            f"Labelled by the method {view.labelled_by}, which takes no corrections; a solve with "
            f"method {TRANSCLIP} does."
        )
    if (folder := feature_folder(features)) is not None and (failed := failures_in(folder)):
        are = "image has" if failed == 1 else "images have"
        notes.append(
            f"{failed:,} {are} no label, as {'it' if failed == 1 else 'they'} could not be read; "
            f"{folder / FAILURES} says why."
        )
    return notes


def _pictures(
    features: Features | None,
    images: str | None,
    keys: Mapping[int, str | None],
    notes: list[str],
) -> Pictures | None:
    """Where the images are, as the user or the features say."""
    folder = feature_folder(features)
    if images is not None:
        return pictures_in(images, keys, folder)
    if folder is not None:
        return pictures_of(folder, keys)
    if features is not None:
        notes.append("Images are not shown: the features do not name their files.")
    return None


def _named(image: Mapping[str, Any]) -> Sequence[int]:
    """The classes that are named with an image."""
    own = [image[name] for name in ("label", "zeroShot", "truth", "earlier") if name in image]
    said = (k for name in ("text", "mixture", "joint") for k, _ in image.get(name, ()))
    return [*own, *said]


def _number(value: float) -> float:
    return round(float(value), 4)
