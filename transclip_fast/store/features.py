"""FEATURES on disk: one file of arrays, or a feature folder in clip-retrieval's layout."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from transclip_fast.data.checks import ListedPrior
from transclip_fast.data.npy_shards import Shard, StoredRows
from transclip_fast.errors import InputError
from transclip_fast.store import foreign as caches
from transclip_fast.store.arrays import SINGLE, inside, read_array, read_arrays, read_rows
from transclip_fast.store.atomic import read_json
from transclip_fast.store.foreign import listed_prior, read_prior

ARRAYS = (
    "image_features",
    "text_features",
    "labels",
    "class_names",
    "support_features",
    "support_labels",
    "validation_features",
    "validation_labels",
    "prior",
    "prior_logits",
    "prototypes",
)
ENCODER = ("model", "weights", "quick_gelu")  # what a manifest knows a backbone by
LOCAL = tuple(f"{use}local_features" for use in ("", "support_", "validation_"))
KEYS = ("key", "path", "image_path")  # the first of these columns that there is names the rows


@dataclass
class Features:
    """
    The arrays of a problem as stored, and for each where it came from.

    Parameters
    ----------
    path : str
        Where they were read.
    arrays : dict
        By the names in `ARRAYS`; `image_features` (N, d) is always there. By those in `LOCAL`
        local features, where they were asked for: (N, L, d), or (N, L d) of a feature folder.
    origins : dict
        For error messages: "FILE: name" of each array.
    source_rows : ndarray (N,) int64, optional
        Position of each row in the source it was encoded from.
    keys : list of str, optional
        Key or path of each row.
    encoder : dict, optional
        Model and weights that encoded the rows, where a manifest says so.
    maps : dict
        Hash of each linear map that the embeddings went through.
    """

    path: str
    arrays: dict[str, Any]
    origins: dict[str, str]
    source_rows: np.ndarray | None = None
    keys: list[str | None] | None = None
    encoder: dict[str, Any] | None = None
    class_names: list[str] | None = field(default=None, init=False)
    maps: dict[str, str] = field(default_factory=dict, init=False)
    _sha256: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        names = self.arrays.pop("class_names", None)
        if names is not None:
            self.class_names = _names(names, self.origins["class_names"])

    @property
    def dim(self) -> int:
        """d, of the image features."""
        return int(self.arrays["image_features"].shape[1])

    def get(self, name: str) -> Any:
        """The array of that name, or None."""
        return self.arrays.get(name)

    def with_arrays(self, arrays: dict[str, Any]) -> Features:
        """The same with other arrays."""
        other = copy(self)
        other.arrays = arrays
        same = {name for name in arrays if arrays[name] is self.get(name)}
        other._sha256 = {name: self._sha256[name] for name in same & self._sha256.keys()}
        return other

    def sha256(self) -> str:
        """Hash of the image features: type, shape and bytes."""
        return self.inputs_sha256()["image_features"]

    def inputs_sha256(self) -> dict[str, str]:
        """Hash of every array, by name."""
        for name in sorted(self.arrays.keys() - self._sha256.keys()):
            self._sha256[name] = array_sha256(self.arrays[name])
        return self._sha256


def load_features(
    path: str | Path,
    overrides: Mapping[str, str | None] | None = None,
    *,
    shots: int | None = None,
    n_classes: int | None = None,
    local: bool = False,
) -> Features:
    """
    FEATURES, with single arrays replaced by other files.

    Parameters
    ----------
    path : path
        A feature folder, a folder of few-shot caches (see `transclip_fast.store.foreign`), or a
        .npz, .npy, .pt or .safetensors file; one nameless array in it is the image features.
    overrides : mapping, optional
        Name in `ARRAYS` to a file; class names may be a text file with one name a line.
    shots : int, optional
        Which of several supports of a folder of caches; 0 for none.
    n_classes : int, optional
        K, for a sparse prior in which it is not said; where not given, of the other arrays.
    local : bool
        Load local features, too, where there are any: they are large, and few heads want them.

    Raises
    ------
    InputError
        A file that is missing, damaged or pickled, or without image features.
    """
    path = Path(path)
    given = {name: file for name, file in (overrides or {}).items() if file is not None}
    if caches.is_cache(path):
        features = Features(str(path), *caches.read_cache(path, shots=shots, without=set(given)))
    elif shots:
        raise InputError(f"{path}: has no keys_*shots.pt to choose from; leave out the shots")
    else:
        features = _load_folder(path, local) if os.path.isdir(path) else _load_file(path, local)
    shape = tuple(features.arrays["image_features"].shape)
    if len(shape) != 2 or 0 in shape:
        raise InputError(
            f"{features.origins['image_features']}: expected a non-empty "
            f"(rows, columns) array, got shape {shape}"
        )
    for name, file in given.items():
        features.origins[name] = str(file)
        if name == "class_names":
            features.class_names = read_names(file)
        elif name == "prior":
            features.arrays[name] = read_prior(file)
        else:
            array, rows = read_array(file, name), features.arrays["image_features"]
            features.arrays[name] = caches.as_rows(Path(file), array, rows)
    prior = features.get("prior")
    if isinstance(prior, ListedPrior):
        known, origin = n_classes or _n_classes(features), features.origins["prior"]
        features.arrays["prior"] = prior.dense(origin, rows=shape[0], n_classes=known)
    return features


def read_names(path: str | Path) -> list[str]:
    """Class names from a text file, one a line, or from an array file."""
    path = Path(path)
    if path.suffix in (".npy", ".npz"):
        return _names(read_array(path, "class_names"), str(path))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def read_table(file: Path) -> pa.Table:
    """
    The table in a parquet file.

    Raises
    ------
    InputError
        Missing or damaged.
    """
    try:
        return pq.read_table(file)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{file}: damaged or truncated ({_line(error)}); write or copy it again"
        ) from error


def array_sha256(array: Any) -> str:
    """Hash of an array or tensor: type, shape and bytes."""
    dtype = str(array.dtype).removeprefix("torch.")
    digest = hashlib.sha256(f"{dtype} {tuple(array.shape)} ".encode())
    for start in range(0, len(array), 65536):
        rows = array[start : start + 65536]
        if isinstance(rows, torch.Tensor):
            rows = rows.cpu().contiguous().view(torch.uint8).numpy()
        digest.update(np.ascontiguousarray(rows).tobytes())
    return digest.hexdigest()


def _n_classes(features: Features) -> int | None:
    for name in ("text_features", "prototypes"):
        array = features.get(name)
        if array is not None and array.ndim == 2:
            return len(array)
    return None if features.class_names is None else len(features.class_names)


def _load_file(path: Path, local: bool) -> Features:
    if path.suffix == ".npy":
        found = read_rows(path, "image_features")
        arrays = {"image_features": _joined([found]) if isinstance(found, Shard) else found}
    else:
        arrays = read_arrays(path)
        if SINGLE in arrays:
            arrays = {"image_features": arrays[SINGLE]}
    if "image_features" not in arrays:
        raise InputError(
            f"{path}: has no array 'image_features', only {', '.join(sorted(arrays)) or 'none'}"
        )
    wanted = ARRAYS + LOCAL if local else ARRAYS
    known = {name: arrays[name] for name in wanted if name in arrays}
    listed = listed_prior(arrays, str(path))
    if listed is not None:
        known["prior"] = listed
    return Features(str(path), known, {name: f"{path}: {name}" for name in known})


def _load_folder(folder: Path, local: bool) -> Features:
    numbered = _numbered(folder, "img_emb", ".npy")
    shards = list(numbered.values())
    if not shards:
        raise InputError(f"{folder}: has no img_emb/img_emb_*.npy; is it a feature folder?")
    parts = [read_rows(shard, "image_features") for shard in shards]
    for shard, part in zip(shards, parts, strict=True):
        if len(part.shape) != 2 or part.shape[1] != parts[0].shape[1]:
            raise InputError(f"{shard}: has shape {part.shape}, the first shard {parts[0].shape}")
    arrays: dict[str, Any] = {"image_features": _joined(parts)}
    origins = {"image_features": f"{folder}: image_features"}
    encoder = None
    if (folder / "prototypes.npy").exists():
        arrays["text_features"] = read_array(inside(folder, "prototypes.npy"), "text_features")
        origins["text_features"] = str(folder / "prototypes.npy")
    patches = _numbered(folder, "local_emb", ".npy") if local else {}
    if patches:
        arrays["local_features"] = _patches(folder, patches, numbered, parts)
        origins["local_features"] = f"{folder}: local_features"
    if (folder / "manifest.json").exists():
        manifest = read_json(inside(folder, "manifest.json"))
        _check_manifest(folder, manifest, numbered, patches)
        encoder = _encoder(manifest)
        names = manifest.get("class_names")
        if names is not None:
            arrays["class_names"] = names
            origins["class_names"] = f"{folder / 'manifest.json'}: class_names"
    source_rows, keys, labels = _metadata(
        folder, {number: part.shape[0] for number, part in zip(numbered, parts, strict=True)}
    )
    if labels is not None:
        arrays["labels"], origins["labels"] = labels, f"{folder / 'metadata'}: label"
    return Features(str(folder), arrays, origins, source_rows, keys, encoder)


def _encoder(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    config = manifest.get("config")
    if not isinstance(config, dict) or not {"model", "weights"} <= config.keys():
        return None
    return {name: config[name] for name in ENCODER if name in config}


def _patches(
    folder: Path, patches: Mapping[int, Path], shards: Mapping[int, Path], parts: Sequence[Any]
) -> Any:
    """Local features (N, L d) of all shards, where they fit the shards of the images."""
    if patches.keys() != shards.keys():
        number = min(patches.keys() ^ shards.keys())
        kind = "img_emb" if number in patches else "local_emb"
        raise InputError(f"{folder}: shard {number} has no {kind} file")
    found = [read_rows(file, "local_features") for file in patches.values()]
    for file, part, of in zip(patches.values(), found, parts, strict=True):
        shape = part.shape
        if len(shape) != 2 or shape[0] != of.shape[0] or shape[1] % of.shape[1]:
            raise InputError(f"{file}: has shape {shape}, the features of its images {of.shape}")
    return _joined(found)


def _joined(parts: Sequence[Any]) -> Any:
    """All shards as one array: on disk, where they can stay there."""
    parts = [part for part in parts if part.shape[0]] or parts[:1]
    if all(isinstance(part, Shard) and part.dtype == parts[0].dtype for part in parts):
        return StoredRows(parts)
    return np.concatenate(
        [np.asarray(StoredRows([part])) if isinstance(part, Shard) else part for part in parts]
    )


def _check_manifest(
    folder: Path,
    manifest: dict[str, Any],
    shards: Mapping[int, Path],
    patches: Mapping[int, Path],
) -> None:
    if not manifest.get("complete", True):
        raise InputError(f"{folder}: is not finished; run the same encode again to continue it")
    entries = manifest.get("shards")
    if not isinstance(entries, dict):  # not a manifest of ours
        return
    if set(entries) != {str(number) for number in shards}:
        raise InputError(f"{folder}: its shards are not those of its manifest; encode it again")
    known = {folder / "prototypes.npy": manifest.get("prototypes_sha256")}
    for number, shard in shards.items():
        entry = entries[str(number)] if isinstance(entries[str(number)], dict) else {}
        known[shard] = entry.get("features_sha256")
        if number in patches:
            known[patches[number]] = entry.get("local_sha256")
        metadata = folder / "metadata" / f"metadata_{number:05}.parquet"
        known[metadata] = entry.get("metadata_sha256")
    for file, sha256 in known.items():
        if not file.exists() and sha256 is None:
            continue
        if not file.exists() or _file_sha256(file) != sha256:
            raise InputError(f"{file}: is not what the manifest says; encode it again")


def _file_sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _metadata(
    folder: Path, rows: Mapping[int, int]
) -> tuple[np.ndarray | None, list[str | None] | None, np.ndarray | None]:
    """source_row, key (or path) and label of every row, each None where no shard has it."""
    files = _numbered(folder, "metadata", ".parquet")
    if not files:
        return None, None, None
    if files.keys() != rows.keys():
        number = min(files.keys() ^ rows.keys())
        raise InputError(
            f"{folder}: shard {number} has no {'img_emb' if number in files else 'metadata'} file"
        )
    tables = []
    for number, file in files.items():
        table = read_table(file)
        if table.num_rows != rows[number]:
            raise InputError(f"{file}: has {table.num_rows} rows, its features {rows[number]}")
        tables.append(table)
    columns = set(tables[0].column_names).intersection(*(t.column_names for t in tables))
    key = next((name for name in KEYS if name in columns), None)
    wanted = [name for name in (key, "source_row", "label") if name in columns]
    try:
        table = pa.concat_tables(
            [table.select(wanted) for table in tables], promote_options="permissive"
        )
        keys = None if key is None else table[key].cast(pa.string()).to_pylist()
        source_rows = table["source_row"].cast(pa.int64()) if "source_row" in wanted else None
    except pa.ArrowException as error:
        raise InputError(f"{folder / 'metadata'}: {_line(error)}") from error
    labels = table["label"] if "label" in wanted else None
    return (
        None if source_rows is None else source_rows.to_numpy(),
        keys,
        None if labels is None or labels.null_count else labels.to_numpy(),
    )


def _numbered(folder: Path, kind: str, suffix: str) -> dict[int, Path]:
    """The files KIND/KIND_<number>SUFFIX by their numbers, in order."""
    pattern = re.compile(rf"{kind}_(\d+){re.escape(suffix)}")
    found: dict[int, Path] = {}
    for path in folder.glob(f"{kind}/{kind}_*{suffix}"):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        if int(match[1]) in found:
            raise InputError(f"{path}: has the same number as {found[int(match[1])].name}")
        found[int(match[1])] = inside(folder, f"{kind}/{path.name}")
    return dict(sorted(found.items()))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _names(array: Any, origin: str) -> list[str]:
    if isinstance(array, list):  # of JSON
        if not all(isinstance(name, str) for name in array):
            raise InputError(f"{origin}: expected a list of strings")
        return array
    values = np.asarray(array)
    if values.ndim != 1 or values.dtype.kind not in "US":
        raise InputError(f"{origin}: expected a list of strings, got {values.dtype}")
    if values.dtype.kind == "S":
        return [name.decode("utf-8", errors="replace") for name in values.tolist()]
    return [str(name) for name in values]
