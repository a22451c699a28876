"""The page: one HTML file without any other, that a browser opens from disk."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from transclip_fast.errors import InputError
from transclip_fast.report.facts import facts, settings, stages
from transclip_fast.report.figures import figures
from transclip_fast.report.gallery import LISTED_FLOWS, Gallery, flows, galleries
from transclip_fast.report.thumbnails import Pictures, pictures_in, pictures_of, thumbnails
from transclip_fast.report.view import Opinion, View, feature_folder, opinions, solved_features
from transclip_fast.store.atomic import new_file, writing
from transclip_fast.store.corrections import GUARDED, label_texts
from transclip_fast.store.features import Features

NEIGHBORS = 6  # of an image that are shown
SIDE, NEIGHBOR_SIDE = 160, 80  # pixels of a thumbnail
# What a page may hold, so that it has at most 20 MB: bytes of thumbnails and of names, classes of
# the table, characters of a key.
THUMBNAIL_BYTES, NAME_BYTES, LISTED_CLASSES, KEY_LENGTH = 9_000_000, 4_000_000, 50_000, 400
WARNINGS, WARNING_LENGTH = 50, 1000


def write_report(
    result: str, out: str | Path, *, images: str | None = None, before: str | None = None
) -> dict[str, Any]:
    """
    Write the page of a result folder to the file `out`; what it shows, and its size in bytes.

    Parameters
    ----------
    result : str
        A result folder. Its features and images are read if they are where they were.
    out : path
    images : str, optional
        Folder, list or tars of the images, if they have moved.
    before : str, optional
        The result before corrections, with which the labels are compared.
    """
    view = View.open(result, before)
    shown = galleries(view)
    page, summary = _Page(view, shown, images).render()
    out = Path(out)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_file(out) as partial:
            partial.write_text(page, encoding="utf-8")
    return {**summary, "bytes": len(page.encode())}


class _Page:
    """What one page shows."""

    def __init__(self, view: View, shown: Sequence[Gallery], images: str | None) -> None:
        self.view, self.galleries = view, shown
        self.notes: list[str] = []  # what cannot be shown, and why
        main = dict.fromkeys(row for gallery in shown for row in gallery.rows)
        self.around = {row: view.neighbors(row, NEIGHBORS) for row in main}
        if "neighbors" not in view.result.predictions.column_names:
            self.notes.append("Neighbours are not shown: the result does not hold them.")
        near = dict.fromkeys(row for rows in self.around.values() for row in rows)
        self.main = [*main]
        self.rows = [*main, *(row for row in near if row not in main)]
        self.keys, self.joint = view.keys(self.rows), view.joint(self.main)
        features = self._features()
        self.text, self.mixture = self._opinions(features)
        pictures = self._pictures(features, images)
        wanted = [(row, SIDE if row in main else NEIGHBOR_SIDE) for row in self.rows]
        self.thumbnails, missing = thumbnails(pictures, wanted, THUMBNAIL_BYTES)
        self._note_missing(pictures, missing)

    def _features(self) -> Features | None:
        try:
            return solved_features(self.view.result)
        except InputError as error:
            self.notes.append(f"What text and mixture say alone is not shown: {error}.")
            return None

    def _opinions(
        self, features: Features | None
    ) -> tuple[Mapping[int, Opinion], Mapping[int, Opinion]]:
        if features is None:
            return {}, {}
        try:
            return opinions(self.view.result, features, self.main)
        except InputError as error:
            self.notes.append(f"What text and mixture say alone is not shown: {error}.")
            return {}, {}

    def _pictures(self, features: Features | None, images: str | None) -> Pictures | None:
        folder = feature_folder(features)
        if images is not None:
            return pictures_in(images, self.keys, folder)
        if folder is None:
            if features is not None:
                self.notes.append("Images are not shown: the features do not name their files.")
            return None
        return pictures_of(folder, self.keys)

    def _note_missing(self, pictures: Pictures | None, missing: Counter[str]) -> None:
        if pictures is None:
            return
        for why, number in missing.most_common():
            self.notes.append(f"{number:,} of {len(self.rows):,} images {why}.")

    def render(self) -> tuple[str, dict[str, Any]]:
        """The page as HTML, and a summary of it."""
        style, script = (_asset(f"page.{kind}") for kind in ("css", "js"))
        run, data = self.view.run, self._data()
        warnings = [str(text)[:WARNING_LENGTH] for text in run.get("warnings", [])]
        environment = Environment(
            loader=PackageLoader("transclip_fast.report", ""),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        page = environment.get_template(
            "page.html.j2"
        ).render(
            title=_title(self.view.result.folder),
            policy=_policy(style, script),
            style=Markup(style),  # noqa: S704 - of this package
            script=Markup(script),  # noqa: S704
            data=_json(data),
            facts=facts(self.view),
            stages=stages(run),
            settings=settings(run),
            figures=[(name, Markup(svg)) for name, svg in figures(self.view)],  # noqa: S704
            warnings=warnings[:WARNINGS],
            more_warnings=max(0, len(warnings) - WARNINGS),
            notes=self.notes,
            compared=self.view.before is not None,
        )
        shown = {gallery.name: len(gallery.rows) for gallery in self.galleries}
        return page, {"shown": shown, "thumbnails": len(self.thumbnails), "notes": self.notes}

    def _data(self) -> dict[str, Any]:
        view, column = self.view, self._key_column()
        n_classes = view.run["n_classes"]
        changes = flows(view.zero_shot, view.labels, n_classes, LISTED_FLOWS).tolist()
        images = {row: self._image(row) for row in self.rows}
        return {
            "keyColumn": column,
            "guarded": GUARDED,
            "command": self._command(),
            "classes": self._classes(changes, images),
            "images": images,
            "flows": changes,
            "galleries": [
                {
                    "name": gallery.name,
                    "title": gallery.title,
                    "text": gallery.text,
                    "groups": [vars(group) for group in gallery.groups],
                }
                for gallery in self.galleries
            ],
        }

    def _command(self) -> str | None:
        """What solves again with the corrections that the page saves."""
        if not isinstance(self.view.run.get("features"), str):
            return None
        folder = self.view.result.folder
        features = os.path.relpath(folder.resolve() / self.view.run["features"])
        out = folder.with_name(f"{folder.name}-corrected")
        words = ["solve", features, "--corrections", "corrections.csv", "--out", str(out)]
        return shlex.join(["transclip-fast", *words])

    def _key_column(self) -> str:
        """What names a row in corrections: its key, unless keys are missing, shared or long."""
        keys = self.view.result.predictions.column("key")
        if keys.null_count or pc.count_distinct(keys).as_py() < len(keys):
            return "row"
        long = any(len(key or "") > KEY_LENGTH for key in self.keys.values())
        return "row" if long else "key"

    def _image(self, row: int) -> dict[str, Any]:
        view, key, text = self.view, self.keys[row], self.view.zero_shot_confidence
        found: dict[str, Any] = {
            "key": None if key is None else key[:KEY_LENGTH],
            "label": int(view.labels[row]),
            "confidence": _number(view.confidence[row]),
            "zeroShot": int(view.zero_shot[row]),
            "zeroShotConfidence": None if text is None else _number(text[row]),
        }
        if row in self.thumbnails:
            found["picture"] = self.thumbnails[row]
        if view.truth is not None and view.truth[row] >= 0:
            found["truth"] = int(view.truth[row])
        if view.known[row]:
            found["known"] = True
        if view.earlier is not None:
            found["earlier"] = int(view.earlier[row])
        if row in self.around:
            found["neighbors"] = self.around[row]
            found["joint"] = _opinion(self.joint[row])
            for name, said in (("text", self.text), ("mixture", self.mixture)):
                if row in said:
                    found[name] = _opinion(said[row])
        return found

    def _classes(
        self, changes: Sequence[Sequence[int]], images: Mapping[int, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The table of classes, as columns; of too many those with the most images."""
        view, n_classes = self.view, self.view.run["n_classes"]
        before, now = (
            np.bincount(labels, minlength=n_classes) for labels in (view.zero_shot, view.labels)
        )
        listed = np.argsort(-(before + now), kind="stable")[:LISTED_CLASSES]
        if n_classes > LISTED_CLASSES:
            self.notes.append(f"Of {n_classes:,} classes {LISTED_CLASSES:,} are listed.")
        ids = np.union1d(listed, _named(changes, images)).astype(np.int64)
        sums = np.bincount(view.labels, view.confidence, minlength=n_classes)
        means = sums / np.maximum(now, 1)
        names = view.run["class_names"]
        texts = label_texts(names, n_classes)
        shown, texts = _short(
            [names[k] if names else f"class {k}" for k in ids], [texts[k] for k in ids], ids
        )
        columns: dict[str, Any] = {
            "id": ids.tolist(),
            "name": shown,
            # What corrections call a class, where that is not its name.
            "label": {
                i: text
                for i, (name, text) in enumerate(zip(shown, texts, strict=True))
                if text != name
            },
            "before": before[ids].tolist(),
            "now": now[ids].tolist(),
            "confidence": [_number(means[k]) if now[k] else None for k in ids],
        }
        if view.truth is not None:
            for name, labels in (("accuracyBefore", view.zero_shot), ("accuracy", view.labels)):
                columns[name] = _accuracies(labels, view.truth, n_classes, ids)
        return columns


def _accuracies(
    labels: np.ndarray, truth: np.ndarray, n_classes: int, ids: np.ndarray
) -> list[float | None]:
    """Share of the rows of each class in `ids` that have its label; None without rows."""
    known = truth >= 0
    rows = np.bincount(truth[known], minlength=n_classes)[ids]
    right = np.bincount(truth[known & (labels == truth)], minlength=n_classes)[ids]
    return [_number(a / b) if b else None for a, b in zip(right, rows, strict=True)]


def _named(changes: Sequence[Sequence[int]], images: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """The classes that the page names outside its table."""
    found = {k for change in changes for k in change[:2]}
    for image in images.values():
        found |= {
            image[name] for name in ("label", "zeroShot", "truth", "earlier") if name in image
        }
        for said in ("text", "mixture", "joint"):
            found |= {k for k, _ in image.get(said, ())}
    return sorted(found)


def _short(
    names: Sequence[str], texts: Sequence[str | None], ids: np.ndarray
) -> tuple[list[str], list[str | None]]:
    """Names that fit into `NAME_BYTES`, and what corrections call the classes of cut ones."""
    length = max(map(len, names))
    while len(json.dumps([name[:length] for name in names])) > NAME_BYTES:
        length //= 2
    cut = [name if len(name) <= length else f"{name[:length]}…" for name in names]
    numbers = label_texts(None, int(ids.max()) + 1)
    taken = set(names)
    called = [
        text if name == short else None if numbers[k] in taken else numbers[k]
        for k, name, short, text in zip(ids, names, cut, texts, strict=True)
    ]
    return cut, called


def _title(folder: Path) -> str:
    resolved = folder.resolve()
    return f"{resolved.parent.name}/{resolved.name}"


def _opinion(said: Opinion) -> list[tuple[int, float]]:
    return [(k, _number(p)) for k, p in said]


def _number(value: float) -> float:
    return round(float(value), 4)


def _json(data: Any) -> Markup:
    """JSON that ends no element and starts none; ASCII, so that no line separator is in it."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)  # noqa: S704 - escaped above


def _asset(name: str) -> str:
    return resources.files("transclip_fast.report").joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """A content security policy: nothing but this style, this script and pictures in the page."""
    hashes = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    ]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; "
        f"script-src 'sha256-{hashes[1]}'; base-uri 'none'; form-action 'none'"
    )
