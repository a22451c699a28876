"""The facts of a result: counts, accuracies, seconds and settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from transclip_fast.metrics import accuracy
from transclip_fast.report.view import View
from transclip_fast.store.results import CALIBRATED, TRANSCLIP


class Fact(NamedTuple):
    """A number of the summary, and a word about it."""

    name: str
    value: str
    note: str = ""


def facts(view: View) -> list[Fact]:
    """The summary of a result."""
    run, n = view.run, len(view)
    used = len(np.unique(view.labels))
    in_use = "" if used == run["n_classes"] else f"{used:,} in use"
    found = [Fact("images", f"{n:,}"), Fact("classes", f"{run['n_classes']:,}", in_use)]
    if view.labelled_by != TRANSCLIP:
        found.append(Fact("labelled by", view.labelled_by))
    if view.truth is not None and (view.truth >= 0).any():
        found.append(_accuracy(view, view.truth))
    changed = int((view.labels != view.zero_shot).sum())
    found.append(
        Fact("labels changed", f"{changed:,}", f"{100 * changed / n:.1f} % of all, from zero-shot")
    )
    if view.before is not None:
        moved, back = int(view.moved.sum()), int(view.moved_back.sum())
        note = f"{moved:,} others moved, {back:,} of them back"
        found.append(Fact("corrected", f"{int(view.corrected.sum()):,}", note))
    elif view.known.any():
        found.append(Fact("known labels", f"{int(view.known.sum()):,}"))
    graph = run.get("graph")
    if isinstance(graph, Mapping) and (recall := numbers([graph.get("recall")])):
        note = f"{graph.get('search', '')} search"
        found.append(Fact("graph recall", f"{100 * recall[0]:.2f} %", note))
    if times := stages(run):
        note = ", ".join(f"{stage.name} {stage.value}" for stage in times)
        found.append(Fact("time", f"{sum(_seconds(run).values()):.1f} s", note))
    return found


def legend(view: View) -> str:
    """The meaning of the text under an image, in a sentence or two."""
    percent = (
        "about how likely that is right, in percent"
        if view.result.has(CALIBRATED)
        else "its confidence, which is too sure of itself"
    )
    was = "zero-shot's" if view.earlier is None else "that before the corrections, or zero-shot's"
    red = "" if view.truth is None else " Red: not the true label."
    return f"Under an image: its label, {percent}, after “was” {was}.{red}"


def _accuracy(view: View, truth: np.ndarray) -> Fact:
    what, labels = "zero-shot", view.zero_shot
    if view.earlier is not None:
        what, labels = "before", view.earlier
    labelled = int((truth >= 0).sum())
    of = "" if labelled == len(view) else f", of {labelled:,}"
    note = f"{what} {accuracy(labels, truth):.2f} %{of}"
    return Fact("accuracy", f"{accuracy(view.labels, truth):.2f} %", note)


def stages(run: Mapping[str, Any]) -> list[Fact]:
    """Seconds of each stage."""
    return [Fact(name, f"{value:.2f} s") for name, value in _seconds(run).items()]


def _seconds(run: Mapping[str, Any]) -> dict[str, float]:
    found = run.get("seconds")
    found = found if isinstance(found, Mapping) else {}
    return {name: value for name, value in found.items() if numbers([value])}


def numbers(values: Any) -> list[float]:
    """The values of a list in run.json if all of them are finite numbers, else none."""
    if not isinstance(values, list):
        return []
    plain = all(type(value) in (int, float) and math.isfinite(value) for value in values)
    return values if plain else []


def settings(run: Mapping[str, Any]) -> list[Fact]:
    """How it was solved."""
    shown = {"device": run.get("device"), "backend": run.get("backend"), **run.get("config", {})}
    if isinstance(run.get("graph"), Mapping):
        shown |= {f"graph: {name}": value for name, value in run["graph"].items()}
    if isinstance(run.get("truncation"), Mapping):
        shown |= {f"sparse: {name}": value for name, value in run["truncation"].items()}
    return [Fact(name, _plain(value)) for name, value in shown.items()]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
