"""Priors of other methods on disk: whole, or of each row only some classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from transclip_fast.errors import InputError
from transclip_fast.inputs import ListedPrior
from transclip_fast.store.arrays import one_array, read_arrays

LISTS = ("prior_indices", "prior_values")  # (N, m) each
CSR = ("data", "indices", "indptr", "shape")  # as scipy.sparse.save_npz writes it


def read_prior(path: str | Path) -> Any:
    """
    The prior in a file: an array (N, K), what `listed_prior` finds, or a scipy CSR array.

    Raises
    ------
    InputError
        As `read_arrays`, `one_array` and `listed_prior`, and another sparse format of scipy.
    """
    arrays = read_arrays(path)
    if all(name in arrays for name in CSR):
        return _csr(arrays, str(path))
    listed = listed_prior(arrays, str(path))
    return one_array(arrays, path, "prior") if listed is None else listed


def listed_prior(arrays: Mapping[str, Any], origin: str) -> ListedPrior | None:
    """
    The sparse prior among the arrays of a file, or None.

    `prior_indices` (N, m) are the classes that a row names, `prior_values` (N, m) their
    probabilities.

    Raises
    ------
    InputError
        One array without the other, shapes that differ, or a whole prior beside them.
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
