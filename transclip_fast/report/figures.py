"""The plots of a report, as SVG whose colours the page's style sheet decides."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from transclip_fast.report.facts import numbers
from transclip_fast.report.view import View

# Drawn with these colours, shown with variables of the style sheet.
INK, GRID, BEFORE, AFTER = "#010101", "#020202", "#030303", "#040404"
VARIABLES = {INK: "--muted", GRID: "--line", BEFORE: "--before", AFTER: "--after"}
SIZE = (3.7, 2.15)  # inches; the page scales them
STYLE: Any = {
    "figure.figsize": SIZE,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "transclip-fast",
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
BINS = 20  # of confidences
POINTS = 200  # of a curve
FONT_SIZE = re.compile(r"(\d+(?:\.\d+)?)px")


def figures(view: View) -> list[tuple[str, str]]:
    """A title and an SVG of each plot of the labels."""
    with rc_context(STYLE):
        title = view.confidence_name.capitalize()
        return [(title, _confidences(view)), ("Class sizes, largest first", _sizes(view))]


def solve_figures(view: View) -> list[tuple[str, str]]:
    """The same of how it was solved."""
    objective, changed = (numbers(view.run.get(name)) for name in ("objective", "changed"))
    if not objective:
        return []
    with rc_context(STYLE):
        return [("Objective and labels changed, by step", steps_plot(objective, changed))]


def steps_plot(objective: Sequence[float], changed: Sequence[float]) -> str:
    """The objective and the number of labels changed in each step, as SVG."""
    figure = Figure()
    axes = figure.add_subplot(xlabel="step", ylabel="objective")
    steps = np.arange(1, len(objective) + 1)
    axes.plot(steps, objective, color=AFTER, marker="o", markersize=2.5, linewidth=1.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(axis="y", useOffset=False)
    if len(changed) == len(steps):
        other = axes.twinx()
        other.bar(steps, changed, color=BEFORE, alpha=0.45, width=0.7)
        other.set_ylabel("labels changed")
        other.grid(visible=False)
        other.set_ylim(0, 1.05 * max(1, *changed))  # also where nothing has changed
        other.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_zorder(other.get_zorder() + 1)
        axes.patch.set_visible(False)
    return _svg(figure)


def _confidences(view: View) -> str:
    figure = Figure()
    axes = figure.add_subplot(xlabel=view.confidence_name, ylabel="% of images", xlim=(0, 1))
    edges = np.linspace(0, 1, BINS + 1)
    for values, colour, name in (
        (view.zero_shot_confidence, BEFORE, "zero-shot"),
        (view.confidence, AFTER, "now"),
    ):
        shares = np.histogram(values, edges)[0] / len(values) * 100
        axes.stairs(shares, edges, color=colour, fill=True, alpha=0.25)
        axes.stairs(shares, edges, color=colour, linewidth=1.4, label=name)
    axes.legend(loc="upper left")
    return _svg(figure)


def _sizes(view: View) -> str:
    figure = Figure()
    axes = figure.add_subplot(xlabel="class, by its size", ylabel="images")
    n_classes = view.run["n_classes"]
    for labels, colour, name in (
        (view.zero_shot, BEFORE, "zero-shot"),
        (view.labels, AFTER, "now"),
    ):
        sizes = np.sort(np.bincount(labels, minlength=n_classes))[::-1]
        _curve(axes, sizes, colour, name)
    axes.set_ylim(bottom=0)
    if n_classes <= POINTS:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.legend(loc="upper right" if n_classes <= POINTS else "lower left")
    return _svg(figure)


def _curve(axes: Axes, sizes: np.ndarray, colour: str, name: str) -> None:
    """Sizes (K,) by rank; of many some, evenly spaced on a logarithmic scale."""
    ranks = np.arange(1, len(sizes) + 1)
    if len(sizes) > POINTS:
        ranks = np.unique(np.geomspace(1, len(sizes), POINTS).round().astype(int))
        axes.set_xscale("log")
        axes.set_yscale("symlog")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.plot(ranks, sizes[ranks - 1], color=colour, linewidth=1.4, label=name)


def _svg(figure: Figure) -> str:
    """The figure without styles of its own, which the page's policy forbids."""
    content = io.StringIO()
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    text = content.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r' style="([^"]*)"', lambda match: _attributes(match[1]), text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    width, height = (72 * side for side in SIZE)
    return re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2).replace(
        "<svg ", f'<svg role="img" data-size="{width:g}x{height:g}" ', 1
    )


def _attributes(style: str) -> str:
    """Declarations of a style as attributes of an SVG element."""
    found = []
    for declaration in filter(None, map(str.strip, style.split(";"))):
        name, _, value = declaration.partition(":")
        if name == "font" and (size := FONT_SIZE.search(value)):
            name, value = "font-size", size[1]
        if name.strip() != "font-family":
            found.append(f' {name.strip()}="{value.strip()}"')
    return "".join(found)
