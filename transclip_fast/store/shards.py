"""Writing a feature folder shard by shard, so that a killed run goes on where it stopped."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from transclip_fast.errors import InputError
from transclip_fast.store.arrays import npy_bytes
from transclip_fast.store.atomic import read_json, unwritable
from transclip_fast.store.features import inside

MANIFEST = "manifest.json"
FAILURES = "failures.csv"
PROTOTYPES = "prototypes.npy"
# Decided by the first run and kept by those that continue it: other values change some last bits.
KEPT = ("batch_size", "threads", "shard_rows")
TEXT = ("class_names", "templates", "prompts_sha256", "prototypes_sha256")


@dataclass(frozen=True)
class Failure:
    """An image that could not be read: its row in the source, its key, and why."""

    source_row: int
    key: str
    reason: str


class FeatureWriter:
    """
    A feature folder in the making: img_emb/, metadata/, prototypes.npy, manifest.json.

    Every file appears whole; a shard counts once the manifest names it with its hash.

    Parameters
    ----------
    path : path
        The folder; one that was begun with the same `config` is continued.
    config : mapping
        What decides the features: model, preprocessing, source, and the entries of `KEPT`, which
        an existing folder overrules.

    Raises
    ------
    InputError
        The folder was begun with another configuration (which entry), or holds other files.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any]) -> None:
        self.folder = Path(path)
        self.config = json.loads(json.dumps(config))
        self.shards: dict[str, dict[str, Any]] = {}  # by number, as JSON has no other keys
        self.text: dict[str, Any] = {}
        if (self.folder / MANIFEST).is_file():
            self._continue()
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise InputError(f"{path}: holds other files; name a new folder")
        try:
            for name in ("img_emb", "metadata"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self._save_manifest()
        except OSError as error:
            raise unwritable(path, error) from error

    @property
    def n_shards(self) -> int:
        return -(-int(self.config["source"]["rows"]) // int(self.config["shard_rows"]))

    @property
    def complete(self) -> bool:
        return len(self.shards) == self.n_shards

    def missing(self) -> list[tuple[int, range]]:
        """Number and source rows of each shard that is still to be written."""
        rows, size = self.config["source"]["rows"], self.config["shard_rows"]
        return [
            (number, range(number * size, min((number + 1) * size, rows)))
            for number in range(self.n_shards)
            if str(number) not in self.shards
        ]

    def failures(self) -> Iterator[Failure]:
        """The unreadable images of all shards, in source order."""
        for number in sorted(self.shards, key=int):
            for failure in self.shards[number]["failures"]:
                yield Failure(*failure)

    def write_shard(
        self,
        number: int,
        features: np.ndarray,
        source_rows: Sequence[int],
        keys: Sequence[str],
        paths: Sequence[str],
        labels: np.ndarray | None,
        failures: Sequence[Failure],
    ) -> None:
        """
        One shard: features (rows, d) float16, and for each row where it came from.

        Raises
        ------
        InputError
            The folder cannot be written (full disk, permissions).
        """
        columns: dict[str, Any] = {
            "source_row": pa.array(source_rows, pa.int64()),
            "key": pa.array(keys, pa.string()),
            "path": pa.array(paths, pa.string()),
        }
        if labels is not None:
            columns["label"] = pa.array(labels, pa.int64())
        table = io.BytesIO()
        pq.write_table(pa.table(columns), table)
        try:
            entry = {
                "rows": len(features),
                "features_sha256": self._save(_features_name(number), npy_bytes(features)),
                "metadata_sha256": self._save(_metadata_name(number), table.getvalue()),
                "failures": [[f.source_row, f.key, f.reason] for f in failures],
            }
            self.shards[str(number)] = entry
            self._save_failures()
            self._save_manifest()
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def has_prototypes(self, identity: Mapping[str, Any]) -> bool:
        """Whether prototypes.npy is there, whole, and of this identity."""
        return all(self.text.get(name) == value for name, value in identity.items()) and (
            self._whole(PROTOTYPES, self.text.get("prototypes_sha256"))
        )

    def write_prototypes(self, prototypes: np.ndarray, identity: Mapping[str, Any]) -> None:
        """Prototypes (K, d) float32; `identity` tells class names and how they were made."""
        try:
            sha256 = self._save(PROTOTYPES, npy_bytes(prototypes))
            self.text = {**identity, "prototypes_sha256": sha256}
            self._save_manifest()
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def _continue(self) -> None:
        manifest = read_json(inside(self.folder, MANIFEST))
        begun = manifest.get("config")
        if not isinstance(begun, dict) or not isinstance(manifest.get("shards"), dict):
            raise InputError(f"{self.folder / MANIFEST}: is not a feature folder's; name a new one")
        for name in sorted(set(begun) | set(self.config)):
            if name not in KEPT and begun.get(name) != self.config.get(name):
                raise InputError(
                    f"{self.folder}: was begun with {name} {begun.get(name)!r}, now "
                    f"{self.config.get(name)!r}; name a new folder"
                )
        self.config = begun
        self.text = {name: manifest[name] for name in TEXT if name in manifest}
        for number, entry in manifest["shards"].items():
            if self._whole(_features_name(int(number)), entry["features_sha256"]) and self._whole(
                _metadata_name(int(number)), entry["metadata_sha256"]
            ):
                self.shards[number] = entry

    def _whole(self, name: str, sha256: str | None) -> bool:
        file = inside(self.folder, name)
        return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256

    def _save_failures(self) -> None:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["source_row", "key", "reason"])
        rows.writerows([f.source_row, f.key, f.reason] for f in self.failures())
        self._save(FAILURES, text.getvalue().encode("utf-8", errors="surrogateescape"))

    def _save_manifest(self) -> None:
        shards = {number: self.shards[number] for number in sorted(self.shards, key=int)}
        manifest = {
            "complete": self.complete,
            "rows": sum(entry["rows"] for entry in shards.values()),
            "config": self.config,
            **self.text,
            "shards": shards,
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=True) + "\n"
        self._save(MANIFEST, text.encode())

    def _save(self, name: str, data: bytes) -> str:
        """Write a file under a temporary name, sync, rename; its sha256."""
        target = self.folder / name
        partial = target.with_name(f".{target.name}.partial")
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(target)
        return hashlib.sha256(data).hexdigest()


def _features_name(number: int) -> str:
    return f"img_emb/img_emb_{number:05}.npy"


def _metadata_name(number: int) -> str:
    return f"metadata/metadata_{number:05}.parquet"
