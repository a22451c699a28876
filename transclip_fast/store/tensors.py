"""A .safetensors file written one tensor at a time, or read with what it says of itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from transclip_fast.errors import InputError
from transclip_fast.store.arrays import read_arrays
from transclip_fast.store.atomic import publish_file, writing

# Names of the format, https://github.com/huggingface/safetensors#format
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8
CHUNK = 1 << 22  # entries in memory at a time


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None,
    step: Callable[[int, int], None] = lambda done, of: None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """
    Write tensors as a .safetensors file; the number of bytes.

    What is mapped from disk stays there: a chunk at a time is in memory. The file appears
    whole or not at all.

    Parameters
    ----------
    dtype : torch.dtype, optional
        Of the floating tensors; their own where not given.
    step : callable
        Told the bytes written and in all after each tensor.
    metadata : mapping, optional
        Words about the tensors, which `read_tensors` gives back.

    Raises
    ------
    InputError
        The file cannot be written (permissions, full disk).
    """
    path = Path(path)
    types = {
        name: dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        for name, tensor in tensors.items()
    }
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * types[name].itemsize
        header[name] = {
            "dtype": DTYPES[types[name]],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps({"__metadata__": {"format": "pt", **(metadata or {})}, **header}).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                chunks, done = _Chunks(), 0
                for name, tensor in tensors.items():
                    for chunk in chunks(tensor, types[name]):
                        done += file.write(chunk)
                    step(done, end)
                file.flush()
                os.fsync(file.fileno())
            publish_file(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return 8 + len(text) + end


def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    The tensors of a .safetensors file by name, and its metadata.

    Raises
    ------
    InputError
        Missing, of another type, truncated or damaged.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: expected a file ending in .safetensors")
    tensors = read_arrays(path)
    with safe_open(path, "pt") as file:
        return tensors, dict(file.metadata() or {})


class _Chunks:
    """Tensors as bytes, a chunk at a time; memory is taken once a type, not once a tensor."""

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, torch.Tensor] = {}

    def __call__(self, tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
        """Each chunk is to be written before the next is asked for."""
        flat = tensor.contiguous().reshape(-1)
        if dtype not in self._buffers:
            self._buffers[dtype] = torch.empty(CHUNK, dtype=dtype)
        buffer = self._buffers[dtype]
        for start in range(0, len(flat), CHUNK):
            part = flat[start : start + CHUNK]
            array: np.ndarray = buffer[: len(part)].copy_(part).view(torch.uint8).numpy()
            yield array.data
