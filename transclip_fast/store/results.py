"""Result folders: predictions.parquet (or .csv too), mixture.safetensors and run.json."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from safetensors.torch import save
from scipy import sparse

from transclip_fast.data.checks import as_labels
from transclip_fast.errors import InputError
from transclip_fast.solver.mixture import Mixture
from transclip_fast.store.arrays import file_sha256, inside, read_arrays, read_table
from transclip_fast.store.atomic import read_json, write_json
from transclip_fast.store.features import Features
from transclip_fast.store.json_text import value_of

CSV_FILE = "predictions.csv"
FILES = ("predictions.parquet", CSV_FILE, "mixture.safetensors", "run.json")
CONTENTS = frozenset(FILES)
TRANSCLIP = "transclip"  # the method of a result that names no other
HASHED = ("predictions.parquet", "mixture.safetensors")
# Before what spreadsheets run, and what `unguarded` would take it off, a ' goes.
GUARD = r"^([=+\-@\t\r]|'[=+\-@\t\r'])"
TRUTH, CALIBRATED = "true_label", "calibrated_confidence"  # columns
TOP_CLASSES = 5  # listed for each row
PART = "part-{:015}.parquet"  # of predictions, by its first row
TABLE_ROWS = 1 << 16  # converted to a block of the table at a time


@dataclass(frozen=True)
class Result:
    """A result folder: `run` is run.json, `predictions` the parquet table."""

    folder: Path
    run: dict[str, Any]
    predictions: pa.Table

    def __len__(self) -> int:
        return int(self.predictions.num_rows)

    def has(self, name: str) -> bool:
        """Whether there is a column of that name."""
        return name in self.predictions.column_names

    def labels(self, name: str) -> np.ndarray:
        """
        A column of class indices, (N,) int64, -1 where a true label is unknown.

        InputError if it is missing or holds others.
        """
        return as_labels(
            self._column(name).to_numpy(),
            f"{self._file}: {name}",
            rows=len(self),
            n_classes=self.run["n_classes"],
            lowest=-1 if name == TRUTH else 0,
        ).numpy()

    def has_rows_of(self, features: Features) -> bool:
        """Whether its rows have the names, and the places in the source, that features say."""
        own = pa.table(_row_columns(features, slice(0, len(features.get("image_features")))))
        names = own.column_names
        return all(map(self.has, names)) and self.predictions.select(names).equals(own)

    def shares(self, name: str) -> np.ndarray:
        """A column of numbers between 0 and 1, (N,) float64; InputError if it holds others."""
        column = self._column(name)
        if not _are_shares(column):
            raise self._damaged(name)
        found: np.ndarray = np.minimum(column.to_numpy().astype(np.float64), 1)
        return found

    def confidence(self) -> np.ndarray:
        """How sure each label is, (N,) float64; calibrated, if the result has that."""
        return self.shares(CALIBRATED if self.has(CALIBRATED) else "confidence")

    def flags(self, name: str) -> np.ndarray:
        """A column (N,) of bool, all False if it is missing; InputError if it holds others."""
        if not self.has(name):
            return np.zeros(len(self), bool)
        column = self._column(name)
        if not pa.types.is_boolean(column.type) or column.null_count:
            raise self._damaged(name)
        found: np.ndarray = column.to_numpy()
        return found

    def lists(self, name: str, limit: int | None = None) -> pa.ListArray:
        """
        A column of lists of whole numbers from 0 to `limit` - 1, without it of numbers from 0 to 1.

        InputError if it holds others.
        """
        column = self._column(name).combine_chunks()
        if not pa.types.is_list(column.type) or column.null_count:
            raise self._damaged(name)
        values = column.flatten()
        if not (_are_shares(values) if limit is None else _are_places(values, limit)):
            raise self._damaged(name)
        return column

    @property
    def features_sha256(self) -> str | None:
        """Hash of the image features that were solved, if it is there."""
        hashes = self.run.get("inputs_sha256")
        return hashes.get("image_features") if isinstance(hashes, dict) else None

    @property
    def _file(self) -> Path:
        return self.folder / "predictions.parquet"

    def _column(self, name: str) -> pa.ChunkedArray:
        if not self.has(name):
            raise InputError(f"{self._file}: has no column {name!r}; solve again")
        return self.predictions.column(name)

    def _damaged(self, name: str) -> InputError:
        return InputError(f"{self._file}: {name} is damaged; solve again")


def prediction_tables(
    distributions: np.ndarray | sparse.csr_array,
    zero_shot: tuple[np.ndarray, np.ndarray],
    features: Features,
    labels: np.ndarray | None = None,
    *,
    first: int = 0,
    columns: Mapping[str, np.ndarray] | None = None,
) -> Iterator[pa.Table]:
    """
    The table of predictions in blocks: each query's label and most likely classes, and its
    zero-shot label.

    Of a sparse row of `distributions` (N, K) float32 only the stored classes are listed.
    `zero_shot` are labels and confidences (N,) each, `labels` (N,) the truth, -1 where unknown,
    `columns` further ones (N,), or (N, n) of lists without what is negative. All of these may be of
    some of the rows, from `first` on.
    """
    n_rows, n_classes = distributions.shape
    names = pa.array(features.class_names or map(str, range(n_classes)), pa.string())
    for start in range(0, n_rows, TABLE_ROWS):
        block = slice(start, min(start + TABLE_ROWS, n_rows))
        here = slice(first + block.start, first + block.stop)
        values, classes = _top(distributions[block])
        label = classes[:, 0]
        found = {
            **_row_columns(features, here),
            "label": label,
            "label_name": names.take(pa.array(label)),
            "confidence": values[:, 0],
            "zero_shot_label": (before := zero_shot[0][block]),
            "zero_shot_label_name": names.take(pa.array(before)),
            "zero_shot_confidence": zero_shot[1][block],
            "changed": label != before,
            "top5_labels": (top := _lists(classes, values >= 0)),
            "top5_label_names": pa.ListArray.from_arrays(top.offsets, names.take(top.values)),
            "top5_confidences": _lists(values, values >= 0),
        }
        for name, column in (columns or {}).items():
            part = column[block]
            found[name] = part if part.ndim == 1 else _lists(part, part >= 0)
        if labels is not None:
            found[TRUTH] = pa.array(labels[block], mask=labels[block] < 0)
        yield pa.table(found)


def _row_columns(features: Features, here: slice) -> dict[str, Any]:
    """The columns that say which images some rows are."""
    rows = np.arange(here.start, here.stop)
    keys = None if features.keys is None else features.keys[here]
    return {
        "row": rows,
        "source_row": rows if features.source_rows is None else features.source_rows[here],
        "key": pa.array(keys or [None] * len(rows), pa.string()),
    }


def save_result(
    folder: Path,
    tables: Iterable[pa.Table],
    run: dict[str, Any],
    tensors: dict[str, torch.Tensor] | None,
    *,
    csv: bool = False,
) -> dict[str, Any]:
    """
    Write the files of a result into the folder of a `new_folder`; `csv` adds predictions.csv.

    `tensors` are those of a mixture, None where the method has none. Returns `run` with the hashes
    of the files.
    """
    _write_tables(tables, folder / "predictions.parquet", folder / CSV_FILE if csv else None)
    if tensors is not None:
        # As bytes: on a full disk safetensors raises an error of its own, not an OSError.
        (folder / "mixture.safetensors").write_bytes(save(tensors))
    written = (name for name in HASHED if (folder / name).exists())
    run = {**run, "sha256": {name: file_sha256(folder / name) for name in written}}
    write_json(folder / "run.json", run)
    return run


def write_part(folder: Path, first: int, tables: Iterable[pa.Table]) -> None:
    """Write the predictions from row `first` on into the folder that others write to, too."""
    blocks = iter(tables)
    if (block := next(blocks, None)) is not None:
        _write_tables(chain([block], blocks), folder / PART.format(first))


def _write_tables(tables: Iterable[pa.Table], parquet: Path, csv: Path | None = None) -> None:
    """Write the blocks of a table as .parquet, and, without its lists, as `csv`."""
    blocks = iter(tables)
    first = next(blocks)
    with ExitStack() as files:
        # Opened here: pyarrow takes no paths that are not UTF-8.
        content = files.enter_context(open(parquet, "wb"))
        writer = files.enter_context(pq.ParquetWriter(content, first.schema))
        lines = None
        if csv is not None:
            csv_content = files.enter_context(open(csv, "wb"))
            lines = files.enter_context(pa.csv.CSVWriter(csv_content, _flat(first).schema))
        for block in chain([first], blocks):
            writer.write_table(block)
            if lines is not None:
                lines.write_table(_flat(block))


def joined_parts(folder: Path) -> Iterator[pa.Table]:
    """The predictions of all `write_part`, in the blocks of `prediction_tables`; removes them."""
    rest: list[pa.Table] = []
    for file in sorted(folder.glob(PART.format(0).replace("0", "[0-9]"))):
        with open(file, "rb") as content, pq.ParquetFile(content) as part:
            for group in range(part.num_row_groups):
                rest.append(part.read_row_group(group))
                while sum(map(len, rest)) >= TABLE_ROWS:
                    whole = pa.concat_tables(rest)
                    yield whole[:TABLE_ROWS].combine_chunks()
                    rest = [whole[TABLE_ROWS:]]
        file.unlink()
    if sum(map(len, rest)):
        yield pa.concat_tables(rest).combine_chunks()


def _flat(table: pa.Table) -> pa.Table:
    """The columns of single values; ' goes before a text that a spreadsheet would run."""
    flat = table.select([field.name for field in table.schema if not pa.types.is_list(field.type)])
    for place, field in enumerate(flat.schema):
        if pa.types.is_string(field.type):
            safe = pc.replace_substring_regex(flat.column(place), GUARD, r"'\1")
            flat = flat.set_column(place, field, safe)
    return flat


def load_result(path: str | Path, columns: Sequence[str] | None = None) -> Result:
    """
    A result folder, of its predictions only some columns if it has them.

    InputError if it is missing, something else, or damaged.
    """
    run = load_run(path)
    file = inside(Path(path), "predictions.parquet")
    predictions = read_table(file, columns)
    _check_hash(file, run)
    return Result(Path(path), run, predictions)


def is_result(path: str | Path) -> bool:
    """Whether a folder has the labels of a solve."""
    return os.path.isfile(os.path.join(path, "predictions.parquet"))


def load_run(path: str | Path) -> dict[str, Any]:
    """
    run.json of a result folder, with `n_classes`, `config`, and `class_names` and `encoder` (or
    None).
    """
    folder = Path(path)
    if not os.path.isfile(folder / "run.json"):
        inner = folder / "result"
        remedy = "name one that solve wrote"
        if os.path.isfile(inner / "run.json"):
            remedy = f"did you mean {inner}?"
        raise InputError(f"{path}: is not a result folder (no run.json); {remedy}")
    file = inside(folder, "run.json")
    run = read_json(file)
    names = run.setdefault("class_names", None)
    if type(run.get("n_classes")) is not int or not isinstance(run.get("config"), dict):
        raise InputError(f"{file}: has no n_classes or config; solve again")
    n_classes = value_of(run, "n_classes", int, file, minimum=1)
    run.setdefault("encoder", None)  # of earlier versions: none
    value_of(run, "encoder", (dict, type(None)), file)
    maps = run.setdefault("maps", {})  # of earlier versions: none
    if not isinstance(maps, dict) or not all(isinstance(value, str) for value in maps.values()):
        raise InputError(f"{file}: maps are damaged; solve again")
    if names is not None and (
        not isinstance(names, list)
        or len(names) != n_classes
        or not all(isinstance(name, str) for name in names)
    ):
        raise InputError(f"{file}: class_names are not {n_classes} names; solve again")
    return run


def _check_hash(file: Path, run: dict[str, Any]) -> None:
    """InputError if a file of a result differs from its hash in run.json."""
    if "sha256" not in run:  # of earlier versions
        return
    hashes = value_of(run, "sha256", dict, file.with_name("run.json"))
    if hashes.get(file.name) != file_sha256(file):
        raise InputError(f"{file}: differs from its run.json; solve again")


def load_mixture(path: str | Path) -> tuple[Mixture, dict[str, torch.Tensor]]:
    """The fitted mixture of a result folder, and the tensors saved beside it."""
    file = inside(Path(path), "mixture.safetensors")
    tensors = read_arrays(file)
    shape = tensors["means"].shape if "means" in tensors else ()
    for name, tensor in tensors.items():
        expected = {"variances": shape[1:], "class_costs": shape[:1]}.get(name, shape)
        right = tensor.is_floating_point() and tensor.shape == expected
        if len(shape) != 2 or not right or not tensor.isfinite().all():
            raise InputError(f"{file}: {name} is damaged; solve again")
    if "variances" not in tensors or not (tensors["variances"] > 0).all():
        raise InputError(f"{file}: means or variances are missing or damaged; solve again")
    if (file.parent / "run.json").exists():
        _check_hash(file, load_run(path))
    return Mixture(tensors.pop("means"), tensors.pop("variances")), tensors


def _are_shares(column: Any) -> bool:
    """Whether a column has numbers from 0 to 1, which a softmax in float32 exceeds by rounding."""
    values = np.asarray(column)
    return pa.types.is_floating(column.type) and bool(((values >= 0) & (values <= 1.001)).all())


def _are_places(column: Any, limit: int) -> bool:
    """Whether a column has whole numbers from 0 to `limit` - 1."""
    if not pa.types.is_integer(column.type) or column.null_count:
        return False
    extremes = pc.min_max(column).as_py()
    return not len(column) or (extremes["min"] >= 0 and extremes["max"] < limit)


def _top(distributions: np.ndarray | sparse.csr_array) -> tuple[np.ndarray, np.ndarray]:
    """
    The largest entries (n, 5) of each row and their classes; of equal ones the first class.

    Places after the last entry of a sparse row hold -1.
    """
    if isinstance(distributions, np.ndarray):
        entries, classes = torch.from_numpy(distributions), None
    else:
        lengths = np.diff(distributions.indptr)
        used = np.arange(lengths.max()) < lengths[:, None]
        padded = np.full(used.shape, -1, np.float32)
        columns = np.zeros(used.shape, np.int64)
        padded[used], columns[used] = distributions.data, distributions.indices
        entries, classes = torch.from_numpy(padded), torch.from_numpy(columns)
    n = min(TOP_CLASSES, entries.shape[1])
    values, places = entries.topk(n, dim=1)
    tied = (entries >= values[:, -1:]).sum(1) > n  # topk breaks ties in any order
    tied |= (values[:, 1:] == values[:, :-1]).any(1)
    ordered = entries[tied].sort(dim=1, descending=True, stable=True)
    places[tied] = ordered.indices[:, :n]
    return values.numpy(), (places if classes is None else classes.gather(1, places)).numpy()


def _lists(array: np.ndarray, used: np.ndarray) -> pa.Array:
    """The used entries of each row, as a list."""
    offsets = np.concatenate([[0], used.sum(1).cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(array[used]))
