"""Rows of a feature folder that are kept where its images change: their shards, set aside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from transclip_fast.errors import InputError
from transclip_fast.store.arrays import inside, is_whole, read_array, read_table
from transclip_fast.store.atomic import read_json
from transclip_fast.store.row_table import RowTable

EARLIER = "earlier"  # folder of shards that were set aside: NAME.json, its entry, and
FILES = {  # by the entry's hash of each
    "features_sha256": ".npy",
    "local_sha256": ".local.npy",
    "metadata_sha256": ".parquet",
}


@dataclass
class KeptRows:
    """The rows that need not be encoded, each with its place in a shard that was set aside."""

    folder: Path  # of the features
    names: list[str]  # of the shards that were set aside
    shard: list[int]  # of each row of the source, a position in `names`; -1 for a row to encode
    position: list[int]  # of each row in its shard
    absent: list[str] = field(default_factory=list)  # keys of images that the source lost

    @classmethod
    def none(cls, folder: Path, n_rows: int) -> KeptRows:
        """No row is kept."""
        return cls(folder, [], [-1] * n_rows, [-1] * n_rows)

    @classmethod
    def find(cls, folder: Path, table: RowTable, rows: Sequence[int]) -> KeptRows:
        """Find those of some rows that are in the shards set aside in `folder`."""
        kept = cls.none(folder, len(table.keys))
        tables = []
        for name, entry in earlier_entries(folder).items():
            files = [(inside(folder, earlier_file(name, h)), entry[h]) for h in FILES if h in entry]
            if all(is_whole(file, sha256) for file, sha256 in files):
                metadata = read_table(folder / earlier_file(name, "metadata_sha256"))
                shard = np.full(len(metadata), len(kept.names), np.int64)
                metadata = metadata.append_column("shard", pa.array(shard))
                metadata = metadata.append_column("position", pa.array(np.arange(len(metadata))))
                tables.append(metadata)
                kept.names.append(name)
        if not tables:
            return kept
        stored = pa.concat_tables(tables, promote_options="default")
        kept.absent = table.absent(stored)
        found = table.find(rows, stored)
        shards, positions = (stored[name].to_numpy() for name in ("shard", "position"))
        for row, place in zip(rows, found, strict=True):
            if place >= 0:
                kept.shard[row], kept.position[row] = int(shards[place]), int(positions[place])
        return kept

    def has(self, row: int) -> bool:
        """Whether a row need not be encoded."""
        return self.shard[row] >= 0

    def read(self, rows: Sequence[int], kind: str) -> np.ndarray:
        """The features (rows, d), or local features, of rows that are kept."""
        parts = []
        for shard, chosen in self._by_shard(rows).items():
            features = read_array(self._file(shard, kind), kind)
            parts.append((chosen, features[[self.position[row] for row in chosen]]))
        order = np.argsort([row for chosen, _ in parts for row in chosen])
        joined: np.ndarray = np.concatenate([features for _, features in parts])[order]
        return joined

    def hashes(self, rows: Sequence[int]) -> list[str | None]:
        """The sha256 of the images of rows that are kept; None if an earlier version kept none."""
        found: dict[int, str | None] = {}
        for shard, chosen in self._by_shard(rows).items():
            metadata = read_table(self._file(shard, "metadata_sha256"))
            if "sha256" in metadata.column_names:
                column = metadata["sha256"].to_pylist()
                found |= {row: column[self.position[row]] for row in chosen}
        return [found.get(row) for row in rows]

    def _by_shard(self, rows: Sequence[int]) -> dict[int, list[int]]:
        shards: dict[int, list[int]] = {}
        for row in rows:
            shards.setdefault(self.shard[row], []).append(row)
        return shards

    def _file(self, shard: int, kind: str) -> Path:
        return inside(self.folder, earlier_file(self.names[shard], kind))


def earlier_file(name: str, kind: str) -> str:
    """A file of a shard that was set aside, by the entry for its hash."""
    return f"{EARLIER}/{name}{FILES[kind]}"


def earlier_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of the shards that were set aside, by their names."""
    entries = {}
    for record in sorted((folder / EARLIER).glob("*.json")):
        entry = read_json(inside(folder, f"{EARLIER}/{record.name}"))
        hashes = [entry.get(name) for name in ("features_sha256", "metadata_sha256")]
        hashes += [entry[name] for name in FILES if name in entry]
        number = entry.get("number")
        if type(number) is not int or number < 0 or not all(isinstance(h, str) for h in hashes):
            raise InputError(f"{record}: is damaged; remove it")
        entries[record.stem] = entry
    return entries
