"""Rows in .npy files, read when they are indexed."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from transclip_fast.errors import InputError, reading


@dataclass(frozen=True)
class Shard:
    """Rows (n, d) in C order from byte `offset` of a .npy file, which had `state` when found."""

    path: Path
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    offset: int
    state: tuple[int, ...]

    @classmethod
    def find(cls, path: Path) -> Shard | None:
        """The rows of a .npy file; None if it holds others; ValueError or OSError on damage."""
        state = _state(os.stat(path))
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(array, np.memmap) and array.offset + array.nbytes < os.path.getsize(path):
            raise ValueError("goes on after the array that its header claims")
        plain = array.dtype.kind == "f" and array.dtype.isnative and array.dtype.itemsize <= 8
        if not isinstance(array, np.memmap) or array.ndim != 2 or not plain:
            return None
        if not array.flags.c_contiguous:
            return None
        return cls(path, array.shape, array.dtype, array.offset, state)

    def read(self) -> np.ndarray:
        """All rows; InputError if the file is gone, or was changed or cut."""
        number = math.prod(self.shape)
        with reading(self.path), open(self.path, "rb") as file:
            values = np.fromfile(file, self.dtype, number, offset=self.offset)
            self._check(os.fstat(file.fileno()), len(values) == number)
        return values.reshape(self.shape)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """
        Rows by index (n,); errors as `read`.

        Not through a memory map: a process that touches a map of a file that was cut is killed.
        """
        from transclip_fast.data.row_reads import gather

        out = np.empty((len(rows), self.shape[1]), self.dtype)
        with reading(self.path), open(self.path, "rb") as file:
            places = np.ascontiguousarray(rows, np.int64)
            n_read = gather(file.fileno(), self.offset, places, out.view(np.uint8))
            self._check(os.fstat(file.fileno()), n_read == len(rows))
        return out

    def part(self, start: int, stop: int) -> Shard:
        """Consecutive rows as a shard of their own."""
        offset = self.offset + start * self.shape[1] * self.dtype.itemsize
        return replace(self, shape=(stop - start, self.shape[1]), offset=offset)

    def _check(self, found: os.stat_result, whole: bool) -> None:
        if _state(found) != self.state:
            raise InputError(f"{self.path}: was changed while it was read; start again")
        if not whole:
            raise InputError(f"{self.path}: was cut short while it was read; write it again")


def _state(found: os.stat_result) -> tuple[int, ...]:
    """A fingerprint that changes if a file is written or replaced, even by one of the same size."""
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


class StoredRows:
    """
    Features (N, d) in one or several .npy files of the same width and type, in order.

    Rows are read into new memory when they are indexed as those of an array: by number, by slice,
    by numbers or by a mask (n,).
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = [shard for shard in shards if shard.shape[0]]
        self._stops = list(accumulate(shard.shape[0] for shard in self._shards))
        self.shape = (self._stops[-1] if self._stops else 0, shards[0].shape[1])
        self.dtype, self.ndim = shards[0].dtype, 2

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, ids: Any) -> np.ndarray:
        if isinstance(ids, slice):
            start, stop, step = ids.indices(len(self))
            if step == 1:
                parts = [piece.read() for piece in self._pieces(start, stop)]
                if len(parts) == 1:
                    return parts[0]
                return np.concatenate(parts) if parts else np.empty((0, self.shape[1]), self.dtype)
        rows = row_numbers(ids, len(self))
        found: np.ndarray = self._take(rows) if rows.ndim else self._take(rows[None])[0]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("stored rows are read: there is always a copy")
        whole = self[0 : len(self)]
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def part(self, rows: slice) -> StoredRows:
        """Consecutive rows, in the same files."""
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise IndexError(f"a part has consecutive rows, not every {step} of them")
        return StoredRows([self._shards[0].part(0, 0), *self._pieces(start, stop)])

    def _pieces(self, start: int, stop: int) -> Iterator[Shard]:
        """The consecutive rows `start` to `stop`, as far as they are in one file each."""
        i = bisect_right(self._stops, start)
        while start < stop:
            shard, last = self._shards[i], min(stop, self._stops[i])
            first = self._stops[i] - shard.shape[0]
            yield shard.part(start - first, last - first)
            start, i = last, i + 1

    def _take(self, ids: np.ndarray) -> np.ndarray:
        if len(self._shards) == 1:
            return self._shards[0].take(ids)
        out = np.empty((len(ids), self.shape[1]), self.dtype)
        if not len(ids):
            return out
        holder = np.searchsorted(self._stops, ids, side="right")
        order = holder.argsort(kind="stable")
        present, starts = np.unique(holder[order], return_index=True)
        for i, places in zip(present, np.split(order, starts[1:]), strict=True):
            first = self._stops[i] - self._shards[i].shape[0]
            out[places] = self._shards[i].take(ids[places] - first)
        return out


def row_numbers(ids: Any, n_rows: int) -> np.ndarray:
    """
    Numbers from 0, int64, of the rows that numpy finds by `ids`: () for a single one, else (n,).

    Raises
    ------
    IndexError
        No such row, a mask of another length, or an index that is not of rows alone.
    """
    if isinstance(ids, slice):
        return np.arange(*ids.indices(n_rows))
    numbers = np.asarray(ids)
    if numbers.dtype == bool and numbers.shape == (n_rows,):
        return numbers.nonzero()[0]
    if isinstance(ids, list) and not ids:
        numbers = numbers.astype(np.int64)
    if isinstance(ids, tuple) or numbers.ndim > 1 or numbers.dtype.kind not in "iu":
        raise IndexError(f"rows are indexed by number, slice, numbers or mask ({n_rows},)")
    numbers = numbers.astype(np.int64)
    outside = (numbers < -n_rows) | (numbers >= n_rows)
    if outside.any():
        raise IndexError(f"row {numbers[outside][0]} of {n_rows}: there is no such row")
    return np.asarray(np.where(numbers < 0, numbers + n_rows, numbers))
