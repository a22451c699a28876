"""The accuracies that RS-TransCLIP publishes, and ours on the same features.

CHECKOUT is a checkout of elkhouryk/RS-TransCLIP. Its results/*.csv have an accuracy of zero-shot
and one of TransCLIP for each data set, model and prompt; features lie beside them. Accuracies are
compared as numbers of right images. Rows are normalised as the authors' code does it, in the
precision of the file; where that is half precision, the solve is done again with rows normalised
in float32, and the largest effect of that alone is recorded.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.common import record
from transclip_fast import NeighborGraph, TransCLIP, build_graph
from transclip_fast.errors import InputError
from transclip_fast.store.arrays import inside, read_array

TABLES = "results_averageprompt.csv", "results_individualprompt.csv"
METHODS = "zero-shot", "TransCLIP"


class Accuracy(NamedTuple):
    """A published line: whose features, and both accuracies in percent."""

    features: str  # DATASET/MODEL/ARCHITECTURE
    prompt: str
    percent: tuple[float, float]  # of METHODS


class Images(NamedTuple):
    """The images of a data set and a model."""

    rows: np.ndarray  # (N, d)
    labels: np.ndarray  # (N,)
    graph: NeighborGraph


def published(results: Path) -> Iterator[Accuracy]:
    """Yield the published lines in the folder results/ of the checkout."""
    for name in TABLES:
        with inside(results, name).open(newline="") as file:
            reader = csv.reader(file)
            next(reader)  # the names of the columns
            for place, line in enumerate(reader, 2):
                try:
                    *of, prompt, zero_shot, transclip = line
                    accuracies = float(zero_shot), float(transclip)
                except ValueError as error:
                    raise InputError(f"{results / name}: line {place}: no accuracies") from error
                yield Accuracy("/".join(of), prompt, accuracies)


def unit_rows(file: Path, *, as_published: bool) -> np.ndarray:
    """Return rows (N, d) float32 of unit norm, divided by it in float32 or in their own type."""
    rows = read_array(file, "features")
    rows = rows if as_published else rows.float()
    unit: np.ndarray = (rows / rows.norm(dim=-1, keepdim=True)).float().numpy()
    return unit


@lru_cache(maxsize=2)  # the lines of a model follow each other
def images(folder: Path, as_published: bool) -> Images:
    """Read the images of a model, and search their neighbours."""
    rows = unit_rows(inside(folder, "images.pt"), as_published=as_published)
    labels = read_array(inside(folder, "classes.pt"), "labels").numpy()
    return Images(rows, labels, build_graph(rows))


def right_images(folder: Path, prompt: str, *, as_published: bool = True) -> tuple[int, int]:
    """Return how many images zero-shot and TransCLIP label right, as METHODS."""
    found = images(folder, as_published)
    file = inside(folder, f"texts_{prompt.replace(' ', '_')}.pt")
    texts = unit_rows(file, as_published=as_published)
    model = TransCLIP(class_cost=False, device="cpu")
    model.fit(found.rows, text_features=texts, graph=found.graph)
    labels = model.zero_shot_labels_, model.transduction_
    zero_shot, transclip = (int((label == found.labels).sum()) for label in labels)
    return zero_shot, transclip


def compare(results: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Compare every published line whose features are there; what is recorded."""
    equal, differing, absent = [0, 0], [], 0
    effects: list[tuple[int, str]] = []
    for line in published(results):
        folder = inside(results, line.features)
        if not (folder / "images.pt").is_file():
            absent += 1
            continue
        n_images = len(images(folder, True).labels)
        ours = right_images(folder, line.prompt)
        for place, method in enumerate(METHODS):
            theirs = line.percent[place] * n_images / 100
            if abs(theirs - ours[place]) < 0.5:
                equal[place] += 1
                continue
            text = f"{line.features}, {line.prompt}: {method}"
            differing.append({"of": text, "published": round(theirs), "ours": ours[place]})
            say(f"{text} has {ours[place]} right of {n_images:,}, published {theirs:.0f}")
        if read_array(folder / "images.pt", "features").dtype == torch.float16:
            again = right_images(folder, line.prompt, as_published=False)
            effects.append((abs(again[1] - ours[1]), f"{line.features}, {line.prompt}"))
    moved, where = max(effects, default=(0, ""))
    return {
        "equal": dict(zip(METHODS, equal, strict=True)),
        "differing": differing,
        "without_features": absent,
        "float32_norms": {
            "compared": len(effects),
            "changed": sum(change > 0 for change, _ in effects),
            "most_images": moved,
            "at": where,
        },
    }


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Compare, record and print; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.published", description=__doc__)
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT")
    results = parser.parse_args(arguments).checkout / "results"
    try:
        found = compare(results, say)
    except (InputError, OSError) as error:
        say(f"error: {error}")
        return 2
    record("published", found)
    for method, number in found["equal"].items():
        others = sum(row["of"].endswith(f": {method}") for row in found["differing"])
        say(f"{method}: {number:,} accuracies equal, {others} differing")
    if found["without_features"]:
        say(f"{found['without_features']:,} published lines have no features here")
    norms = found["float32_norms"]
    if norms["compared"]:
        say(
            f"normalised in float32 instead, {norms['changed']} of {norms['compared']} half-"
            f"precision cases have another accuracy, at most by {norms['most_images']} images: "
            f"{norms['at']}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
