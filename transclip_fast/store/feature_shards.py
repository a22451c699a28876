"""The shards of a feature folder: their files, arrays, hashes and metadata."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from mimetypes import guess_type
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from transclip_fast.data.npy_shards import Shard, StoredRows
from transclip_fast.errors import InputError, reading, user_level
from transclip_fast.store.arrays import inside, is_whole, open_rows, read_table
from transclip_fast.store.json_text import value_of
from transclip_fast.store.tables import LABEL, find_column

OWN = {"complete", "config", "rows", "shards", "version"}  # not in a manifest of other programs
KEY_COLUMNS = ("key", "path", "image_path")  # the first of these columns there is names the rows
# The kinds of files in a feature folder, and the manifest's entry for the hash of each.
SHARDS = {
    "img_emb": (".npy", "features_sha256"),
    "metadata": (".parquet", "metadata_sha256"),
    "local_emb": (".npy", "local_sha256"),
}


def shard_files(folder: Path, local: bool) -> dict[str, dict[int, Path]]:
    """The files of each kind by shard number; all kinds that are there have the same numbers."""
    files = {kind: numbered(folder, kind) for kind in SHARDS if local or kind != "local_emb"}
    images = files["img_emb"]
    if not images:
        raise InputError(f"{folder}: has no img_emb/img_emb_*.npy; {_no_features(folder)}")
    for kind, found in files.items():
        if found and found.keys() != images.keys():
            number = min(found.keys() ^ images.keys())
            missing = "img_emb" if number in found else kind
            raise InputError(f"{folder}: shard {number} has no {missing} file")
    return files


def warn_of_gap(folder: Path, images: Mapping[int, Path]) -> None:
    """Warn if a shard is missing between others."""
    gap = next((first + 1 for first, after in pairwise(images) if after > first + 1), None)
    if gap is not None:
        warnings.warn(
            f"{folder}: has no shard {gap} of {min(images)} to {max(images)}; rows of shards that "
            "are not there are missing",
            stacklevel=user_level(),
        )


def numbered(folder: Path, kind: str) -> dict[int, Path]:
    """The files KIND/KIND_<number>.SUFFIX by their numbers, in order."""
    suffix, _ = SHARDS[kind]
    pattern = re.compile(rf"{kind}_(\d+){re.escape(suffix)}")
    found: dict[int, Path] = {}
    for path in folder.glob(f"{kind}/{kind}_*{suffix}"):
        if match := pattern.fullmatch(path.name):
            number = int(match[1])
            if number in found:
                raise InputError(f"{path}: has the same number as {found[number].name}")
            found[number] = inside(folder, f"{kind}/{path.name}")
    return dict(sorted(found.items()))


def row_shards(files: Collection[Path], name: str) -> list[Any]:
    """The array `name` of each file, numbers in rows of one length."""
    parts = [open_rows(file, name) for file in files]
    for file, part in zip(files, parts, strict=True):
        if part.dtype.kind not in "fiub":
            raise InputError(f"{file}: expected numbers, got an array of {part.dtype}")
        if len(part.shape) != 2 or part.shape[1] != parts[0].shape[1]:
            raise InputError(f"{file}: has shape {part.shape}, the first shard {parts[0].shape}")
    return parts


def joined_shards(parts: Sequence[Any]) -> Any:
    """All shards as one array: on disk, if they can stay there."""
    parts = [part for part in parts if part.shape[0]] or parts[:1]
    if all(isinstance(part, Shard) and part.dtype == parts[0].dtype for part in parts):
        return StoredRows(parts)
    return np.concatenate([p.read() if isinstance(p, Shard) else p for p in parts])


def joined_local(files: Collection[Path], images: Sequence[Any]) -> Any:
    """Local features (N, L d) of all shards, checked against the shards of the images."""
    parts = row_shards(files, "local_features")
    for file, part, image in zip(files, parts, images, strict=True):
        if part.shape[0] != image.shape[0] or part.shape[1] % image.shape[1]:
            raise InputError(
                f"{file}: has shape {part.shape}, the features of its images {image.shape}"
            )
    return joined_shards(parts)


def check_hashes(
    folder: Path, manifest: dict[str, Any], files: Mapping[str, Mapping[int, Path]]
) -> None:
    """Raise InputError if the files differ from those that the manifest lists."""
    if not manifest.keys() & OWN:
        return
    entries = value_of(manifest, "shards", dict, folder / "manifest.json")
    if set(entries) != {str(number) for number in files["img_emb"]}:
        raise InputError(f"{folder}: its shards are not those of its manifest; encode it again")
    expected = {folder / "prototypes.npy": manifest.get("prototypes_sha256")}
    for kind, found in files.items():
        suffix, entry_name = SHARDS[kind]
        for number, listed in entries.items() if found or kind != "local_emb" else ():
            name = f"{kind}/{kind}_{int(number):05}{suffix}"
            sha256 = listed.get(entry_name) if isinstance(listed, dict) else None
            expected[found.get(int(number), folder / name)] = sha256
    for file, sha256 in expected.items():
        if (file.exists() or sha256) and not is_whole(file, sha256):
            raise InputError(f"{file}: differs from its manifest; encode it again")


def metadata_columns(
    folder: Path, files: Collection[Path], images: Sequence[Any]
) -> dict[str, pa.ChunkedArray]:
    """The metadata's columns source_row, key (or path) and label, if all shards have them."""
    if not files:
        return {}
    tables = [read_table(file) for file in files]
    for file, table, image in zip(files, tables, images, strict=True):
        if table.num_rows != image.shape[0]:
            raise InputError(f"{file}: has {table.num_rows} rows, its features {image.shape[0]}")
    everywhere = set.intersection(*(set(table.column_names) for table in tables))
    names = [name for name in tables[0].column_names if name in everywhere]
    key = next((name for name in KEY_COLUMNS if name in names), None)
    label = find_column(folder / "metadata", names, LABEL)
    wanted = {"source_row": "source_row", "key": key, "label": label}
    wanted = {column: name for column, name in wanted.items() if name in everywhere}
    with reading(folder / "metadata", "has columns of odd types"):
        table = pa.concat_tables(
            [table.select([*wanted.values()]) for table in tables], promote_options="permissive"
        )
        columns = {column: table[name] for column, name in wanted.items()}
        for name, kind in (("key", pa.string()), ("source_row", pa.int64())):
            if name in columns:
                columns[name] = columns[name].cast(kind)
        if "label" in columns and pa.types.is_decimal(columns["label"].type):
            columns["label"] = columns["label"].cast(pa.float64())
    if "source_row" in columns and columns["source_row"].null_count:
        raise InputError(
            f"{folder / 'metadata'}: source_row is empty in some rows; give each its number, or "
            "leave the column out"
        )
    return columns


def _no_features(folder: Path) -> str:
    """The likely kind of a folder without features, and the remedy."""
    if (folder / "features" / "img_emb").is_dir():
        return f"did you mean {folder / 'features'}?"
    if (folder / "predictions.parquet").is_file():
        return "it is a result folder; name the features that it was solved from"
    for _, _, files in os.walk(folder):
        if any((guess_type(file)[0] or "").startswith("image/") for file in files):
            return "it holds images; run or encode them first"
        if files:
            break
    return "is it a feature folder?"
