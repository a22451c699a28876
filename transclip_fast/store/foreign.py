"""
Inputs in the formats of other code: folders of few-shot caches, and sparse priors.

A cache holds one array a .pt file, as a rule in half precision:

| file | array | written by |
|---|---|---|
| `test_f.pt`, `test_l.pt` | queries (N, d), their labels (N,) | Tip-Adapter, TransCLIP |
| `val_f.pt`, `val_l.pt` | validation rows (V, d), labels (V,) | Tip-Adapter, TransCLIP |
| `keys_<n>shots.pt` | support (d, M), or (views, M, d) | Tip-Adapter, or TransCLIP |
| `values_<n>shots.pt` | its labels, one-hot (M, classes up to the last that has shots) | both |
| `text_weights*.pt` | texts (d, K) | APE |
| `text_features.pt`, `image_features.pt` | texts (K, d), queries (N, d) | TransCLIP |
| `logits.pt` | another method's probabilities, or logits (N, K) | TransCLIP |
| `images.pt`, `classes.pt`, `texts_*.pt` | queries, labels, texts (K, d) | RS-TransCLIP |

Repositories: gaopengcuhk/Tip-Adapter, yangyangyang127/APE, MaxZanella/transduction-for-vlms,
elkhouryk/RS-TransCLIP. A sparse prior is two arrays, `prior_indices` (N, m) and `prior_values`
(N, m), or what `scipy.sparse.save_npz` writes.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transclip_fast.data.checks import hot_columns
from transclip_fast.data.priors import PRIORS, PROBABILITY_TOLERANCE, ListedPrior
from transclip_fast.errors import InputError
from transclip_fast.store.arrays import inside, one_array, open_arrays, read_array

FILES = {
    "image_features": ("test_f.pt", "image_features.pt", "images.pt"),
    "labels": ("test_l.pt", "classes.pt"),
    "text_features": ("text_features.pt", "text_weights*.pt", "texts_*.pt"),
    "validation_features": ("val_f.pt",),
    "validation_labels": ("val_l.pt",),
    "prior_logits": ("logits.pt",),
}
SUPPORT = {"support_features": "keys_*shots.pt", "support_labels": "values_*shots.pt"}
LISTS = ("prior_indices", "prior_values")
CSR = ("data", "indices", "indptr", "shape")  # of `scipy.sparse.save_npz`
HALF_PRECISION_NORM = 1e-2  # a unit row's norm in half precision is closer to 1


def is_cache(folder: str | Path) -> bool:
    """
    Whether a folder holds queries as one of the .pt files above.

    Raises
    ------
    InputError
        It holds shots or validation rows, but no queries.
    """
    if any(os.path.isfile(Path(folder) / name) for name in FILES["image_features"]):
        return True
    present = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    labelled = (*SUPPORT.values(), *FILES["validation_features"])
    for name in present:
        if any(fnmatch.fnmatch(name, pattern) for pattern in labelled):
            raise InputError(
                f"{folder}: has {name}, but no test_f.pt with the features of the queries; extract "
                "those of the test images, too"
            )
    return False


def read_cache(
    folder: Path, *, shots: int | None = None, without: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """
    The arrays of a folder by the names in `transclip_fast.store.features.ARRAYS`, and their files.

    `shots` chooses the support, 0 none; it is needed if there are several. Arrays `without`, and
    what they replace, come from other files and are not read. InputError if there are several
    files for one array, no support of that many shots or half of one, or a damaged file.
    """
    files, present = {}, sorted(os.listdir(folder))
    for name, patterns in FILES.items():
        if name in without or (name in PRIORS and not set(without).isdisjoint(PRIORS)):
            continue
        found = [file for pattern in patterns for file in fnmatch.filter(present, pattern)]
        if len(found) > 1:
            flag = "as FEATURES" if name == "image_features" else f"with --{name.replace('_', '-')}"
            raise InputError(f"{folder}: has {' and '.join(found)}; name one {flag}")
        if found:
            files[name] = found[0]
    if not SUPPORT.keys() & set(without):
        files |= _support(folder, shots)
    elif shots:
        raise InputError(f"{folder}: give --shots or the files of the support, not both")
    arrays: dict[str, Any] = {}
    for name, file in files.items():
        path = inside(folder, file)
        array = read_array(path, name)
        arrays[name] = as_rows(path, array, arrays.get("image_features", array))
    if "prior_logits" in arrays and _sums_to_one(arrays["prior_logits"]):
        arrays["prior"], files["prior"] = arrays.pop("prior_logits"), files.pop("prior_logits")
    return arrays, {name: str(folder / file) for name, file in files.items()}


def as_rows(path: Path, array: Any, image_features: Any) -> Any:
    """
    An array of a cache with one row a shot or class; arrays of other file names are unchanged.

    Keys and texts have the columns of the image features (N, d), several views of shots become
    their unit mean, one-hot labels become class indices; texts of several templates, which have
    three axes, are unchanged. A square array has the rows that have norm 1; InputError if neither
    rows nor columns have, or both.
    """
    if fnmatch.fnmatch(path.name, SUPPORT["support_labels"]) and array.ndim == 2:
        return hot_columns(array, str(path))
    is_support = fnmatch.fnmatch(path.name, SUPPORT["support_features"])
    if not is_support and not any(fnmatch.fnmatch(path.name, p) for p in FILES["text_features"]):
        return array
    if is_support and array.ndim == 3 and len(array):
        several = len(array) > 1
        array = torch.nn.functional.normalize(array.float().mean(0)) if several else array[0]
    d = image_features.shape[-1] if image_features.ndim else 0
    if array.ndim != 2 or len(array) != d:
        return array
    if array.shape[1] != d:
        return array.T
    in_rows = _are_unit(array)
    if in_rows == _are_unit(array.T):
        raise InputError(
            f"{path}: is {d} x {d}, so that rows cannot be told from columns; give rows of norm 1, "
            "or a .npy, which has a row for each class or shot"
        )
    return array if in_rows else array.T


def read_prior(path: str | Path) -> Any:
    """The prior in a file: an array (N, K), what `listed_prior` finds, or a scipy CSR array."""
    arrays = open_arrays(path)
    if all(name in arrays for name in CSR):
        return _csr(arrays, str(path))
    listed = listed_prior(arrays, str(path))
    return one_array(arrays, path, "prior") if listed is None else listed


def listed_prior(arrays: Mapping[str, Any], origin: str) -> ListedPrior | None:
    """
    The sparse prior among the arrays of a file, or None.

    `prior_indices` (N, m) are the classes that a row lists, `prior_values` (N, m) their
    probabilities. InputError if one is missing, their shapes differ, or a whole prior is there too.
    """
    if not any(name in arrays for name in LISTS):
        return None
    if not all(name in arrays for name in LISTS):
        raise InputError(f"{origin}: {' and '.join(LISTS)} come together; one is missing")
    if "prior" in arrays:
        raise InputError(f"{origin}: has prior and {LISTS[0]}; leave one of them out")
    classes, values = (arrays[name] for name in LISTS)
    shapes = tuple(classes.shape), tuple(values.shape)
    if len(shapes[0]) != 2 or shapes[0] != shapes[1]:
        raise InputError(
            f"{origin}: {LISTS[0]} has shape {shapes[0]}, {LISTS[1]} {shapes[1]}; give both as "
            "(rows, classes a row)"
        )
    n_rows, width = shapes[0]
    return ListedPrior(np.arange(n_rows + 1) * width, classes.reshape(-1), values.reshape(-1))


def _csr(arrays: Mapping[str, Any], origin: str) -> ListedPrior:
    if np.asarray(arrays.get("format", "csr")).tolist() not in (b"csr", "csr"):
        raise InputError(f"{origin}: is a sparse array in another format; save it with .tocsr()")
    shape = np.asarray(arrays["shape"])
    if shape.shape != (2,) or shape.dtype.kind not in "iu" or (shape < 1).any():
        raise InputError(f"{origin}: shape must be (rows, classes), got {shape.tolist()}")
    return ListedPrior(arrays["indptr"], arrays["indices"], arrays["data"], int(shape[1]))


def _support(folder: Path, shots: int | None) -> dict[str, str]:
    """The file of the support's features and of its labels."""
    found = (re.fullmatch(r"keys_(\d+)shots\.pt", file) for file in os.listdir(folder))
    numbers = sorted(int(match[1]) for match in found if match)
    if shots == 0 or (shots is None and not numbers):
        return {}
    if shots is None and len(numbers) > 1:
        raise InputError(
            f"{folder}: has supports of {', '.join(map(str, numbers))} shots; name one with "
            "--shots, or 0 for none"
        )
    number = numbers[0] if shots is None else shots
    files = {name: pattern.replace("*", str(number)) for name, pattern in SUPPORT.items()}
    for file in files.values():
        if not os.path.isfile(folder / file):
            raise InputError(f"{folder}: has no {file}")
    return files


def _sums_to_one(array: torch.Tensor) -> bool:
    rows = array.float()
    return bool(
        rows.ndim == 2
        and (rows >= 0).all()
        and ((rows.sum(1) - 1).abs() <= PROBABILITY_TOLERANCE).all()
    )


def _are_unit(rows: torch.Tensor) -> bool:
    norms = torch.linalg.vector_norm(rows.float(), dim=1)
    return bool(((norms - 1).abs() < HALF_PRECISION_NORM).all())
