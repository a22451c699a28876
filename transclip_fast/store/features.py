"""FEATURES on disk: one file of arrays, or a feature folder in clip-retrieval's layout."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transclip_fast.data.names import plain_name
from transclip_fast.data.npy_shards import Shard
from transclip_fast.data.priors import PRIORS, ListedPrior
from transclip_fast.data.swapped import check_not_swapped, warn_of_names
from transclip_fast.data.texts import templates_first
from transclip_fast.errors import InputError, user_level
from transclip_fast.memory import free_bytes
from transclip_fast.store.arrays import (
    SINGLE,
    array_sha256,
    inside,
    open_arrays,
    open_rows,
    read_array,
)
from transclip_fast.store.atomic import read_json
from transclip_fast.store.feature_shards import (
    OWN,
    check_hashes,
    joined_local,
    joined_shards,
    metadata_columns,
    row_shards,
    shard_files,
    warn_of_gap,
)
from transclip_fast.store.foreign import as_rows, is_cache, listed_prior, read_cache, read_prior
from transclip_fast.store.json_text import value_of
from transclip_fast.store.keys import as_keys, read_keys
from transclip_fast.store.labels import as_array, as_positions, read_labels, warn_of_numbers
from transclip_fast.store.names import as_names, read_names

LABELLED = ("support_features", "support_labels", "validation_features", "validation_labels")
ARRAYS = (
    *("image_features", "text_features", "labels", "class_names", "keys"),
    *LABELLED,
    "known_labels",
    *PRIORS,
)
OF_ROWS = ("labels", "known_labels")  # labels of the image features' rows
LABELS = (*OF_ROWS, "support_labels", "validation_labels")
LOCAL = tuple(f"{use}local_features" for use in ("", "support_", "validation_"))
# Entries of a manifest that identify a backbone.
ENCODER = {"model": str, "weights": str, "quick_gelu": bool}
NEARLY = 0.8  # of difflib's ratio: one letter of ten, or two
SHA256_DIGITS = 64  # model names and weight tags are shorter


@dataclass
class Features:
    """
    The arrays of a problem as they are on disk, and the file that each came from.

    Parameters
    ----------
    path : str
        File or folder that was read.
    arrays : dict
        By the names in `ARRAYS`; `image_features` (N, d) is always there. By those in `LOCAL`
        local features, if they were asked for: (N, L, d), or (N, L d) of a feature folder.
    origins : dict
        For error messages: "FILE: name" of each array.
    class_names : list of str, optional
        K names.
    source_rows : ndarray (N,) int64, optional
        Position of each row in the source it was encoded from.
    keys : list of str, optional
        Key or path of each row.
    encoder : dict, optional
        Model and weights that encoded the rows, if a manifest names them.
    maps : dict
        Hash of each linear map that the embeddings went through.
    corrected : bool
        Whether known labels are corrections.
    """

    path: str
    arrays: dict[str, Any]
    origins: dict[str, str]
    class_names: list[str] | None = None
    source_rows: np.ndarray | None = None
    keys: list[str | None] | None = None
    encoder: dict[str, Any] | None = None
    maps: dict[str, str] = field(default_factory=dict)
    corrected: bool = False
    _sha256: dict[str, str] = field(default_factory=dict, init=False)

    @property
    def encoded_names(self) -> bool:
        """Whether the class names are those of an encode, which has checked them."""
        return self.origins.get("class_names") == _names_in(Path(self.path))

    @property
    def dim(self) -> int:
        """d, of the image features."""
        return int(self.arrays["image_features"].shape[1])

    @property
    def n_classes(self) -> int | None:
        """K, if there are texts, prototypes or class names."""
        for name in ("text_features", "prototypes"):
            array = self.arrays.get(name)
            if array is not None and array.ndim in (2, 3):
                return int(array.shape[-2])
        return None if self.class_names is None else len(self.class_names)

    def get(self, name: str) -> Any:
        """The array of that name, or None; labels as positions, several templates as a list."""
        array: Any = self.arrays.get(name)
        if name == "text_features" and getattr(array, "ndim", 0) == 3:
            return list(array)  # which no fit takes the other way round
        return self._positions(name) if name in LABELS else array

    def with_arrays(self, arrays: dict[str, Any]) -> Features:
        """A copy with other arrays."""
        other = copy(self)
        other.arrays = arrays
        same = {name for name in arrays if arrays[name] is self.arrays.get(name)}
        other._sha256 = {name: self._sha256[name] for name in same & self._sha256.keys()}
        return other

    def sha256(self) -> str:
        """Hash of the image features: type, shape and bytes."""
        return self._hash("image_features")

    def inputs_sha256(self) -> dict[str, str]:
        """
        Hash of every array, by name.

        Of labels that are names it is that of their positions, which follow from the class names.
        """
        return {name: self._hash(name) for name in sorted(self.arrays)}

    def _hash(self, name: str) -> str:
        if name not in self._sha256:
            array = self._positions(name) if name in LABELS else self.arrays[name]
            self._sha256[name] = array_sha256(array)
        return self._sha256[name]

    def _positions(self, name: str) -> Any:
        """Labels as positions; None without any."""
        return as_positions(self.arrays.get(name), self.class_names, name)


def load_features(
    path: str | Path,
    overrides: Mapping[str, str | None] | None = None,
    *,
    shots: int | None = None,
    n_classes: int | None = None,
    local: bool = False,
) -> Features:
    """
    Load the arrays of a problem from a file or a folder.

    Rows of .npy files stay on disk and are read when they are needed.

    Parameters
    ----------
    path : path
        A feature folder, a folder of few-shot caches (see `transclip_fast.store.foreign`), or a
        .npz, .npy, .pt or .safetensors file; one nameless array in it is the image features.
    overrides : mapping, optional
        Files that replace single arrays, by the names in `ARRAYS`: see `read_names`, `read_labels`
        and `read_keys` in `transclip_fast.store.names`, `.labels` and `.keys`.
    shots : int, optional
        Which of several supports of a folder of caches; 0 for none.
    n_classes : int, optional
        K, for a sparse prior that does not name it; by default that of the other arrays.
    local : bool
        Load local features, too, if there are any: they are large, and few heads need them.

    Returns
    -------
    Features
        `arrays` by name, `class_names`, `keys` and `origins`.

    Raises
    ------
    InputError
        A file that is missing, damaged or pickled, or without image features.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/pets.npz", image_features=np.eye(3, 4), text_features=np.eye(2, 4))
    ...     features = load_features(f"{folder}/pets.npz")
    >>> features.get("image_features").shape, features.n_classes
    ((3, 4), 2)
    """
    path = Path(path)
    files = {name: Path(file) for name, file in (overrides or {}).items() if file is not None}
    if is_cache(path):
        features = Features(str(path), *read_cache(path, shots=shots, without=set(files)))
    elif shots:
        raise InputError(f"{path}: has no keys_*shots.pt to choose from; leave out the shots")
    else:
        features = _load_folder(path, local) if os.path.isdir(path) else _load_file(path, local)
    rows, arrays, origins = features.get("image_features"), features.arrays, features.origins
    if len(rows.shape) != 2 or 0 in rows.shape:
        raise InputError(
            f"{origins['image_features']}: expected a non-empty (rows, columns) array, got shape "
            f"{tuple(rows.shape)}"
        )
    if "keys" in arrays:
        features.keys = as_keys(arrays.pop("keys"), origins["keys"], len(rows))
    for name in sorted(files, key="keys".__ne__):  # keys first, as labels may name rows by them
        _replace(features, name, files[name])
    _check_places(features, files.get("text_features"))
    for name in LABELS:
        if name in (files if os.path.isdir(path) else arrays):  # those of a folder are positions
            warn_of_numbers(arrays[name], features.class_names, origins[name])
    if (texts := arrays.get("text_features")) is not None:
        arrays["text_features"] = templates_first(texts, _listed_classes(features))
    if isinstance(prior := features.get("prior"), ListedPrior):
        k = n_classes or features.n_classes
        needed = 4 * len(rows) * (prior.n_classes or k or 0)
        if needed > free_bytes(torch.device("cpu")):
            raise InputError(
                f"{origins['prior']}: {len(rows):,} rows of {prior.n_classes or k:,} classes take "
                f"{needed:,} bytes, which are not free"
            )
        arrays["prior"] = prior.dense(origins["prior"], rows=len(rows), n_classes=k)
    return features


def describe_encoder(encoder: Mapping[str, Any] | None) -> str:
    """Model and weights for a reader."""
    model, weights = (str((encoder or {}).get(name)) for name in ("model", "weights"))
    gelu = ", QuickGELU" if (encoder or {}).get("quick_gelu") else ""
    return f"{model[:12] if len(model) == SHA256_DIGITS else model} ({weights[:12]}{gelu})"


def check_encoder(
    source: str | Path, encoder: Mapping[str, Any] | None, features: Features
) -> None:
    """Raise InputError if `source` is of an encoder, and features are of another."""
    own, known = features.encoder or {}, encoder or {}
    if any(own[name] != known[name] for name in own.keys() & known.keys()):
        raise InputError(
            f"{source}: is of {describe_encoder(known)}, {features.path} was encoded with "
            f"{describe_encoder(own)}; encode both with one model"
        )


def _replace(features: Features, name: str, file: Path) -> None:
    """Take one array, or the class names, from a file of its own."""
    rows, arrays = features.get("image_features"), features.arrays
    features.origins[name] = str(file)
    if name == "class_names":
        names = read_names(file).names
        if features.class_names and _reordered(names, features.class_names):
            raise InputError(
                f"{file}: has the class names of {features.path} in another order, which is that "
                "of its texts and labels"
            )
        features.class_names = names
    elif name == "keys":
        features.keys = read_keys(file, len(rows))
    elif name == "prior":
        arrays[name] = read_prior(file)
    elif name in LABELS:
        of_rows = (features.keys, len(rows)) if name in OF_ROWS else ()
        arrays[name] = as_rows(file, read_labels(file, name, *of_rows), rows)
    else:
        arrays[name] = as_rows(file, read_array(file, name), rows)


def _check_places(features: Features, texts: Path | None) -> None:
    """Refuse texts in the place of the images; warn if only the files' names suggest it."""
    names, arrays = features.class_names, features.arrays
    if np.ndim(arrays.get("text_features", 0)) != 2:
        return
    sizes = len(arrays["image_features"]), len(arrays["text_features"])
    of_rows = {name: len(arrays[name]) for name in OF_ROWS if np.ndim(arrays.get(name, 0))}
    of_classes = {} if names is None else {"class_names": len(names)}
    check_not_swapped(*sizes, of_rows, of_classes, features.path)
    if texts is not None:
        warn_of_names(Path(features.path), texts, *sizes)


def _reordered(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two lists have the same names, but not in one order."""
    plain, other = [*map(plain_name, names)], [*map(plain_name, others)]
    return plain != other and sorted(plain) == sorted(other)


def _listed_classes(features: Features) -> int | None:
    """K, if something beside the texts has it."""
    if features.class_names is not None:
        return len(features.class_names)
    for name, axis in (("prototypes", 0), ("prior", 1), ("prior_logits", 1)):
        if getattr(array := features.get(name), "ndim", 0) == 2:
            return int(array.shape[axis])
    return None


def _load_file(path: Path, local: bool) -> Features:
    arrays: Mapping[str, Any]
    if path.suffix == ".npy":
        found = open_rows(path, "image_features")
        arrays = {"image_features": joined_shards([found]) if isinstance(found, Shard) else found}
    else:
        arrays = open_arrays(path)
        if SINGLE in arrays:
            arrays = {"image_features": arrays[SINGLE]}
    if "image_features" not in arrays:
        raise InputError(
            f"{path}: has no array 'image_features', only {', '.join(sorted(arrays)) or 'none'}; "
            "save the rows of the images under that name"
        )
    known = {name: arrays[name] for name in ARRAYS + (LOCAL if local else ()) if name in arrays}
    _warn_of_misspelt(path, arrays)
    prior = listed_prior(arrays, str(path))
    if prior is not None:
        known["prior"] = prior
    origins = {name: f"{path}: {name}" for name in known}
    names = known.pop("class_names", None)
    names = None if names is None else as_names(names, origins["class_names"])
    return Features(str(path), known, origins, names)


def _warn_of_misspelt(path: Path, arrays: Mapping[str, Any]) -> None:
    """Warn of arrays that are not read, if their names are nearly those of others that are."""
    known = (*ARRAYS, *LOCAL)
    near = {
        name: found[0]
        for name in arrays
        if name not in known and (found := get_close_matches(name, known, 1, NEARLY))
    }
    if near:
        shown = ", ".join(f"{name} (is it {meant}?)" for name, meant in near.items())
        warnings.warn(f"{path}: not read: {shown}", stacklevel=user_level())


def _load_folder(folder: Path, local: bool) -> Features:
    file = folder / "manifest.json"
    manifest = read_json(inside(folder, file.name)) if file.exists() else {}
    ours = manifest.keys() & OWN
    if ours and not value_of(manifest, "complete", bool, file):
        raise InputError(f"{folder}: is not finished; run the same encode again to continue it")
    files = shard_files(folder, local)
    if not ours:
        warn_of_gap(folder, files["img_emb"])
    parts = row_shards(files["img_emb"].values(), "image_features")
    arrays, origins = {"image_features": joined_shards(parts)}, {}
    if (folder / "prototypes.npy").exists():
        arrays["text_features"] = read_array(inside(folder, "prototypes.npy"), "text_features")
        origins["text_features"] = str(folder / "prototypes.npy")
    if files.get("local_emb"):
        arrays["local_features"] = joined_local(files["local_emb"].values(), parts)
    check_hashes(folder, manifest, files)
    names = manifest.get("class_names")
    if names is not None:
        origins["class_names"] = _names_in(folder)
        names = as_names(names, origins["class_names"])
    columns = metadata_columns(folder, files["metadata"].values(), parts)
    if "label" in columns and columns["label"].null_count < len(columns["label"]):
        origins["labels"] = f"{folder / 'metadata'}: label"
        arrays["labels"] = as_array(columns["label"].to_numpy(), origins["labels"])
    return Features(
        str(folder),
        arrays,
        {name: f"{folder}: {name}" for name in arrays} | origins,
        names,
        columns["source_row"].to_numpy() if "source_row" in columns else None,
        columns["key"].to_pylist() if "key" in columns else None,
        _encoder(manifest, file),
    )


def _names_in(folder: Path) -> str:
    """For error messages: the class names of a feature folder."""
    return f"{folder / 'manifest.json'}: class_names"


def _encoder(manifest: Mapping[str, Any], origin: Path) -> dict[str, Any] | None:
    if "config" not in manifest:
        return None
    config = value_of(manifest, "config", dict, origin)
    if not {"model", "weights"} <= config.keys():
        return None
    return {
        name: value_of(config, name, kind, origin)
        for name, kind in ENCODER.items()
        if name in config
    }
