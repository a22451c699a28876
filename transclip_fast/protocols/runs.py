"""The runs of a protocol; the result of each is a file."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from transclip_fast.callbacks import Count
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.heads.base import Head, inputs_for
from transclip_fast.heads.task import as_fit_arguments
from transclip_fast.metrics import accuracy
from transclip_fast.protocols.data import DataSet, draw_shots
from transclip_fast.store.atomic import read_json, write_json, writing
from transclip_fast.store.json_text import value_of
from transclip_fast.version import __version__
from transclip_fast.whole_files import new_file

TABLES = ("table.md", "table.parquet", "runs.parquet", "run.json")
MEASURED: dict[str, Any] = {
    "queries": int,
    "zero_shot_accuracy": float,
    "accuracy": float,
    "seconds": float,
    "head_accuracy": (float, type(None)),
    "head_seconds": (float, type(None)),
    "head_parameters": dict,
}
CONTENTS = frozenset({"runs", *TABLES, *(f".{name}.partial" for name in TABLES)})


@dataclass(frozen=True)
class Run:
    """One run of a protocol."""

    columns: dict[str, Any]  # identify the run in the table
    inputs: dict[str, Any]  # hashes and settings that its outcome depends on
    work: Callable[[], dict[str, Any]]  # returns the measured columns

    def file(self, folder: Path) -> Path:
        """Its result: the name is a hash of everything that the outcome depends on."""
        identity = {"run": self.columns, "inputs": self.inputs, "version": __version__}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return folder / f"{digest[:32]}.json"


def do_runs(runs: Sequence[Run], folder: Path, progress: Count) -> list[dict[str, Any]]:
    """Rows of all runs; results that `folder` has from an earlier call are reused."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for done, run in enumerate(runs):
        progress(done, len(runs))
        file = run.file(folder)
        if not file.exists():
            row = {**run.columns, **run.work()}
            with writing(folder), new_file(file) as unfinished:
                write_json(unfinished, row)
        rows.append(_read_row(file, run))
    progress(len(runs), len(runs))
    return rows


def _read_row(file: Path, run: Run) -> dict[str, Any]:
    """The columns of a run in its file; InputError if it is of another run, or damaged."""
    row = read_json(file)
    found = {name: row.get(name) for name in run.columns}
    known = {**run.columns, **MEASURED}.keys()
    if json.dumps(found) != json.dumps(run.columns) or row.keys() != known:
        raise InputError(f"{file}: is not of this run; remove it")
    for name, kind in MEASURED.items():
        value_of(row, name, kind, file)
    for name in row["head_parameters"]:
        value_of(row["head_parameters"], name, float, file)
    return row


def write_tables(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    table: Sequence[dict[str, Any]],
    text: str,
    summary: dict[str, Any],
) -> None:
    """Write the files of `TABLES`."""
    flat = [
        row
        | {"head_parameters": ", ".join(f"{k} {v:g}" for k, v in row["head_parameters"].items())}
        for row in rows
    ]
    for name, content in (("runs.parquet", flat), ("table.parquet", table)):
        with new_file(folder / name) as unfinished, open(unfinished, "wb") as file:
            pq.write_table(pa.Table.from_pylist(list(content)), file)
    with new_file(folder / "table.md") as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    with new_file(folder / "run.json") as unfinished:
        write_json(unfinished, summary)


def measure(data: DataSet, model: TransCLIP, head: Head, train_seconds: float) -> dict[str, Any]:
    """Accuracies on the queries of zero-shot, of a head, and of TransCLIP on top of it."""
    predicted, prior = head.labels_and_prior(inputs_for(head, data.features, data.patched))
    return {
        **_solve(data, model, prior),
        "head_accuracy": accuracy(predicted.numpy(), data.labels),
        "head_seconds": round(train_seconds, 3),
        "head_parameters": head.parameters,
    }


def measure_few_shot(data: DataSet, model: TransCLIP, shots: int, seed: int) -> dict[str, Any]:
    """Accuracies on the queries of zero-shot and of TransCLIP-FS, which uses the shots itself."""
    drawn = draw_shots(data.pools, shots, seed)
    return {
        **_solve(data, model, as_fit_arguments(drawn, patches=False)),
        "head_accuracy": None,
        "head_seconds": None,
        "head_parameters": {} if model.gamma_ is None else {"gamma": model.gamma_},
    }


def _solve(data: DataSet, model: TransCLIP, arrays: dict[str, Any]) -> dict[str, Any]:
    """Fit the model to the queries; the columns that every run has."""
    graph = data.graph  # built outside the measured time
    start = time.perf_counter()
    model.fit(data.features, text_features=data.text, **arrays, graph=graph)
    seconds = time.perf_counter() - start
    return {
        "queries": len(data.labels),
        "zero_shot_accuracy": accuracy(model.zero_shot_labels_, data.labels),
        "accuracy": accuracy(model.transduction_, data.labels),
        "seconds": round(seconds, 3),
    }
