"""The runs of a protocol, each kept as soon as it is done."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.heads import WITH_PATCHES, fit_head
from transclip_fast.heads.prompts import Prompting
from transclip_fast.heads.task import Head, as_fit_arguments, inputs_for
from transclip_fast.metrics import accuracy
from transclip_fast.protocols.data import VALIDATION_SHOTS, DataSet
from transclip_fast.store.atomic import new_file, read_json, write_json, writing
from transclip_fast.store.features import LOCAL
from transclip_fast.version import __version__

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """
    A run: the columns that say what it is, the hashes of what it reads, and how to do it.

    `work` returns the measured columns.
    """

    columns: dict[str, Any]
    inputs: dict[str, Any]
    work: Callable[[], Row]

    def file(self, folder: Path) -> Path:
        """Where it is kept: named by all that its outcome depends on."""
        identity = {"run": self.columns, "inputs": self.inputs, "version": __version__}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return folder / f"{digest[:32]}.json"


def do_runs(runs: Sequence[Run], folder: Path, progress: Callable[[int, int], None]) -> list[Row]:
    """Rows of all runs; those that `folder` has from an earlier call are not done again."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for done, run in enumerate(runs):
        progress(done, len(runs))
        file = run.file(folder)
        if not file.exists():
            row = {**run.columns, **run.work()}
            with writing(folder), new_file(file) as partial:
                write_json(partial, row)
        rows.append(read_json(file))
    progress(len(runs), len(runs))
    return rows


def train_head(
    data: DataSet,
    name: str,
    shots: int,
    seed: int,
    logit_scale: float,
    prompting: Prompting | None = None,
) -> Head:
    """A head fitted to shots of a data set, with at most 4 validation rows a class."""
    arrays = as_fit_arguments(data.draw("support", shots, seed), "support")
    if prompting is None:  # prompt learners choose nothing by validation rows
        held_out = data.draw("validation", min(shots, VALIDATION_SHOTS), seed)
        arrays |= as_fit_arguments(held_out, "validation")
    if name not in WITH_PATCHES:
        arrays = {array: rows for array, rows in arrays.items() if array not in LOCAL}
    return fit_head(
        name, data.text, **arrays, logit_scale=logit_scale, seed=seed, prompting=prompting
    )


def measure(data: DataSet, model: TransCLIP, head: Head, train_seconds: float) -> Row:
    """Accuracies on the queries of zero-shot, of a head, and of TransCLIP on top of it."""
    seen = inputs_for(head, data.features, data.patched)
    (predicted, prior), graph = head.labels_and_prior(seen), data.graph
    start = time.perf_counter()
    model.fit(data.features, data.text, **prior, graph=graph)
    return {
        **_solved(data, model, time.perf_counter() - start),
        "head_accuracy": accuracy(predicted.numpy(), data.labels),
        "head_seconds": round(train_seconds, 3),
        "head_parameters": head.parameters,
    }


def measure_few_shot(data: DataSet, model: TransCLIP, shots: int, seed: int) -> Row:
    """Accuracies on the queries of zero-shot and of TransCLIP-FS, which has the shots itself."""
    drawn = data.draw("support", shots, seed)
    held_out = data.draw("validation", min(shots, VALIDATION_SHOTS), seed)
    if held_out is None:
        raise InputError(f"{data.name}: transclip-fs needs validation rows, which choose gamma")
    arrays = {**as_fit_arguments(drawn, "support"), **as_fit_arguments(held_out, "validation")}
    arrays = {array: rows for array, rows in arrays.items() if array not in LOCAL}
    graph = data.graph
    start = time.perf_counter()
    model.fit(data.features, data.text, **arrays, graph=graph)
    return {
        **_solved(data, model, time.perf_counter() - start),
        "head_accuracy": None,
        "head_seconds": None,
        "head_parameters": {"gamma": model.gamma_},
    }


def timed(work: Callable[[], Head]) -> tuple[Head, float]:
    """What `work` returns, and its seconds."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def _solved(data: DataSet, model: TransCLIP, seconds: float) -> Row:
    return {
        "queries": len(data.labels),
        "zero_shot_accuracy": accuracy(model.zero_shot_labels_, data.labels),
        "accuracy": accuracy(model.transduction_, data.labels),
        "seconds": round(seconds, 3),
    }
