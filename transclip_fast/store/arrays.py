"""Arrays from .npy, .npz, .pt and .safetensors files; nothing is ever unpickled."""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from transclip_fast.errors import InputError

SUFFIXES = (".npy", ".npz", ".pt", ".safetensors")
SINGLE = ""  # name of the array in a file that holds just one, without a name

_DAMAGE = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    RuntimeError,
    MemoryError,  # a damaged header can claim any size
    NotImplementedError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    SafetensorError,
)


def read_arrays(path: str | Path) -> dict[str, Any]:
    """
    All arrays of a file by name: numpy arrays, or torch tensors from .pt and .safetensors.

    Raises
    ------
    InputError
        Missing, of another type, truncated or damaged, or holding pickled Python objects.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"{path}: {'is not a file' if path.exists() else 'no such file'}")
    try:
        if path.suffix == ".pt":
            return _tensors(path, torch.load(path, map_location="cpu", weights_only=True))
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {SINGLE: loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except pickle.UnpicklingError as error:
        raise _pickled(path) from error
    except InputError:
        raise
    except _DAMAGE as error:
        if isinstance(error, ValueError) and "pickle" in str(error):
            raise _pickled(path) from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{path}: damaged or truncated ({reason}); write or copy it again"
        ) from error


def read_array(path: str | Path, name: str) -> Any:
    """
    The array called `name`, or the only one there is.

    Raises
    ------
    InputError
        As `read_arrays`, and where several arrays have other names.
    """
    arrays = read_arrays(path)
    if name in arrays:
        return arrays[name]
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    raise InputError(f"{path}: has no array {name!r}, only {', '.join(sorted(arrays)) or 'none'}")


def _tensors(path: Path, loaded: Any) -> dict[str, Any]:
    if isinstance(loaded, torch.Tensor):
        return {SINGLE: loaded}
    if isinstance(loaded, dict) and all(isinstance(v, torch.Tensor) for v in loaded.values()):
        return {str(name): value for name, value in loaded.items()}
    raise InputError(f"{path}: expected a tensor or a dictionary of tensors")


def _pickled(path: Path) -> InputError:
    return InputError(
        f"{path}: holds pickled Python objects, which are never loaded; "
        "save plain numbers or fixed-width strings instead"
    )
