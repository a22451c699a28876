"""Linear maps of embeddings from files, applied to the arrays of a problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transclip_fast.errors import InputError
from transclip_fast.linear_map import linear_map
from transclip_fast.store.arrays import one_array, read_arrays
from transclip_fast.store.features import Features, array_sha256

MAPPED = {
    "text": ("text_features",),
    "image": ("image_features", "support_features", "validation_features"),
}


def map_features(features: Features, **files: str | None) -> None:
    """
    Replace embeddings A x + b, made unit, for those in `features`, and keep the maps' hashes.

    Parameters
    ----------
    features : Features
    **files : path, optional
        `text`, a map of the text features, and `image`, of queries, support and validation rows:
        a file with the matrix A (e, d), or a `torch.nn.Linear`'s `weight` and `bias`.

    Raises
    ------
    InputError
        A file that cannot be read or holds something else, or a map that does not fit.
    """
    for kind, file in files.items():
        if file is None:
            continue
        weight, bias = _read_map(Path(file))
        present = [name for name in MAPPED[kind] if features.get(name) is not None]
        if not present:
            raise InputError(f"{file}: there are no {kind} features to map")
        for name in present:
            names = (features.origins[name], str(file))
            features.arrays[name] = linear_map(features.arrays[name], weight, bias, names=names)
        hashes = [array_sha256(array) for array in (weight, bias) if array is not None]
        features.maps[f"{kind}_map"] = " ".join(hashes)


def _read_map(path: Path) -> tuple[Any, Any]:
    """A and, where there is one, b."""
    arrays = read_arrays(path)
    parts = {name.rpartition(".")[2]: array for name, array in arrays.items()}
    if "weight" not in parts or len(parts) < len(arrays):
        return one_array(arrays, path, "weight"), None
    return parts["weight"], parts.get("bias")
