"""Prompt learners on names that the model's prompts cannot use, and TransCLIP on top.

The model is the demo's CLIP (transclip_fast/demo): trained on other images of the same digits, with
the ten words for digits in its captions and 16 words around them. Here a digit has another name:
one of the words around ("words": 0 is "photo", 1 is "image", ...), or another digit's
("permuted": 0 is "one", 1 is "two", ...). 16 of the held-out images a class train each learner, at
its published settings but for the number of tokens, as the demo's model reads 16 in all; what is
measured are the others, which neither model nor learner has seen. Where a learner does not beat
zero-shot under that name on every draw of the shots, the exit code is 1.
"""

from __future__ import annotations

import statistics as stats
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from bench.accuracy.golden import accuracy, rows_of_each_class
from bench.common import command_line, record
from bench.names import LEARNERS
from transclip_fast import TransCLIP
from transclip_fast.data.patches import PatchedRows
from transclip_fast.demo import CLASS_NAMES, backbone, digits, enlarge
from transclip_fast.encode.models import Backbone
from transclip_fast.encode.text import ClassPrompts, encode_text
from transclip_fast.heads import SETTINGS, Head, fit_head
from transclip_fast.heads.prompts import Prompting, TextTower

WORDS = ("photo", "image", "picture", "scan", "hand", "number", "digit", "written", "by", "the")
NAMINGS = {"words": WORDS, "permuted": (*CLASS_NAMES[1:], CLASS_NAMES[0])}
TEMPLATE = "a photo of a {}."
N_CTX, SHOTS, SEEDS = 8, 16, 3
CROP = 0.75  # of an image's side: there are four, one a corner
CROPS = 4


class Data(NamedTuple):
    """Unit rows (N, d), unit rows (N, 4, d) of the crops of each, labels (N,)."""

    rows: torch.Tensor
    crops: torch.Tensor
    labels: np.ndarray


def load(demo: Backbone, per_class: int | None = None) -> Data:
    """The digits that the demo's model was not trained on, some of each class or all."""
    images, labels = digits()
    if per_class is not None:
        kept = np.concatenate([np.flatnonzero(labels == k)[:per_class] for k in range(10)])
        images, labels = images[kept], labels[kept]
    pictures = [Image.fromarray(enlarge(image)) for image in images]
    crops = [crop for picture in pictures for crop in _crops(picture)]
    return Data(
        _encoded(demo, pictures), _encoded(demo, crops).view(len(images), CROPS, -1), labels
    )


def _crops(picture: Image.Image) -> Iterator[Image.Image]:
    side, kept = picture.width, round(CROP * picture.width)
    for top in (0, side - kept):
        for left in (0, side - kept):
            yield picture.crop((left, top, left + kept, top + kept))


@torch.inference_mode()
def _encoded(demo: Backbone, pictures: list[Image.Image]) -> torch.Tensor:
    rows = [
        demo.model.encode_image(torch.stack([demo.preprocess(x) for x in pictures[i : i + 256]]))
        for i in range(0, len(pictures), 256)
    ]
    return F.normalize(torch.cat(rows).float(), dim=1).clone()


def zero_shot_texts(demo: Backbone, names: tuple[str, ...]) -> torch.Tensor:
    """Unit rows (K, d) of one prompt a class."""
    prompts = ClassPrompts(list(names), [[TEMPLATE.format(name)] for name in names], "bench")
    return torch.from_numpy(encode_text(demo, prompts))


def trained(
    learner: str, demo: Backbone, names: tuple[str, ...], data: Data, rows: np.ndarray, seed: int
) -> Head:
    """One learner, on some rows of the data."""
    name = learner.partition("-")[0]
    context, schedule = SETTINGS[name]
    if context.start is None:
        context = replace(context, n_ctx=N_CTX)
    if learner == "coop-class":
        context = replace(context, class_specific=True)
    shots: dict[str, Any] = {
        "support_features": data.rows[rows],
        "support_labels": data.labels[rows],
    }
    if learner == "plot-crops":
        shots["support_local_features"] = data.crops[rows]
    prompting = Prompting(TextTower(demo), names, context, schedule)
    text = zero_shot_texts(demo, names)
    with warnings.catch_warnings():  # that PLOT has no patches is what one arm is about
        warnings.filterwarnings("ignore", message="head plot: no local features")
        return fit_head(name, text, **shots, seed=seed, prompting=prompting)


def measure(
    learner: str, naming: str, demo: Backbone, data: Data, seeds: int = SEEDS
) -> dict[str, Any]:
    """Accuracies, seed by seed, on the rows that were not drawn."""
    names = NAMINGS[naming]
    text = zero_shot_texts(demo, names)
    found: dict[str, list[float]] = {
        name: [] for name in ("zero_shot", "alone", "with_transclip", "seconds")
    }
    for seed in range(seeds):
        drawn, held_out = split(data.labels, seed)
        rows, labels = data.rows[held_out], data.labels[held_out]
        start = time.perf_counter()
        head = trained(learner, demo, names, data, drawn, seed)
        found["seconds"].append(round(time.perf_counter() - start, 2))
        crops = PatchedRows(rows, data.crops[held_out], "crops")
        predicted, prior = head.labels_and_prior(crops if learner == "plot-crops" else rows)
        model = TransCLIP(device="cpu").fit(rows, text_features=text, **prior)
        found["zero_shot"].append(round(accuracy(model.zero_shot_labels_, labels), 2))
        found["alone"].append(round(accuracy(predicted.numpy(), labels), 2))
        found["with_transclip"].append(round(accuracy(model.transduction_, labels), 2))
    return {"learner": learner, "naming": naming, "shots": SHOTS, "queries": len(labels), **found}


def split(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `SHOTS` images of each class, and all others."""
    drawn = rows_of_each_class(labels, (SHOTS,), np.random.default_rng(seed))[0]
    return drawn, np.setdiff1d(np.arange(len(labels)), drawn)


def main(arguments: list[str] | None = None) -> int:
    """Measure, record and print; the exit code."""
    parser = command_line(__spec__, __doc__)
    parser.add_argument("--namings", nargs="+", choices=NAMINGS, default=list(NAMINGS))
    parser.add_argument("--learners", nargs="+", choices=LEARNERS, default=list(LEARNERS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the tower is so small that several wait for each other
    demo = backbone()
    data, beaten = load(demo), True
    own = zero_shot_texts(demo, CLASS_NAMES)
    known = round(accuracy((data.rows @ own.T).argmax(1).numpy(), data.labels), 2)
    print(f"{len(data.labels)} digits, {SHOTS} shots a class; zero-shot by their names {known} %")
    for naming in options.namings:
        print(f"{naming:<18} zero-shot   alone  TransCLIP  seconds")
        for learner in options.learners:
            row = measure(learner, naming, demo, data)
            record("prompt_learners", {**row, "own_names": known, "n_ctx": N_CTX, "threads": 1})
            beaten &= all(a > b for a, b in zip(row["alone"], row["zero_shot"], strict=True))
            zero_shot, alone, solved, seconds = (
                stats.mean(row[x]) for x in ("zero_shot", "alone", "with_transclip", "seconds")
            )
            print(f"  {learner:<16} {zero_shot:9.2f} {alone:7.2f} {solved:10.2f} {seconds:8.1f}")
    return int(not beaten)


if __name__ == "__main__":
    raise SystemExit(main())
