"""The plots of `bench.report`, one function each. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.names import GRAPH_ARMS, SPARSE_ARMS, SPEED_ARMS, counted_cores, most_memory

STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "legend.frameon": False,
}
OURS, BASELINE, OTHER = "#1b6ca8", "#555555", "#b0b0b0"
COLOURS = {
    "published": "#b23a48",
    "baseline": BASELINE,
    "baseline_compiled": "#999999",
    "dense_torch": "#e08e1b",
    "sparse_torch": "#3d9970",
    "sparse_numba": OURS,
    "sparse_triton": OURS,
    "default": "#7d5ba6",
}
Rows = list[dict[str, Any]]


def draw(name: str, rows: Rows, file: Path, description: str) -> None:
    """Draw the plot of that name to a PNG that carries a description."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        DRAWN[name](figure, rows)
        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Software": None, "Description": description}
        figure.savefig(file, dpi=120, metadata=metadata)


def machine(rows: Rows) -> str:
    """Return the processor or GPU of the newest line."""
    facts = max(rows, key=lambda row: str(row["date"]))["machine"]
    return str(facts["gpu"] or f"{counted_cores(facts)}, {facts['cpu']}")


def plain_numbers(axis: Any) -> None:
    """Write 5,000 and 0.2 on a logarithmic axis, not powers of ten."""
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.set_minor_formatter(lambda value, _: "")


def draw_speed(figure: Figure, rows: Rows) -> None:
    """Draw time and memory of each arm against N, at the machine, K and d with most sizes."""
    groups: dict[tuple[str, int, int], Rows] = {}
    for row in rows:
        key = str(row["machine"]["gpu"]), row["classes"], row["dim"]
        groups.setdefault(key, []).append(row)
    (_, classes, dim), shown = max(groups.items(), key=lambda group: len(group[1]))
    left, right = figure.subplots(1, 2)
    for arm, label in SPEED_ARMS.items():
        done = [(row["queries"], row["arms"][arm]) for row in shown if arm in row["arms"]]
        if not done:
            continue
        n = [queries for queries, _ in done]
        line = {"marker": "o", "color": COLOURS[arm], "label": label}
        left.plot(n, [found["median"] for _, found in done], **line)
        right.plot(n, [most_memory(found) / 1e9 for _, found in done], **line)
    for axes, what in ((left, "seconds"), (right, "peak memory, GB")):
        axes.set(xscale="log", yscale="log", xlabel="images N", ylabel=what)
        axes.set_xticks(sorted({row["queries"] for row in shown}))
        plain_numbers(axes.xaxis)
        plain_numbers(axes.yaxis)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(
        f"Labels of N images, search included; K = {classes:,}, d = {dim} ({machine(shown)})",
        fontsize=10,
    )


def bars(axes: Axes, names: list[str], values: list[float], what: str, form: str) -> None:
    """Draw horizontal bars with their values, ours in blue."""
    colours = [OURS if name.startswith("transclip_fast") else OTHER for name in names]
    drawn = axes.barh(names, values, color=colours)
    axes.bar_label(drawn, [format(value, form) for value in values], padding=3)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlim(0, 1.18 * max(values))
    axes.set_xlabel(what)


def draw_sparse(figure: Figure, rows: Rows) -> None:
    """Draw time and memory of the arms, from the line with most arms."""
    row = max(rows, key=lambda row: (len(row["arms"]), row["queries"]))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    arms = row["arms"]
    names = [SPARSE_ARMS[arm] for arm in arms]
    bars(left, names, [arm["median"] for arm in arms.values()], "seconds", ".2f")
    peaks = {SPARSE_ARMS[x]: arm["peak_bytes"] / 1e6 for x, arm in arms.items() if x != "gemms"}
    bars(right, list(peaks), list(peaks.values()), "MB beyond data and graph", ".0f")
    right.set_yticks([])
    right.set_ylim(left.get_ylim())
    sizes = f"N = {row['queries']:,}, K = {row['classes']:,}, d = {row['dim']}"
    figure.suptitle(f"A solve, graph given; {sizes} ({machine(rows)})", fontsize=10)


def draw_graph(figure: Figure, rows: Rows) -> None:
    """Draw the time of each search, with its recall."""
    row = max(rows, key=lambda row: int(row["queries"]))
    axes = figure.subplots()
    values = [arm["median"] for arm in row["arms"].values()]
    names = [GRAPH_ARMS[arm].replace("`", "") for arm in row["arms"]]
    drawn = axes.barh(names, values)
    for bar, arm in zip(drawn, row["arms"], strict=True):
        bar.set_color(OTHER if arm.startswith("faiss_") else OURS)
    texts = [f"{arm['median']:.2f}, recall {arm['recall']:.4f}" for arm in row["arms"].values()]
    axes.bar_label(drawn, texts, padding=3)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlim(0, 1.45 * max(values))
    axes.set_xlabel("core-seconds, one thread, median")
    sizes = f"{row['queries']:,} images, d = {row['dim']}"
    figure.suptitle(f"Three neighbours of {sizes} ({machine(rows)})", fontsize=10)


def draw_stream(figure: Figure, rows: Rows) -> None:
    """Draw time and peak memory against N, the memory beside the plan."""
    row = max(rows, key=lambda row: len(row["queries"]))
    left, right = figure.subplots(1, 2)
    n = row["queries"]
    for axes, what, key, unit in (
        (left, "seconds", "seconds", 1),
        (right, "peak memory, GB", "peak_bytes", 1e9),
    ):
        measured = [done[key] / unit for done in row["sizes"]]
        axes.plot(n, measured, label="measured", color=OURS, marker="o")
        if key == "peak_bytes":
            planned = [done["planned_bytes"] / unit for done in row["sizes"]]
            axes.plot(n, planned, label="planned", color=BASELINE, linestyle="--")
        axes.set(xlabel="images N", ylabel=what, xlim=(0, None), ylim=(0, None))
        axes.set_xticks([x for x in n if x >= max(n) / 5])  # the others are too close for text
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M")
    right.legend()
    sizes = f"K = {row['classes']:,}, d = {row['dim']}"
    figure.suptitle(
        f"Features read from files, graph given; {sizes} ({machine(rows)})", fontsize=10
    )


DRAWN: dict[str, Callable[[Figure, Rows], None]] = {
    "speed": draw_speed,
    "sparse": draw_sparse,
    "graph": draw_graph,
    "stream": draw_stream,
}
