"""Arrays and tables from files of every type, none of which runs code."""

from __future__ import annotations

import hashlib
import io
import math
import os
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from transclip_fast.data.npy_shards import Shard
from transclip_fast.errors import InputError, check_regular, reading
from transclip_fast.store.archives import NpzArrays, check_npy, check_torch_zip, checked_texts
from transclip_fast.store.tensors import DTYPES, read_tensors, unmapped

SUFFIXES = (".npy", ".npz", ".pt", ".safetensors")
HASHED_BYTES = 1 << 20  # of an array, at least a row of it, or of a file; in memory at a time
SINGLE = ""  # name of the array in a file that holds just one, without a name
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # in which torch computes little
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # in which it computes nothing
NUMBERS = {*DTYPES} - {*FLOAT8}


def read_arrays(path: str | Path) -> dict[str, Any]:
    """
    Read all arrays of a file by name: numpy arrays, or torch tensors from .pt and .safetensors.

    InputError if it is missing, of another type, damaged, or holds pickled Python objects.
    """
    return dict(open_arrays(path))


def open_arrays(path: str | Path) -> Mapping[str, Any]:
    """As `read_arrays`, but those of a .npz are read when they are asked for."""
    path = _existing(path)
    with reading(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of damage that the error describes better
        return _read(path)


def open_rows(path: str | Path, name: str) -> Any:
    """A .npy file as a `Shard`, whose rows stay on disk, or as `read_array` if it holds no rows."""
    path = _existing(path)
    with reading(path):
        shard = Shard.find(path)
    return read_array(path, name) if shard is None else shard


def read_array(path: str | Path, name: str) -> Any:
    """The array called `name`, or the only one there is; errors as `read_arrays`, `one_array`."""
    return one_array(open_arrays(path), path, name)


def mapped_array(path: str | Path, name: str) -> Any:
    """The array in a .npy file, which stays there."""
    path = _existing(path)
    with reading(path):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def one_array(arrays: Mapping[str, Any], path: str | Path, name: str) -> Any:
    """Of the arrays in the file `path` the one called `name`, or the only one there is."""
    if name in arrays:
        return arrays[name]
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    raise InputError(f"{path}: has no array {name!r}, only {', '.join(sorted(arrays)) or 'none'}")


def read_table(
    file: Path, columns: Sequence[str] | None = None, failure: str = "damaged or truncated"
) -> pa.Table:
    """
    The table in a parquet file, or those of these columns that it has.

    InputError also if two columns have one name.
    """
    # Opened here: from a path pyarrow would make columns of folders such as "label=3".
    with reading(file, failure), open(file, "rb") as content:
        there = pq.read_schema(content).names
        if len({*there}) < len(there):
            raise ValueError("has two columns of one name")
        wanted = None if columns is None else [name for name in columns if name in there]
        content.seek(0)
        # Without pyarrow's pool: a process that ends while its threads start is aborted.
        table = pq.ParquetFile(content, pre_buffer=False).read(columns=wanted, use_threads=False)
        table.validate(full=True)  # texts are UTF-8
        return _without_codes(table)


def _without_codes(table: pa.Table) -> pa.Table:
    """A table whose categories, as of pandas, are columns of the values themselves."""
    # `to_numpy` of codes takes the last category where there is none.
    for place, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            values = table.column(place).cast(field.type.value_type)
            table = table.set_column(place, field.name, values)
    return table


def array_sha256(array: Any) -> str:
    """Hash of an array or tensor: type, shape and bytes."""
    dtype = str(array.dtype).removeprefix("torch.")
    digest = hashlib.sha256(f"{dtype} {tuple(array.shape)} ".encode())
    array = array if array.ndim else array.reshape(1)
    row_bytes = array.dtype.itemsize * math.prod(array.shape[1:])
    n_rows = max(1, HASHED_BYTES // max(1, row_bytes))
    for start in range(0, len(array), n_rows):
        rows = array[start : start + n_rows]
        if isinstance(rows, torch.Tensor):
            rows = rows.cpu().contiguous()
            # Where there is one column, its stride may be any, which no view of bytes takes.
            rows = rows.as_strided((rows.numel(),), (1,)).view(torch.uint8).numpy()
        digest.update(np.ascontiguousarray(rows).tobytes())
    return digest.hexdigest()


def file_sha256(file: Path) -> str:
    """Hash of a file's bytes; InputError if it is no regular file."""
    check_regular(file)
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(HASHED_BYTES):
            digest.update(block)
    return digest.hexdigest()


def is_whole(file: Path, sha256: str | None) -> bool:
    """Whether there is such a file, and its bytes have this hash."""
    return file.is_file() and file_sha256(file) == sha256


def inside(folder: Path, name: str) -> Path:
    """A file of a folder by name; InputError if the name, or a link, leads out of the folder."""
    path = folder / name
    if "\0" not in name and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        return path
    raise InputError(f"{path}: leads out of {folder}")


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as the content of a .npy file; written as bytes, a full disk raises an OSError."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
    if not os.path.isfile(path):  # unlike Path.is_file, no error for a name that is too long
        raise InputError(f"{path}: {'is not a file' if os.path.exists(path) else 'no such file'}")
    return path


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".npz":
        return NpzArrays(path)
    if path.suffix == ".npy":
        with open(path, "rb") as content:
            check_npy(content, path.stat().st_size)
        return {SINGLE: checked_texts(np.load(path, allow_pickle=False))}
    if path.suffix == ".safetensors":
        return {name: as_numbers(path, tensor) for name, tensor in read_tensors(path)[0].items()}
    if zipfile.is_zipfile(path):  # torch's older format is none
        check_torch_zip(path)
    with open(path, "rb") as file:  # called with a path, torch leaves damaged files open
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    tensors = loaded if isinstance(loaded, dict) else {SINGLE: loaded}
    if len({*map(str, tensors)}) < len(tensors):
        raise InputError(f"{path}: has two tensors of one name")
    return {str(name): as_numbers(path, tensor) for name, tensor in tensors.items()}


def as_numbers(path: Path, tensor: Any) -> torch.Tensor:
    """A tensor from the file `path` if torch computes with it, as int64 if it is unsigned."""
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{path}: expected a tensor or a dictionary of tensors")
    strided = tensor.layout == torch.strided and not tensor.is_nested
    if not strided or tensor.is_quantized or tensor.is_meta:
        raise InputError(f"{path}: expected dense tensors; save it again with .to_dense()")
    if tensor.dtype not in NUMBERS:
        raise InputError(f"{path}: holds {tensor.dtype}; save it as float16 or float32")
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise InputError(f"{path}: repeats few numbers; save it again with .contiguous()")
    if tensor.dtype not in UNSIGNED:
        return tensor.detach()
    signed = unmapped(tensor).to(torch.int64)
    if (signed < 0).any():
        raise InputError(f"{path}: holds whole numbers beyond int64")
    return signed
