"""Linear maps trained beside a frozen encoder, applied to arrays and to stored features."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transclip_fast.data.checks import as_matrix
from transclip_fast.errors import InputError, reading
from transclip_fast.store.arrays import array_sha256, one_array, open_arrays
from transclip_fast.store.features import Features, describe_encoder
from transclip_fast.store.json_text import parse_json
from transclip_fast.store.tensors import SUFFIX, check_writable, read_metadata, write_tensors

ENTRY = "transclip_fast.text_map"  # key of the JSON in their metadata
BLOCK_ROWS = 8192  # mapped in float64 at a time
MAPPED = {
    "text": ("text_features",),
    "image": ("image_features", "support_features", "validation_features"),
}


def linear_map(
    rows: Any, weight: Any, bias: Any = None, *, names: tuple[str, str] = ("rows", "weight")
) -> torch.Tensor:
    """
    unit(A x + b) of each row x, as LABCLIP maps text embeddings (arXiv:2502.03566).

    Parameters
    ----------
    rows : array_like (n, d)
        Embeddings; unit rows or not, they are mapped as they are.
    weight : array_like (e, d)
        A, as in `torch.nn.Linear`.
    bias : array_like (e,), optional
        b.
    names : tuple of str
        Names of rows and weight in error messages.

    Returns
    -------
    Tensor (n, e) float32

    Raises
    ------
    InputError
        Arrays that do not fit each other, that are not finite, or a row that is mapped to zero.

    Examples
    --------
    >>> linear_map([[3.0, 4.0]], [[1.0, 0.0], [0.0, 0.0]])
    tensor([[1., 0.]])
    """
    matrix = as_matrix(rows, names[0])
    a = as_matrix(weight, names[1])
    if a.shape[1] != matrix.shape[1]:
        raise InputError(
            f"{names[1]}: has {a.shape[1]} columns, expected {matrix.shape[1]}, those of "
            f"{names[0]}; was it trained on another model?"
        )
    b = torch.zeros(1, len(a))
    if bias is not None:
        row = bias[None] if isinstance(bias, torch.Tensor) else np.asarray(bias)[None]
        b = as_matrix(row, f"{names[1]}: bias", columns=len(a))
    mapped = torch.empty(len(matrix), len(a))
    for start in range(0, len(matrix), BLOCK_ROWS):
        block = matrix[start : start + BLOCK_ROWS].double() @ a.double().T + b.double()
        norms = torch.linalg.vector_norm(block, dim=1, keepdim=True)
        wrong = ~((norms > 0) & norms.isfinite())
        if wrong.any():
            first = start + int(wrong.nonzero()[0, 0])
            raise InputError(f"{names[1]}: maps row {first} of {names[0]} to no direction")
        mapped[start : start + BLOCK_ROWS] = (block / norms).float()
    return mapped


def map_features(features: Features, **files: str | None) -> None:
    """
    Replace the embeddings x in `features` by unit(A x + b), and note the maps' hashes.

    The files are `text`, a map of the text features, and `image`, of queries, support and
    validation rows: the matrix A (e, d), or a `torch.nn.Linear`'s `weight` and `bias`.
    """
    for kind, file in files.items():
        if file is None:
            continue
        weight, bias = read_map(file, features.encoder)
        present = [name for name in MAPPED[kind] if features.get(name) is not None]
        if not present:
            raise InputError(f"{file}: there are no {kind} features to map")
        for name in present:
            names, array = (features.origins[name], str(file)), features.arrays[name]
            if len(array.shape) == 3:  # texts of several templates, (P, K, d)
                parts = [linear_map(part, weight, bias, names=names) for part in array]
                features.arrays[name] = torch.stack(parts)
            else:
                features.arrays[name] = linear_map(array, weight, bias, names=names)
        hashes = [array_sha256(array) for array in (weight, bias) if array is not None]
        features.maps[f"{kind}_map"] = " ".join(hashes)


def read_map(path: str | Path, encoder: Mapping[str, Any] | None = None) -> tuple[Any, Any]:
    """
    A map's matrix A (e, d) and, if there is one, its bias b (e,), in a file.

    InputError if it is one of `save_map` for texts of another model than `encoder`.
    """
    path = Path(path)
    arrays = open_arrays(path)
    if path.suffix == SUFFIX:
        trained_on = _about(path).get("encoder")
        if trained_on and encoder and trained_on != encoder:
            raise InputError(
                f"{path}: was trained on texts of {describe_encoder(trained_on)}, these are of "
                f"{describe_encoder(encoder)}; train a map on theirs"
            )
    parts = {name.rpartition(".")[2]: name for name in arrays}
    if "weight" not in parts or len(parts) < len(arrays):
        return one_array(arrays, path, "weight"), None
    return arrays[parts["weight"]], arrays[parts["bias"]] if "bias" in parts else None


def save_map(path: str | Path, weight: torch.Tensor, about: Mapping[str, Any]) -> None:
    """
    Write a trained map as a .safetensors file, with JSON about it; whole or not at all.

    InputError as `check_map_file`, or if it cannot be written.
    """
    check_map_file(path)
    write_tensors(path, {"weight": weight}, None, metadata={ENTRY: json.dumps(about)})


def check_map_file(path: str | Path) -> None:
    """Raise InputError if a map cannot have this name, or would replace another file."""
    check_writable(path, "trained map", _about)


def _about(path: Path) -> dict[str, Any]:
    """The JSON about a map in the metadata of its file; {} in other files."""
    metadata = read_metadata(path)
    with reading(path):
        found = parse_json(metadata.get(ENTRY, "{}"))
    if not isinstance(found, dict) or not isinstance(found.get("encoder"), dict | None):
        raise InputError(f"{path}: damaged or truncated; train it again")
    return found
