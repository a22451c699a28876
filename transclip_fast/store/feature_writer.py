"""Writing a feature folder shard by shard, so that a killed run goes on where it stopped."""

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

from transclip_fast.errors import InputError
from transclip_fast.store.arrays import inside, npy_bytes
from transclip_fast.store.atomic import read_json, writing
from transclip_fast.version import __version__

MANIFEST = "manifest.json"
FAILURES = "failures.csv"
PROTOTYPES = "prototypes.npy"
RECORDS = "records"  # of shards that the manifest does not name yet
FOLDERS = ("img_emb", "local_emb", "metadata", RECORDS)
# Decided by the first run and kept by those that continue it: other values change some last bits.
KEPT = ("batch_size", "threads", "shard_rows")
TEXT = ("class_names", "templates", "prompts_sha256", "prototypes_sha256")


@dataclass(frozen=True)
class Failure:
    """
    An image that could not be read: its row in the source, its key, and why.

    `fatal` is a failure of the machine, not of the image: the run stops and can be continued.
    """

    source_row: int
    key: str
    reason: str
    fatal: bool = False


@dataclass(frozen=True)
class RowTable:
    """Of each row of the source its key, its path, and its label where there are any."""

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
    A feature folder in the making: img_emb/, local_emb/ where asked for, metadata/, prototypes.npy,
    manifest.json.

    Every file appears whole; a shard counts once the manifest, or a file of records/ on the way to
    it, names it with its hash. The metadata follows from the source alone: that of finished shards
    is written again where labels changed.

    Parameters
    ----------
    path : path
        The folder; one that was begun with the same `config` is continued.
    config : mapping
        What decides the features: model, preprocessing, source, and the entries of `KEPT`, which
        an existing folder overrules.
    table : RowTable
        The rows of the source.
    leads : bool
        Whether this process keeps the manifest; others write the shards they are told, with the
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
        self.shards: dict[str, dict[str, Any]] = {}  # by number, as JSON has no other keys
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
        """The configured one, or the smallest that a shard had to be encoded with."""
        used = [int(entry["batch_size"]) for entry in self.shards.values()]
        return min([int(self.config["batch_size"]), *used])

    def rows(self, number: int) -> range:
        """Source rows of a shard."""
        size = self.config["shard_rows"]
        return range(number * size, min((number + 1) * size, self.config["source"]["rows"]))

    def missing(self) -> list[int]:
        """Numbers of the shards that are still to be written."""
        return [number for number in range(self.n_shards) if str(number) not in self.shards]

    def failures(self) -> Iterator[Failure]:
        """The unreadable images of all shards, in source order."""
        for number in sorted(self.shards, key=int):
            for failure in self.shards[number]["failures"]:
                yield Failure(*failure)

    def write_shard(
        self, number: int, features: np.ndarray, failures: Sequence[Failure], batch_size: int
    ) -> None:
        """
        One shard: features (rows, d) float16 of all its rows but the failures.

        Features (rows, 1 + L, d) are those of the images and of L patches of each, which go to a
        file of their own, as (rows, L d).

        Raises
        ------
        InputError
            The folder cannot be written (full disk, permissions).
        """
        listed = [[f.source_row, f.key, f.reason] for f in failures]
        own = {}
        with writing(self.folder):
            if features.ndim == 3:
                patches = features[:, 1:].reshape(len(features), -1)
                own["local_sha256"] = self._save(local_name(number), npy_bytes(patches))
                features = np.ascontiguousarray(features[:, 0])
            entry = {
                "rows": len(features),
                "batch_size": batch_size,
                **own,
                "features_sha256": self._save(features_name(number), npy_bytes(features)),
                "metadata_sha256": self._save(
                    metadata_name(number), self._metadata(number, listed)
                ),
                "failures": listed,
            }
            self._save(record_name(number), (json.dumps(entry) + "\n").encode())
        self.shards[str(number)] = entry

    def finish(self) -> None:
        """
        Name the shards that all processes have written in the manifest.

        Raises
        ------
        InputError
            The folder cannot be written (full disk, permissions).
        """
        with writing(self.folder):
            self._collect()

    def has_prototypes(self, identity: Mapping[str, Any]) -> bool:
        """Whether prototypes.npy is there, whole, and of this identity."""
        return all(self.text.get(name) == value for name, value in identity.items()) and (
            self._whole(PROTOTYPES, self.text.get("prototypes_sha256"))
        )

    def write_prototypes(self, prototypes: np.ndarray, identity: Mapping[str, Any]) -> None:
        """Prototypes (K, d) float32; `identity` tells class names and how they were made."""
        with writing(self.folder):
            sha256 = self._save(PROTOTYPES, npy_bytes(prototypes))
            self.text = {**identity, "prototypes_sha256": sha256}
            self._save_manifest()

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for entry in self.folder.iterdir():  # a run killed at its start leaves no more than these
            if entry.name not in FOLDERS and not _is_partial(entry):
                raise InputError(f"{self.folder}: holds other files; name a new folder")
        self._save_manifest()

    def _continue(self) -> None:
        manifest = read_json(inside(self.folder, MANIFEST))
        begun = manifest.get("config")
        if not isinstance(begun, dict) or not isinstance(manifest.get("shards"), dict):
            raise InputError(f"{self.folder / MANIFEST}: is not a feature folder's; name a new one")
        for name in self.config:
            if name not in KEPT and begun.get(name) != self.config[name]:
                raise InputError(
                    f"{self.folder}: was begun with {name} {begun.get(name)!r}, now "
                    f"{self.config[name]!r}; name a new folder"
                )
        try:
            self.config = {**begun, **{name: int(begun[name]) for name in KEPT}}
            self.text = {name: manifest[name] for name in TEXT if name in manifest}
            for number, entry in manifest["shards"].items():
                self._count(number, entry)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.folder / MANIFEST}: is damaged ({error!r}); name a new folder"
            ) from error

    def _count(self, number: str, entry: Mapping[str, Any]) -> None:
        """Take a shard for written if its features are what they should be."""
        if self.shards.get(number) == entry:  # this process has just written it
            return
        whole = self._whole(features_name(int(number)), entry["features_sha256"])
        if "local_sha256" in entry:
            whole = whole and self._whole(local_name(int(number)), entry["local_sha256"])
        if whole:
            batch_size = int(entry.get("batch_size", self.config["batch_size"]))
            failures = list(entry["failures"])
            self.shards[number] = {**entry, "batch_size": batch_size, "failures": failures}

    def _collect(self) -> None:
        """Move the records into the manifest."""
        records = sorted((self.folder / RECORDS).glob("*.json"))
        for record in records:
            try:
                self._count(
                    str(int(record.stem)), read_json(inside(self.folder / RECORDS, record.name))
                )
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{record}: is damaged ({error!r}); remove it") from error
        if records:
            self._save_failures()
            self._save_manifest()
        for record in records:
            record.unlink()
        if (self.folder / RECORDS).is_dir():
            shutil.rmtree(self.folder / RECORDS)

    def _refresh_metadata(self) -> None:
        """Metadata of finished shards as the source has it now."""
        changed = False
        for number, entry in self.shards.items():
            content = self._metadata(int(number), entry["failures"])
            sha256 = hashlib.sha256(content).hexdigest()
            if not self._whole(metadata_name(int(number)), sha256):
                self._save(metadata_name(int(number)), content)
            changed |= entry.get("metadata_sha256") != sha256
            entry["metadata_sha256"] = sha256
        if changed:
            self._save_manifest()

    def _metadata(self, number: int, failures: Sequence[Sequence[Any]]) -> bytes:
        failed = {failure[0] for failure in failures}
        return self.table.parquet([row for row in self.rows(number) if row not in failed])

    def _whole(self, name: str, sha256: str | None) -> bool:
        file = inside(self.folder, name)
        return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256

    def _save_failures(self) -> None:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["source_row", "key", "reason"])
        rows.writerows([f.source_row, f.key, f.reason] for f in self.failures())
        self._save(FAILURES, text.getvalue().encode())

    def _save_manifest(self) -> None:
        shards = {number: self.shards[number] for number in sorted(self.shards, key=int)}
        manifest = {
            "version": __version__,
            "complete": self.complete,
            "rows": sum(entry["rows"] for entry in shards.values()),
            "config": self.config,
            **self.text,
            "shards": shards,
        }
        self._save(MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())

    def _save(self, name: str, data: bytes) -> str:
        """Write a file under a temporary name, sync, rename; its sha256."""
        target = self.folder / name
        target.parent.mkdir(exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(target)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        return hashlib.sha256(data).hexdigest()


def features_name(number: int) -> str:
    """File of a shard's features."""
    return f"img_emb/img_emb_{number:05}.npy"


def local_name(number: int) -> str:
    """File of a shard's local features."""
    return f"local_emb/local_emb_{number:05}.npy"


def metadata_name(number: int) -> str:
    """File of a shard's metadata."""
    return f"metadata/metadata_{number:05}.parquet"


def record_name(number: int) -> str:
    """File that names a shard until the manifest does."""
    return f"{RECORDS}/{number:05}.json"


def _is_partial(entry: Path) -> bool:
    return entry.name.startswith(".") and entry.name.endswith(".partial")
