"""Writing a feature folder shard by shard, so that a killed run resumes where it stopped."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from transclip_fast.data.names import listed
from transclip_fast.errors import InputError, reading
from transclip_fast.store.arrays import inside, is_whole, npy_bytes, read_table
from transclip_fast.store.atomic import read_json, writing
from transclip_fast.store.json_text import value_of
from transclip_fast.store.kept_rows import EARLIER, KeptRows, earlier_entries, earlier_file
from transclip_fast.store.row_table import RowTable
from transclip_fast.version import __version__
from transclip_fast.whole_files import new_file

MANIFEST = "manifest.json"
FAILURES = "failures.csv"
PROTOTYPES = "prototypes.npy"
# Files of a shard, by its number. RECORD lists a written shard until the manifest does.
IMAGES = "img_emb/img_emb_{:05}.npy"
LOCAL = "local_emb/local_emb_{:05}.npy"
METADATA = "metadata/metadata_{:05}.parquet"
RECORD = "records/{:05}.json"
SHARD_FILES = {"features_sha256": IMAGES, "local_sha256": LOCAL, "metadata_sha256": METADATA}
FOLDERS = ("img_emb", "local_emb", "metadata", "records", EARLIER)
# Settings of the first run, which resumed runs keep: other values change some last bits.
SETTLED = {"batch_size": 2**31, "threads": 4096, "shard_rows": 2**31}  # the most each can be
TEXT = ("class_names", "templates", "prompts_sha256", "tokenizer_sha256", "prototypes_sha256")
SHOWN_KEYS = 3  # of images, in a warning


@dataclass(frozen=True)
class Failure:
    """An image that could not be encoded: its row in the source, its key, and why."""

    source_row: int
    key: str
    reason: str
    fatal: bool = False  # the machine or the precision failed, not the image: the run stops


class FeatureWriter:
    """
    A feature folder in the making: img_emb/, local_emb/ if asked for, metadata/, prototypes.npy,
    manifest.json.

    Every file appears whole. A shard counts as written once the manifest, or a file of records/ on
    the way to it, lists it with its hash. Where labels changed, only metadata are written again.
    Where images changed, `set_aside` moves their shards, and those with failures, to earlier/;
    the shards in their places take over the rows of images that are as before.

    Parameters
    ----------
    path : path
        The folder; one that was begun with the same `config` is continued.
    config : mapping
        All that decides the features: model, preprocessing, source, and the entries of `SETTLED`,
        which those of an existing folder replace. The source may have changed.
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
        self.stale: dict[int, dict[str, Any]] = {}  # those of images that changed since
        self.kept = KeptRows.none(self.folder, int(self.config["source"]["rows"]))
        self.text: dict[str, Any] = {}
        if not leads:
            return
        with writing(path):
            if os.path.isfile(self.folder / MANIFEST):
                self._continue()
            else:
                self._begin()
            self._clean()

    @property
    def n_shards(self) -> int:
        return -(-int(self.config["source"]["rows"]) // int(self.config["shard_rows"]))

    @property
    def complete(self) -> bool:
        return not self.stale and len(self.shards) == self.n_shards

    @property
    def batch_size(self) -> int:
        """The configured batch size, or a smaller one if a shard had to be encoded with that."""
        used = [int(entry["batch_size"]) for entry in self.shards.values()]
        return min([int(self.config["batch_size"]), *used])

    def rows(self, number: int) -> range:
        """Source rows of a shard."""
        size = self.config["shard_rows"]
        return range(number * size, min((number + 1) * size, self.config["source"]["rows"]))

    def rows_to_encode(self, number: int) -> list[int]:
        """Source rows of a shard that are not kept."""
        return [row for row in self.rows(number) if not self.kept.has(row)]

    def missing(self) -> list[int]:
        """Numbers of the shards that are still to be written."""
        return [number for number in range(self.n_shards) if number not in self.shards]

    def failures(self) -> Iterator[Failure]:
        """The unreadable images of all shards, in source order."""
        for _, entry in sorted(self.shards.items()):
            for failure in entry["failures"]:
                yield Failure(*failure)

    def set_aside(self) -> None:
        """Begin shards of changed images, and those with failures, again; find rows to keep."""
        failed = {number: entry for number, entry in self.shards.items() if entry["failures"]}
        again = {**self.stale, **failed}
        if not again and not (self.folder / EARLIER).is_dir():
            return
        with writing(self.folder):
            for number, entry in again.items():
                name = f"{EARLIER}/{number:05}-{entry['metadata_sha256']}.json"
                self._save(name, (json.dumps({**entry, "number": number}) + "\n").encode())
                self.shards.pop(number, None)
            self.stale = {}
            for name, entry in earlier_entries(self.folder).items():
                for kind in SHARD_FILES.keys() & entry.keys():
                    file = SHARD_FILES[kind].format(entry["number"])
                    if entry["number"] not in self.shards and self._is_whole(file, entry[kind]):
                        (self.folder / file).replace(self.folder / earlier_file(name, kind))
            self._save_failures()
            self._save_manifest()
        rows = [row for number in self.missing() for row in self.rows(number)]
        self.kept = KeptRows.find(self.folder, self.table, rows)
        if absent := self.kept.absent:
            warnings.warn(
                f"{self.folder}: images that are no longer there lose their rows: {len(absent):,} "
                f"({listed(absent, SHOWN_KEYS)})",
                stacklevel=2,
            )

    def write_shard(
        self,
        number: int,
        features: np.ndarray,
        hashes: Sequence[str],
        failures: Sequence[Failure],
        batch_size: int,
    ) -> None:
        """
        Write a shard: the rows that are kept, and those of `rows_to_encode` but the failures, of
        which these are the features (rows, d) float16 and the hashes of the images.

        Features (rows, 1 + L, d) are those of the images and of L patches of each, which go to a
        file of their own, as (rows, L d).
        """
        listed = [[failure.source_row, failure.key, failure.reason] for failure in failures]
        failed = {failure.source_row for failure in failures}
        rows = [row for row in self.rows(number) if row not in failed]
        kept = [row for row in rows if self.kept.has(row)]
        encoded = [row for row in rows if not self.kept.has(row)]
        order = np.argsort([*encoded, *kept])

        def joined(array: np.ndarray, kind: str) -> np.ndarray:
            return np.concatenate([array, self.kept.read(kept, kind)])[order] if kept else array

        unordered = [*hashes, *self.kept.hashes(kept)]
        sha256 = [unordered[place] for place in order]
        patches = {}
        with writing(self.folder):
            if features.ndim == 3:
                patches_size = (features.shape[1] - 1) * features.shape[2]
                flat = features[:, 1:].reshape(len(features), patches_size)
                local = npy_bytes(joined(flat, "local_sha256"))
                patches["local_sha256"] = self._save(LOCAL.format(number), local)
                features = np.ascontiguousarray(features[:, 0])
            images = npy_bytes(joined(features, "features_sha256"))
            entry = {
                "rows": len(rows),
                "batch_size": batch_size,
                **patches,
                "features_sha256": self._save(IMAGES.format(number), images),
                "metadata_sha256": self._save(
                    METADATA.format(number), self.table.parquet(rows, sha256)
                ),
                "failures": listed,
            }
            self.shards[number] = entry
            self._save_record(number)

    def finish(self) -> None:
        """List the shards that all processes have written in the manifest."""
        with writing(self.folder):
            for number, entry in self._records():
                if self.shards.get(number) == entry or self._has_files(number, entry):
                    self.shards[number] = entry
            self._list_records()
            self._clean()

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

    def remove_prototypes(self) -> None:
        """Remove prototypes and class names of an earlier encode, with a warning."""
        file = self.folder / PROTOTYPES
        if not self.text and not file.exists():
            return
        with writing(self.folder):
            file.unlink(missing_ok=True)  # first: class names without prototypes label nothing
            self.text = {}
            self._save_manifest()
        warnings.warn(
            f"{self.folder}: class names and prototypes of an earlier encode are removed, as there "
            "are no classes now; give the classes to have them again",
            stacklevel=2,
        )

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
        settled = {
            name: value_of(begun, name, int, file, minimum=1, maximum=most)
            for name, most in SETTLED.items()
        }
        for name in self.config:
            if name not in (*SETTLED, "source") and begun.get(name) != self.config[name]:
                raise InputError(
                    f"{self.folder}: was begun with {name} {begun.get(name)!r}, now "
                    f"{self.config[name]!r}; name a new folder"
                )
        with reading(file, "is damaged", "name a new folder"):
            if any(str(int(number)) != number for number in shards):
                raise ValueError("a shard has no number")
            entries = [(int(n), _checked(shard, begun, file)) for n, shard in shards.items()]
        self.config = {**begun, **settled, "source": self.config["source"]}
        self.text = {name: manifest[name] for name in TEXT if name in manifest}
        for number, entry in [*entries, *self._records()]:
            if self._has_files(number, entry):
                self._count(number, entry, begun.get("source") == self.config["source"])
        self._check_source()
        self._list_records()

    def _check_source(self) -> None:
        """Refuse a source without a single image of the folder, which would lose all its rows."""
        keys = list[str]()
        for number, entry in self.stale.items():
            if "metadata_sha256" in entry:  # else all of its images failed
                stored = read_table(self.folder / METADATA.format(number), ("key",))
                keys += stored["key"].to_pylist()
                if len(self.table.absent(stored)) < len({*stored["key"].to_pylist()}):
                    return
        if keys and not self.shards:
            raise InputError(
                f"{self.folder}: has features of {len(keys):,} other images, such as {keys[0]}, "
                "and of none of these; name a new folder"
            )

    def _records(self) -> list[tuple[int, dict[str, Any]]]:
        """Number and entry of the shards that were written but are not in the manifest yet."""
        found = []
        for record in sorted((self.folder / "records").glob("*.json")):
            content = read_json(inside(record.parent, record.name))
            with reading(record, "is damaged", "remove it"):
                found.append((int(record.stem), _checked(content, self.config, record)))
        return found

    def _list_records(self) -> None:
        """Move the records into the manifest."""
        folder = self.folder / "records"
        if any(folder.glob("*.json")):
            self._save_failures()
            self._save_manifest()
        if folder.is_dir():
            shutil.rmtree(folder)

    def _has_files(self, number: int, entry: Mapping[str, Any]) -> bool:
        """Whether the files of an entry are whole."""
        kinds = SHARD_FILES.keys() & entry.keys()
        return all(self._is_whole(SHARD_FILES[k].format(number), entry[k]) for k in kinds)

    def _count(self, number: int, entry: dict[str, Any], same_source: bool) -> None:
        """Count a whole shard as written if it is of the present images, with present labels."""
        name = METADATA.format(number)
        stored = read_table(self.folder / name) if "metadata_sha256" in entry else pa.table({})
        failed = {failure[0] for failure in entry["failures"]}
        rows = [row for row in self.rows(number) if row not in failed]
        by_time = self.table.stamps is not None and self.table.contents is None
        if by_time and "mtime_ns" not in stored.column_names:
            if not same_source:
                raise InputError(
                    f"{self.folder}: was begun with other images by a version that noted no sizes "
                    "and times; name a new folder"
                )
        elif not self.table.matches(rows, stored):
            if "metadata_sha256" in entry:  # without metadata, no row can be kept
                self.stale[number] = entry
            return
        sha256 = stored["sha256"].to_pylist() if "sha256" in stored.column_names else None
        content = self.table.parquet(rows, sha256)
        self.shards[number] = {**entry, "metadata_sha256": hashlib.sha256(content).hexdigest()}
        if self.shards[number] != entry:  # record first, so that one of two entries always fits
            self._save_record(number)
            self._save(name, content)

    def _clean(self) -> None:
        """Remove what a complete folder does not need."""
        if not self.complete:
            return
        if (self.folder / EARLIER).is_dir():
            shutil.rmtree(self.folder / EARLIER)
        for pattern in SHARD_FILES.values():
            for file in (self.folder / pattern).parent.glob("*_[0-9]*"):
                number = re.search(r"_(\d+)$", file.stem)
                if number is not None and int(number[1]) >= self.n_shards:
                    file.unlink()

    def _is_whole(self, name: str, sha256: str | None) -> bool:
        return is_whole(inside(self.folder, name), sha256)

    def _save_record(self, number: int) -> None:
        self._save(RECORD.format(number), (json.dumps(self.shards[number]) + "\n").encode())

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
            "shards": dict(sorted({**self.stale, **self.shards}.items())),
        }
        self._save(MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())

    def _save(self, name: str, content: bytes) -> str:
        """Write a file that appears whole; returns its sha256."""
        target = self.folder / name
        target.parent.mkdir(exist_ok=True)
        with new_file(target) as partial:
            partial.write_bytes(content)
        return hashlib.sha256(content).hexdigest()


def _checked(shard: Mapping[str, Any], config: Mapping[str, Any], origin: Path) -> dict[str, Any]:
    """A manifest's entry of a shard with every field that `FeatureWriter` reads, checked."""
    sized = {"batch_size": config["batch_size"], **shard}
    for name in SHARD_FILES.keys() & sized.keys() | {"features_sha256"}:
        value_of(sized, name, str, origin)
    for name, least in (("rows", 0), ("batch_size", 1)):
        value_of(sized, name, int, origin, minimum=least)
    for failure in value_of(sized, "failures", list, origin):
        if not isinstance(failure, list) or [type(value) for value in failure] != [int, str, str]:
            raise InputError(f"{origin}: lists a failure {failure!r:.40}; it is damaged")
    return sized
