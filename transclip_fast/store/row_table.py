"""The metadata of a feature folder's rows, and which rows of an earlier one are the same images."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


@dataclass(frozen=True)
class RowTable:
    """
    Key, path and label, if there are any, of each row of the source, and the state of its file.

    Parameters
    ----------
    keys, paths : sequence of str
    labels : ndarray (rows,) int64, optional
    stamps : ndarray (rows, 2) int64, optional
        Size of each image, and the time its file was last written in nanoseconds.
    contents : callable, optional
        Returns the sha256 of each image. With it images are the same if their contents are,
        without it if sizes and times are, and the recorded path is no other file now.
    own_keys : bool
        The user chose the keys, and may give one to another file: images are the same only if
        their paths are, too.
    """

    keys: Sequence[str]
    paths: Sequence[str]
    labels: np.ndarray | None = None
    stamps: np.ndarray | None = None
    contents: Callable[[], Sequence[str]] | None = None
    own_keys: bool = False

    def parquet(self, rows: Sequence[int], sha256: Sequence[str] | None) -> bytes:
        """The metadata of some rows, whose images have these hashes, as a parquet file."""
        columns: dict[str, Any] = {
            "source_row": pa.array(rows, pa.int64()),
            "key": _text(self.keys, rows),
            "path": _text(self.paths, rows),
        }
        if self.labels is not None:
            labels = self.labels[list(rows)]
            columns["label"] = pa.array(labels, pa.int64(), mask=labels < 0)
        columns |= self._stamps(rows)
        if sha256 is not None:
            columns["sha256"] = pa.array(sha256, pa.string())
        content = io.BytesIO()
        pq.write_table(pa.table(columns), content)
        return content.getvalue()

    def matches(self, rows: Sequence[int], stored: pa.Table) -> bool:
        """Whether `stored` metadata are of the same images as these rows, in the same order."""
        expected = self._compared(rows)
        names = expected.column_names
        if not {*names, "path"} <= set(stored.column_names):
            return False
        return expected.equals(stored.select(names)) and not self._replaced(rows, stored).any()

    def find(self, rows: Sequence[int], stored: pa.Table) -> np.ndarray:
        """Positions in `stored` of the same images as these rows, -1 where there is none."""
        if not len(rows) or not stored.num_rows:
            return np.full(len(rows), -1)
        compared = self._compared(rows)
        names = compared.column_names
        if not {*names, "path"} <= set(stored.column_names):
            return np.full(len(rows), -1)
        wanted, known = _joined(compared), _joined(stored.select(names))
        found = pc.index_in(wanted, value_set=known, skip_nulls=True).fill_null(-1)
        positions: np.ndarray = found.to_numpy().astype(np.int64)
        places = np.flatnonzero(positions >= 0)
        replaced = self._replaced(
            [rows[k] for k in places.tolist()], stored.take(positions[places])
        )
        positions[places[replaced]] = -1
        return positions

    def absent(self, stored: pa.Table) -> list[str]:
        """The keys in `stored` that no row has."""
        keys = pc.unique(stored["key"])
        known = pc.is_in(keys, value_set=_text(self.keys, range(len(self.keys))))
        absent: list[str] = keys.filter(pc.invert(known)).to_pylist()
        return absent

    def _compared(self, rows: Sequence[int]) -> pa.Table:
        """The columns in which the same images agree."""
        columns = {"key": _text(self.keys, rows)}
        if self.own_keys:
            columns["path"] = _text(self.paths, rows)
        if self.contents is None:
            return pa.table(columns | self._stamps(rows))
        return pa.table(columns | {"sha256": _text(self.contents(), rows)})

    def _replaced(self, rows: Sequence[int], stored: pa.Table) -> np.ndarray:
        """Whether the file of each row is another one than that of the row stored beside it."""
        recorded = stored["path"].cast(pa.string()).to_pylist()
        pairs = [(path, self.paths[row]) for path, row in zip(recorded, rows, strict=True)]
        moved = {(old, new) for old, new in pairs if old not in (new, None)}
        others = {pair for pair in moved if self.contents is None and _is_other_file(*pair)}
        return np.array([pair in others for pair in pairs], bool)

    def _stamps(self, rows: Sequence[int]) -> dict[str, pa.Array]:
        if self.stamps is None:
            return {}
        chosen = self.stamps[list(rows)]
        return {name: pa.array(chosen[:, k]) for k, name in enumerate(("size", "mtime_ns"))}


def _is_other_file(recorded: str, path: str) -> bool:
    """Whether the file at a recorded path is another one; not if it is gone, as after a move."""
    return os.path.exists(recorded) and not (
        os.path.exists(path) and os.path.samefile(recorded, path)
    )


def _text(values: Sequence[str], rows: Sequence[int]) -> pa.Array:
    return pa.array([values[row] for row in rows], pa.string())


def _joined(table: pa.Table) -> pa.Array:
    """The columns of each row as one text; null if one of them is."""
    columns = [column.cast(pa.string()).combine_chunks() for column in table.columns]
    return pc.binary_join_element_wise(*columns, "\0")
