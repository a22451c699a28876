"""Writing a feature folder shard by shard, so that a killed run resumes where it stopped."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from transclip_fast.errors import InputError, reading
from transclip_fast.store.arrays import file_sha256, inside, npy_bytes
from transclip_fast.store.atomic import new_file, read_json, writing
from transclip_fast.version import __version__

MANIFEST = "manifest.json"
FAILURES = "failures.csv"
PROTOTYPES = "prototypes.npy"
# Files of a shard, by its number. RECORD lists a written shard until the manifest does.
IMAGES = "img_emb/img_emb_{:05}.npy"
LOCAL = "local_emb/local_emb_{:05}.npy"
METADATA = "metadata/metadata_{:05}.parquet"
RECORD = "records/{:05}.json"
FOLDERS = ("img_emb", "local_emb", "metadata", "records")
# Settings of the first run, which resumed runs keep: other values change some last bits.
SETTLED = ("batch_size", "threads", "shard_rows")
TEXT = ("class_names", "templates", "prompts_sha256", "prototypes_sha256")


@dataclass(frozen=True)
class Failure:
    """An image that could not be read: its row in the source, its key, and why."""

    source_row: int
    key: str
    reason: str
    fatal: bool = False  # the machine failed, not the image: the run stops and can be continued


@dataclass(frozen=True)
class RowTable:
    """Key and path of each row of the source, and its label if there are any."""

    keys: Sequence[str]
    paths: Sequence[str]
    labels: np.ndarray | None

    def parquet(self, rows: Sequence[int]) -> bytes:
        """The metadata of some rows as a parquet file."""
        columns: dict[str, Any] = {
            "source_row": pa.array(rows, pa.int64()),
            "key": pa.array([self.keys[row] for row in rows], pa.string()),
            "path": pa.array([self.paths[row] for row in rows], pa.string()),
        }
        if self.labels is not None:
            columns["label"] = pa.array(self.labels[list(rows)], pa.int64())
        content = io.BytesIO()
        pq.write_table(pa.table(columns), content)
        return content.getvalue()


class FeatureWriter:
    """
    A feature folder in the making: img_emb/, local_emb/ if asked for, metadata/, prototypes.npy,
    manifest.json.

    Every file appears whole. A shard counts as written once the manifest, or a file of records/ on
    the way to it, lists it with its hash. The metadata follows from the source alone: that of
    finished shards is written again if labels changed.

    Parameters
    ----------
    path : path
        The folder; one that was begun with the same `config` is continued.
    config : mapping
        All that decides the features: model, preprocessing, source, and the entries of `SETTLED`,
        which those of an existing folder replace.
    table : RowTable
    leads : bool
        Whether this process writes the manifest; the others only write shards, with the
        configuration that the leading one has settled.

    Raises
    ------
    InputError
        The folder was begun with another configuration (which entry), holds other files, is
        damaged, or cannot be written.
    """

    def __init__(
        self, path: str | Path, config: Mapping[str, Any], table: RowTable, leads: bool = True
    ) -> None:
        self.folder, self.table = Path(path), table
        self.config = json.loads(json.dumps(config))
        self.shards: dict[int, dict[str, Any]] = {}  # entries of the manifest
        self.text: dict[str, Any] = {}
        if not leads:
            return
        with writing(path):
            if os.path.isfile(self.folder / MANIFEST):
                self._continue()
            else:
                self._begin()
            self._collect()
            self._refresh_metadata()

    @property
    def n_shards(self) -> int:
        return -(-int(self.config["source"]["rows"]) // int(self.config["shard_rows"]))

    @property
    def complete(self) -> bool:
        return len(self.shards) == self.n_shards

    @property
    def batch_size(self) -> int:
        """The configured batch size, or a smaller one if a shard had to be encoded with that."""
        used = [int(entry["batch_size"]) for entry in self.shards.values()]
        return min([int(self.config["batch_size"]), *used])

    def rows(self, number: int) -> range:
        """Source rows of a shard."""
        size = self.config["shard_rows"]
        return range(number * size, min((number + 1) * size, self.config["source"]["rows"]))

    def missing(self) -> list[int]:
        """Numbers of the shards that are still to be written."""
        return [number for number in range(self.n_shards) if number not in self.shards]

    def failures(self) -> Iterator[Failure]:
        """The unreadable images of all shards, in source order."""
        for _, entry in sorted(self.shards.items()):
            for failure in entry["failures"]:
                yield Failure(*failure)

    def write_shard(
        self, number: int, features: np.ndarray, failures: Sequence[Failure], batch_size: int
    ) -> None:
        """
        Write a shard: features (rows, d) float16 of all its rows but the failures.

        Features (rows, 1 + L, d) are those of the images and of L patches of each, which go to a
        file of their own, as (rows, L d).
        """
        listed = [[failure.source_row, failure.key, failure.reason] for failure in failures]
        patches = {}
        with writing(self.folder):
            if features.ndim == 3:
                flat = features[:, 1:].reshape(len(features), -1)
                patches["local_sha256"] = self._save(LOCAL.format(number), npy_bytes(flat))
                features = np.ascontiguousarray(features[:, 0])
            entry = {
                "rows": len(features),
                "batch_size": batch_size,
                **patches,
                "features_sha256": self._save(IMAGES.format(number), npy_bytes(features)),
                "metadata_sha256": self._save(
                    METADATA.format(number), self._metadata(number, listed)
                ),
                "failures": listed,
            }
            self._save(RECORD.format(number), (json.dumps(entry) + "\n").encode())
        self.shards[number] = entry

    def finish(self) -> None:
        """List the shards that all processes have written in the manifest."""
        with writing(self.folder):
            self._collect()

    def has_prototypes(self, identity: Mapping[str, Any]) -> bool:
        """Whether prototypes.npy exists, is whole, and has this identity."""
        return all(self.text.get(name) == value for name, value in identity.items()) and (
            self._is_whole(PROTOTYPES, self.text.get("prototypes_sha256"))
        )

    def write_prototypes(self, prototypes: np.ndarray, identity: Mapping[str, Any]) -> None:
        """Write prototypes (K, d) float32; `identity` holds class names and how they were made."""
        with writing(self.folder):
            sha256 = self._save(PROTOTYPES, npy_bytes(prototypes))
            self.text = {**identity, "prototypes_sha256": sha256}
            self._save_manifest()

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for entry in self.folder.iterdir():  # a run killed at its start leaves no more than these
            partial = entry.name.startswith(".") and entry.name.endswith(".partial")
            if entry.name not in FOLDERS and not partial:
                raise InputError(f"{self.folder}: holds other files; name a new folder")
        self._save_manifest()

    def _continue(self) -> None:
        file = self.folder / MANIFEST
        manifest = read_json(inside(self.folder, MANIFEST))
        begun, shards = manifest.get("config"), manifest.get("shards")
        if not isinstance(begun, dict) or not isinstance(shards, dict):
            raise InputError(f"{file}: is not a feature folder's; name a new one")
        for name in self.config:
            if name not in SETTLED and begun.get(name) != self.config[name]:
                raise InputError(
                    f"{self.folder}: was begun with {name} {begun.get(name)!r}, now "
                    f"{self.config[name]!r}; name a new folder"
                )
        with reading(file, "is damaged", "name a new folder"):
            self.config = {**begun, **{name: int(begun[name]) for name in SETTLED}}
            entries = {int(number): self._checked(entry) for number, entry in shards.items()}
        self.text = {name: manifest[name] for name in TEXT if name in manifest}
        for number, entry in entries.items():
            self._count(number, entry)

    def _checked(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """A manifest entry with every field that this class reads; any error if one is missing."""
        return {
            **entry,
            "features_sha256": str(entry["features_sha256"]),
            "batch_size": int(entry.get("batch_size", self.config["batch_size"])),
            "failures": list(entry["failures"]),
        }

    def _count(self, number: int, entry: dict[str, Any]) -> None:
        """Count a shard as written if its features have the hashes of the entry."""
        if self.shards.get(number) == entry:  # this process has just written it
            return
        files = {"features_sha256": IMAGES, "local_sha256": LOCAL}
        if all(self._is_whole(files[h].format(number), entry[h]) for h in files if h in entry):
            self.shards[number] = entry

    def _collect(self) -> None:
        """Move the records into the manifest."""
        folder = self.folder / "records"
        records = sorted(folder.glob("*.json"))
        for record in records:
            content = read_json(inside(folder, record.name))
            with reading(record, "is damaged", "remove it"):
                number, entry = int(record.stem), self._checked(content)
            self._count(number, entry)
        if records:
            self._save_failures()
            self._save_manifest()
        if folder.is_dir():
            shutil.rmtree(folder)

    def _refresh_metadata(self) -> None:
        """Write the metadata of finished shards again if the source has other labels now."""
        changed = False
        for number, entry in self.shards.items():
            content = self._metadata(number, entry["failures"])
            sha256 = hashlib.sha256(content).hexdigest()
            if not self._is_whole(METADATA.format(number), sha256):
                self._save(METADATA.format(number), content)
            changed |= entry.get("metadata_sha256") != sha256
            entry["metadata_sha256"] = sha256
        if changed:
            self._save_manifest()

    def _metadata(self, number: int, failures: Sequence[Sequence[Any]]) -> bytes:
        failed = {failure[0] for failure in failures}
        return self.table.parquet([row for row in self.rows(number) if row not in failed])

    def _is_whole(self, name: str, sha256: str | None) -> bool:
        file = inside(self.folder, name)
        return file.is_file() and file_sha256(file) == sha256

    def _save_failures(self) -> None:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["source_row", "key", "reason"])
        rows.writerows([f.source_row, f.key, f.reason] for f in self.failures())
        self._save(FAILURES, text.getvalue().encode())

    def _save_manifest(self) -> None:
        manifest = {
            "version": __version__,
            "complete": self.complete,
            "rows": sum(entry["rows"] for entry in self.shards.values()),
            "config": self.config,
            **self.text,
            "shards": dict(sorted(self.shards.items())),
        }
        self._save(MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())

    def _save(self, name: str, content: bytes) -> str:
        """Write a file that appears whole; returns its sha256."""
        target = self.folder / name
        target.parent.mkdir(exist_ok=True)
        with new_file(target) as partial:
            partial.write_bytes(content)
        return hashlib.sha256(content).hexdigest()
