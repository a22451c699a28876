"""Which images a report shows, and which to correct first: samples, however many there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from transclip_fast.data.feature_rows import evenly_spaced_rows
from transclip_fast.report.view import View
from transclip_fast.store.results import CALIBRATED, TRANSCLIP, Result

SUGGESTED, UNCERTAIN, MOVED = 30, 48, 48  # images
CHANGED, OF_FLOW = 80, 6  # images, until which flows are added, and of one flow
CLASSES, OF_CLASS = 24, 4  # the largest, and images of each
LISTED_FLOWS = 30


@dataclass(frozen=True)
class Group:
    """Rows with something in common: their label `after`, and also that `before`."""

    rows: list[int]
    before: int | None = None
    after: int | None = None
    size: int | None = None  # of how many these are


@dataclass(frozen=True)
class Gallery:
    """Groups of images under a title."""

    name: str  # of its tab
    title: str
    text: str
    groups: list[Group]
    size: int | None = None  # of how many these are a sample

    @property
    def rows(self) -> list[int]:
        return [row for group in self.groups for row in group.rows]


def suggested_rows(result: Result, n: int) -> np.ndarray:
    """
    At most `n` rows of a result whose class was not given, the first to correct first.

    These have the smallest z of their label: the solution wavers there. Of the choices that a
    result allows this one gains most, more than those by calibrated confidences, zero-shot or
    neighbours: `bench.accuracy.corrections`.
    """
    rows = np.flatnonzero(~result.flags("known"))
    return rows[np.argsort(result.shares("confidence")[rows], kind="stable")[:n]]


def flows(view: View, most: int) -> list[list[int]]:
    """[from, to, rows] of the most frequent changes of labels, most frequent first."""
    changed, n_classes = view.labels != view.zero_shot, view.run["n_classes"]
    codes = view.zero_shot[changed] * n_classes + view.labels[changed]
    pairs, sizes = np.unique(codes, return_counts=True)
    largest = np.argsort(-sizes, kind="stable")[:most]
    found: list[list[int]]
    found = np.stack([*np.divmod(pairs[largest], n_classes), sizes[largest]], axis=1).tolist()
    return found


def galleries(view: View) -> list[Gallery]:
    """The galleries of the page, in its order, without those that have no image."""
    return [gallery for gallery in _galleries(view) if gallery.rows]


def _galleries(view: View) -> Iterator[Gallery]:
    if view.before is not None:
        yield _marked("corrected", "Corrected", "Images whose class was given.", view.corrected)
        text = "Images that corrections gave another label, without being corrected themselves."
        yield _marked("moved", "Moved by corrections", text, view.moved & ~view.moved_back)
        text = "Images that corrections gave the label back that they had by zero-shot."
        yield _marked("back", "Moved back", text, view.moved_back)
    title = "Correct these first"
    text = "The solution is least settled here, however likely a label looks: correct these first."
    if view.labelled_by != TRANSCLIP:  # corrections would not spread
        title, text = "Check these first", "The labels with the lowest confidence."
    first = suggested_rows(view.result, SUGGESTED).tolist()
    yield Gallery("suggested", title, text, [Group(first)])
    yield Gallery(
        "changed",
        "Changed labels",
        "Samples of the most frequent changes from zero-shot.",
        [*_changes(view)],
        int((view.labels != view.zero_shot).sum()),
    )
    if view.result.has(CALIBRATED):  # else these are the first to correct
        rows = np.flatnonzero(~view.known)
        least = rows[np.argsort(view.confidence[rows], kind="stable")[:UNCERTAIN]]
        text = "The labels that are least likely to be right, by text, mixture and neighbours."
        yield Gallery("uncertain", "Least certain", text, [Group(least.tolist())])
    yield Gallery(
        "typical",
        "Most typical",
        "The most certain images of the largest classes.",
        [*_typical(view)],
    )


def _marked(name: str, title: str, text: str, marked: np.ndarray) -> Gallery:
    all_rows = np.flatnonzero(marked)
    rows = all_rows[evenly_spaced_rows(len(all_rows), MOVED).numpy()].tolist()
    return Gallery(name, title, text, [Group(rows)], len(all_rows))


def _changes(view: View) -> Iterator[Group]:
    """The largest flows, each with images from the most to the least certain."""
    shown = 0
    for before, after, size in flows(view, CHANGED):
        if shown >= CHANGED:
            return
        rows = np.flatnonzero((view.zero_shot == before) & (view.labels == after))
        rows = rows[np.argsort(-view.confidence[rows], kind="stable")]
        some = rows[evenly_spaced_rows(len(rows), OF_FLOW).numpy()]
        shown += len(some)
        yield Group(some.tolist(), before, after, size)


def _typical(view: View) -> Iterator[Group]:
    sizes = np.bincount(view.labels, minlength=view.run["n_classes"])
    for k in np.argsort(-sizes, kind="stable")[:CLASSES]:
        rows = np.flatnonzero(view.labels == k)
        by = view.zero_shot_confidence[rows], view.confidence[rows]
        certain = rows[np.lexsort(by)[::-1][:OF_CLASS]]
        if sizes[k]:
            yield Group(certain.tolist(), after=int(k), size=int(sizes[k]))
