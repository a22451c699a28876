"""Heads by themselves and below TransCLIP, beside zero-shot, on real features.

On golden data (`TRANSCLIP_GOLDEN`): Oxford Pets with its published 16 shots, DTD and WHU-RS19 with
16 shots drawn from labelled rows, which are then no queries. Only WHU-RS19 has text features; the
other two get stand-ins, the unit means of some validation rows of a class, so their zero-shot is
not CLIP's. Every head is fitted once more by its plain formula (`bench.rivals.plain_heads`): where
accuracies differ by more than a point the exit code is 1.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.accuracy.golden import accuracy, golden_folder, rows_of_each_class
from bench.common import command_line, record, unit_rows
from bench.head_tables import ALLOWED_POINTS
from bench.rivals.plain_heads import fit as fit_plainly
from transclip_fast import TransCLIP
from transclip_fast.data.checks import as_unit_rows
from transclip_fast.graph.build import build_graph
from transclip_fast.heads import HEADS, fit_head

SETS = ("oxford_pets_vitb32", "dtd_vitb32", "whurs19_clip_vit-b-32")
SHOTS, HELD_OUT, TEXTS = 16, 4, 4  # rows of a class
Arrays = dict[str, np.ndarray]


def load(file: Path) -> Arrays:
    """Return the arrays of a 16-shot FEATURES file from a golden file."""
    with np.load(file, allow_pickle=False) as stored:
        a = dict(stored)
    if "image_features" in a:  # WHU-RS19
        rows = rows_of_each_class(a["labels"], (SHOTS, HELD_OUT), np.random.default_rng(0))
        queries = np.setdiff1d(np.arange(len(a["labels"])), np.concatenate(rows))
        parts = {"support": rows[0], "validation": rows[1], "image": queries}
        found = {f"{name}_features": a["image_features"][part] for name, part in parts.items()}
        found |= {f"{name}_labels": a["labels"][part] for name, part in parts.items()}
        return {"text_features": a["text_features"], "labels": found.pop("image_labels"), **found}
    features, labels = a["val_features"], a["val_labels"]
    sizes = (TEXTS, HELD_OUT) if "shots16_features" in a else (TEXTS, HELD_OUT, SHOTS)
    texts, held_out, *shots = rows_of_each_class(labels, sizes, np.random.default_rng(0))
    support = features[shots[0]] if shots else a["shots16_features"]
    means = features[texts].astype(np.float64).reshape(-1, TEXTS, features.shape[1]).mean(1)
    return {
        "image_features": a["test_features"],
        "labels": a["test_labels"],
        "text_features": unit_rows(means).astype(np.float32),
        "support_features": support,
        "support_labels": labels[shots[0]] if shots else a["shots16_labels"],
        "validation_features": features[held_out],
        "validation_labels": labels[held_out],
    }


def measure(name: str, arrays: Arrays) -> dict[str, Any]:
    """Return accuracies and seconds of one head."""
    queries, labels, text = (arrays[n] for n in ("image_features", "labels", "text_features"))
    shots: dict[str, Any] = {
        f"{use}_{kind}": arrays[f"{use}_{kind}"]
        for use in ("support", "validation")
        for kind in ("features", "labels")
    }
    start = time.perf_counter()
    head = fit_head(name, text, **shots)
    fitted = time.perf_counter()
    rows = as_unit_rows(queries, "image_features")
    alone = head.predict(rows).numpy()
    predicted = time.perf_counter()
    graph = build_graph(rows, 3)
    built = time.perf_counter()
    model = TransCLIP(device="cpu").fit(rows, text_features=text, **head.prior(rows), graph=graph)
    solved = time.perf_counter()
    plain = fit_plainly(name, arrays).argmax(1)

    def right(found: np.ndarray) -> float:
        return round(accuracy(found, labels), 2)

    return {
        "head": name,
        "zero_shot": right(model.zero_shot_labels_),
        "alone": right(alone),
        "plain": right(plain),
        "with_transclip": right(model.transduction_),
        "parameters": {key: float(f"{value:.4g}") for key, value in head.parameters.items()},
        "seconds": {
            "fit": round(fitted - start, 2),
            "predict": round(predicted - fitted, 3),
            "solve": round(solved - built, 2),
        },
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, record and print; the exit code."""
    parser = command_line(__spec__, __doc__)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=list(HEADS))
    options = parser.parse_args(arguments)
    apart, threads = False, torch.get_num_threads()
    for name in options.sets:
        arrays = load(golden_folder() / f"{name}.npz")
        texts = "its own" if name.startswith("whurs19") else "stand-ins"
        print(f"{name}, {len(arrays['labels'])} queries, {SHOTS} shots, texts: {texts}")
        print("  head             zero-shot   alone   plain  TransCLIP   fit s")
        for head in options.heads:
            row = measure(head, arrays)
            setting = {"features": name, "texts": texts, "shots": SHOTS}
            record("heads", {**setting, **row, "threads": threads})
            apart |= abs(row["alone"] - row["plain"]) > ALLOWED_POINTS
            print(
                f"  {head:<16} {row['zero_shot']:9.2f} {row['alone']:7.2f} {row['plain']:7.2f} "
                f"{row['with_transclip']:10.2f} {row['seconds']['fit']:7.2f}",
                flush=True,
            )
    return int(apart)


if __name__ == "__main__":
    raise SystemExit(main())
