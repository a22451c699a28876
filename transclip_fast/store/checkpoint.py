"""Checkpoints of long work: hidden files beside the folder that it fills."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from transclip_fast.errors import InputError
from transclip_fast.ops.exchange import Partition
from transclip_fast.ranks import ALONE, Ranks
from transclip_fast.store.arrays import array_sha256, read_arrays
from transclip_fast.store.atomic import beside, read_json, remove, write_json, writing
from transclip_fast.whole_files import new_file, partial_of

# Work goes on for ten times as long as its last state took to write, up to 60 intervals: else a
# large state would be written half of the time.
TIMES_WRITING, MOST_INTERVALS = 10, 60
# Arrays of a state, by rows: of a solve (see `Assignments.state`), and of a search for neighbours.
ENTRY_ARRAYS = ("z", "classes")  # one after the other where there are lengths
ROW_ARRAYS = (*ENTRY_ARRAYS, "lengths", "ids", "values", "searched", "nearest")


class Interval:
    """The time until the next state: some `seconds`, and longer where states are slow to write."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._end = seconds, time.monotonic() + seconds

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._end

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Start anew after the block, which writes a state."""
        start = time.monotonic()
        yield
        now = time.monotonic()
        longer = min(TIMES_WRITING * (now - start), MOST_INTERVALS * self._seconds)
        self._end = now + max(self._seconds, longer)


class FileCheckpoint:
    """
    The state of a piece of work in a .npz file, to resume from after a crash.

    The caller has locked `path`, the folder to fill; `name` is that of the work. `identity` has all
    that decides the result, input, method and parameters; a state of another identity is not used.
    A state younger than `seconds`, or than `TIMES_WRITING` times what it took to write, is not
    replaced: a crash costs that much work.
    """

    def __init__(
        self, path: str | Path, name: str, identity: Mapping[str, Any], seconds: float
    ) -> None:
        self.path = path
        self.file = beside(path, f"{name}.npz")
        self.name, self._interval = name, Interval(seconds)
        self.identity = json.dumps(identity, sort_keys=True)

    def load(self) -> Mapping[str, np.ndarray] | None:
        """The last state of this very work, or None, with a warning if there is an unusable one."""
        if not self.file.exists():
            return None
        try:
            state, identity = _read_state(self.file)
            if identity != self.identity:
                raise InputError(f"{self.file}: is of other input or parameters")
        except InputError as error:
            warnings.warn(f"{error}; {self.name} begins anew", stacklevel=2)
            return None
        return state

    def keep(self, state: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Write the state if the last one is old enough."""
        if not self._interval.over:
            return
        with self._interval.renewed(), writing(self.path):
            _write_state(self.file, state(), self.identity)


class RankedCheckpoint:
    """
    The state of work whose rows several processes share, to resume from by any number of them.

    Each writes what is about its own rows, and the first one the rest; a step counts when all have
    written it, and the first one has written an index that says so. Parameters as of
    `FileCheckpoint`; `rows` are those of this process.
    """

    def __init__(
        self,
        path: str | Path,
        name: str,
        identity: Mapping[str, Any],
        seconds: float,
        *,
        ranks: Ranks,
        rows: slice,
    ) -> None:
        self.path, self.name, self._interval = path, name, Interval(seconds)
        self.ranks, self.rows = ranks, rows
        self.identity = json.dumps(identity, sort_keys=True)
        self._step = 0

    def load(self) -> Mapping[str, np.ndarray] | None:
        """The last state of this very work that all had written, of own rows; or None."""
        index = self.ranks.broadcast(self._index() if self.ranks.leads else None)
        if index is None:
            return None
        # Later steps have other files, also those of other work: the index names these until then.
        self._step = index["step"]
        state, error = {}, ""
        try:
            if index["identity"] != self.identity:
                raise InputError(f"{self._file()}: is of other input or parameters")
            state = self._read(index["step"], index["parts"])
        except InputError as found:
            error = str(found)
        errors = [found for found in self.ranks.all_gather(error) if found]
        if errors:
            warnings.warn(f"{errors[0]}; {self.name} begins anew", stacklevel=2)
            return None
        return state

    def keep(self, state: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Write the state if the last one is old enough."""
        if not self.ranks.broadcast(self._interval.over):
            return
        arrays = dict(state())
        by_row = {name: arrays.pop(name) for name in ROW_ARRAYS if name in arrays}
        step, own = self._step + 1, [self.rows.start, self.rows.stop]
        with self._interval.renewed(), writing(self.path):
            if own[0] < own[1]:
                _write_state(self._file(step, own), by_row)
            if self.ranks.leads:
                _write_state(self._file(step), arrays)
            parts = [part for part in self.ranks.all_gather(own) if part[0] < part[1]]
            if self.ranks.leads:
                self._commit(step, parts)
        self._step = step

    def _commit(self, step: int, parts: list[list[int]]) -> None:
        """Make a step that all have written the last one; removes those before it."""
        kept = {self._file(), self._file(step), *(self._file(step, part) for part in parts)}
        with new_file(self._file()) as partial:
            write_json(partial, {"identity": self.identity, "step": step, "parts": parts})
        remove(*(file for file in ranked_files(self.path, self.name) if file not in kept))

    def _index(self) -> dict[str, Any] | None:
        """Identity, step and parts of the last state; None if there is no whole one."""
        if not self._file().exists():
            return None
        try:
            index = read_json(self._file())
            whole = isinstance(index["identity"], str) and isinstance(index["step"], int)
            parts = [[int(first), int(last)] for first, last in index["parts"]]
        except (InputError, KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            warnings.warn(f"{self._file()}: is damaged; {self.name} begins anew", stacklevel=3)
            return None
        return {"identity": index["identity"], "step": index["step"], "parts": parts}

    def _read(self, step: int, parts: list[list[int]]) -> dict[str, np.ndarray]:
        """The arrays of a step, those of rows of own ones."""
        pieces = []
        for first, last in parts:
            low, high = max(first, self.rows.start), min(last, self.rows.stop)
            if low < high or first == 0:  # a process without rows needs arrays, too
                arrays, _ = _read_state(self._file(step, [first, last]))
                low, high = (low, high) if low < high else (first, first)
                pieces.append(_rows_of(arrays, low - first, high - first))
        if sum(map(_n_rows, pieces)) != self.rows.stop - self.rows.start or not pieces:
            raise InputError(f"{self._file()}: lacks rows")
        joined = {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}
        return {**_read_state(self._file(step))[0], **joined}

    def _file(self, step: int | None = None, part: list[int] | None = None) -> Path:
        """The index; the file of a step; or that of its rows."""
        if step is None:
            return beside(self.path, f"{self.name}.ranks.index")
        rows = "" if part is None else f".{part[0]}-{part[1]}"
        return beside(self.path, f"{self.name}.ranks.{step}{rows}.npz")


def _state_sha256(state: Mapping[str, np.ndarray]) -> str:
    """Hash of the arrays of a state and of their names."""
    hashes = [(name, array_sha256(np.asarray(array))) for name, array in sorted(state.items())]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def checkpoint_of(
    path: str | Path,
    name: str,
    identity: Mapping[str, Any],
    seconds: float,
    partition: Partition,
) -> FileCheckpoint | RankedCheckpoint:
    """The checkpoint of work on rows, which one process has or ranks share."""
    ranks, rows = partition.ranks, partition.rows
    if ranks is ALONE:
        return FileCheckpoint(path, name, identity, seconds)
    return RankedCheckpoint(path, name, identity, seconds, ranks=ranks, rows=rows)


def files(path: str | Path, name: str) -> Iterator[Path]:
    """
    The files of a checkpoint of either kind, and its hidden neighbour while it is written.

    They are looked for when they are asked for.
    """
    file = beside(path, f"{name}.npz")
    yield from (file, partial_of(file), *ranked_files(path, name))


def ranked_files(path: str | Path, name: str) -> list[Path]:
    """The files that `RankedCheckpoint` has written, also those of a step that was interrupted."""
    start = beside(path, f"{name}.ranks.")
    return [file for file in start.parent.iterdir() if file.name.startswith(start.name)]


def _write_state(target: Path, state: Mapping[str, np.ndarray], identity: str = "") -> None:
    texts = {"identity": identity, "sha256": _state_sha256(state)}
    arrays: dict[str, Any] = {name: np.array(text) for name, text in texts.items()} | {**state}
    with new_file(target) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)


def _read_state(file: Path) -> tuple[dict[str, np.ndarray], str]:
    """The state in a file of `_write_state`, and its identity."""
    state = dict(read_arrays(file))
    identity, sha256 = (str(state.pop(name, "")) for name in ("identity", "sha256"))
    if sha256 != _state_sha256(state):
        raise InputError(f"{file}: damaged, or of an earlier version")
    return state, identity


def _rows_of(arrays: Mapping[str, np.ndarray], first: int, last: int) -> dict[str, np.ndarray]:
    """Consecutive rows of the arrays by rows."""
    rows = entries = slice(first, last)
    if "lengths" in arrays:
        ends = np.concatenate([[0], arrays["lengths"].cumsum(dtype=np.int64)])
        entries = slice(ends[first], ends[last])
    return {name: x[entries if name in ENTRY_ARRAYS else rows] for name, x in arrays.items()}


def _n_rows(arrays: Mapping[str, np.ndarray]) -> int:
    """The rows of the arrays by rows."""
    return len(arrays.get("lengths", next(iter(arrays.values()))))
