"""What happened, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from transclip_fast.metrics import accuracy
from transclip_fast.report.view import View


class Fact(NamedTuple):
    """A number of the summary, and a word about it."""

    name: str
    value: str
    note: str = ""


def facts(view: View) -> list[Fact]:
    """The summary of a result."""
    run, n = view.run, len(view)
    found = [Fact("images", f"{n:,}"), Fact("classes", f"{run['n_classes']:,}", _used(view))]
    if run.get("accuracy") is not None:
        found.append(_accuracy(view))
    changed = int((view.labels != view.zero_shot).sum())
    found.append(Fact("labels changed", f"{changed:,}", f"{_percent(changed, n)} of all"))
    if view.before is not None:
        moved, back = int(view.moved.sum()), int(view.moved_back.sum())
        note = f"{moved:,} others moved, {back:,} of them back"
        found.append(Fact("corrected", f"{int(view.corrected.sum()):,}", note))
    elif view.known.any():
        found.append(Fact("known labels", f"{int(view.known.sum()):,}"))
    graph = run.get("graph")
    if isinstance(graph, Mapping) and isinstance(graph.get("recall"), int | float):
        note = f"{graph.get('search', '')} search"
        found.append(Fact("graph recall", f"{100 * graph['recall']:.2f} %", note))
    if times := stages(run):
        total = sum(run["seconds"].values())
        note = ", ".join(f"{stage.name} {stage.value}" for stage in times)
        found.append(Fact("time", f"{total:.1f} s", note))
    return found


def _accuracy(view: View) -> Fact:
    run = view.run
    start, what = run["zero_shot_accuracy"], "zero-shot"
    if view.truth is not None and view.earlier is not None:
        start, what = accuracy(view.earlier, view.truth), "before"
    labelled = run.get("n_labelled", len(view))
    of = "" if labelled == len(view) else f", of {labelled:,}"
    return Fact("accuracy", f"{run['accuracy']:.2f} %", f"{what} {start:.2f} %{of}")


def _used(view: View) -> str:
    used = len(np.unique(view.labels))
    return "" if used == view.run["n_classes"] else f"{used:,} in use"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def stages(run: Mapping[str, Any]) -> list[Fact]:
    """Seconds of each stage."""
    seconds = run.get("seconds", {})
    return [Fact(name, f"{value:.2f} s") for name, value in seconds.items()]


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
