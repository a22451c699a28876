"""Safetensors files with metadata, written one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from transclip_fast.errors import InputError, reading
from transclip_fast.store.atomic import writing
from transclip_fast.store.json_text import parse_json
from transclip_fast.whole_files import new_file

SUFFIX = ".safetensors"
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
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.bool: "BOOL",
}
Buffers = Mapping[torch.dtype, torch.Tensor]  # (CONVERTED_ENTRIES,) of each type
HEADER_ALIGNMENT = 8  # bytes
CONVERTED_ENTRIES = 1 << 20  # converted in memory at a time: 8 MiB at most
COPIED_BYTES = 1 << 20  # at a time, in a file in memory


def check_writable(path: str | Path, kind: str, read: Callable[[Path], object]) -> None:
    """
    Raise InputError if a file of tensors cannot have this name, or would replace another file.

    `read` refuses what is not of the kind that will be written.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise InputError(f"{path}: name a file that ends in {SUFFIX}")
    if os.path.lexists(path):
        try:
            read(path)
        except InputError as error:
            raise InputError(f"{path}: is there and is no {kind}; name another file") from error


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None,
    step: Callable[[int, int], None] = lambda done, of: None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """
    Write tensors as a .safetensors file that appears whole or not at all; its number of bytes.

    `safetensors.torch.save_file` holds all tensors in their final type; here one chunk is in
    memory at a time, so that a mapped checkpoint larger than memory can be converted. Floating
    tensors are converted to `dtype`, or keep their own if it is None. `step` is called after each
    tensor with the bytes written and the bytes in all; `metadata` is what `read_tensors` returns.
    InputError if a tensor has values beyond the range of `dtype`.
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
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    kinds = {*types.values(), *(tensor.dtype for tensor in tensors.values())}
    buffers = {kind: torch.empty(CONVERTED_ENTRIES, dtype=kind) for kind in kinds}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as partial, open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            done = 0
            for name, tensor in tensors.items():
                for chunk in _chunks(name, tensor, buffers, types[name]):
                    done += file.write(chunk)
                step(done, end)
    return 8 + len(text) + end


def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    Read the tensors of a .safetensors file by name, and its metadata.

    `safetensors.torch.load_file` maps the file: if it is cut later, the process that touches the
    map is killed.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise InputError(f"{path}: expected a file ending in {SUFFIX}")
    with reading(path):
        check_header(path)
    with (
        reading(path),
        open(path, "rb") as file,
        # By its number: the library takes no paths that are not UTF-8.
        safe_open(f"/proc/self/fd/{file.fileno()}", "pt") as checked,
    ):
        begin = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(begin - 8))
        tensors = {name: _read(file, begin, header[name]) for name in checked.keys()}  # noqa: SIM118
        return tensors, dict(checked.metadata() or {})


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file, of which no tensor is read."""
    with reading(path):
        check_header(path)
        with safe_open(path, "pt") as checked:
            return dict(checked.metadata() or {})


def _read(file: BinaryIO, begin: int, entry: Mapping[str, Any]) -> torch.Tensor:
    """The tensor of an entry of the header; tensors start at byte `begin`."""
    types = {name: kind for kind, name in DTYPES.items()}
    if entry["dtype"] not in types:
        raise ValueError(f"numbers of type {entry['dtype']} are not read")
    tensor = torch.empty(entry["shape"], dtype=types[entry["dtype"]])
    file.seek(begin + entry["data_offsets"][0])
    content: Any = file  # of `readinto`, which typeshed does not know
    if content.readinto(tensor.view(-1).view(torch.uint8).numpy()) < tensor.nbytes:
        raise ValueError("ends early")
    return tensor


def unmapped(tensor: torch.Tensor) -> torch.Tensor:
    """
    A copy of a tensor that may be mapped from a file; InputError if that was cut or cannot be read.

    The system makes it, through a file in memory: a process that reads the map itself is killed.
    """
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in strides) if tensor.numel() else 0
    copy = torch.empty(span, dtype=tensor.dtype)
    return _copy(tensor.as_strided((span,), (1,)), copy).as_strided(tensor.shape, tensor.stride())


def _copy(tensor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out`, with the numbers of a tensor of the same type; both are contiguous (n,)."""
    # Tensors of one number or none may have any stride.
    flat = (part.as_strided((len(part),), (1,)) for part in (tensor, out))
    source, target = (part.view(torch.uint8).numpy().data for part in flat)
    through, done = os.memfd_create("copy"), 0
    try:
        while done < len(source):
            size = os.pwrite(through, source[done : done + COPIED_BYTES], 0)
            done += os.preadv(through, [target[done : done + size]], 0)
    except OSError as error:
        raise InputError(
            "weights: cannot be read any more: their file was cut, or its disk fails"
        ) from error
    finally:
        os.close(through)
    return out


def check_header(path: Path) -> None:
    """ValueError if a .safetensors file names a tensor twice, of which the library takes one."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length <= os.fstat(file.fileno()).st_size:  # or the library refuses it
            parse_json(file.read(length))


def _chunks(
    name: str, tensor: torch.Tensor, buffers: Buffers, dtype: torch.dtype
) -> Iterator[memoryview]:
    """A tensor's bytes as `dtype`; each chunk overwrites the one before."""
    whole = tensor if tensor.is_contiguous() else unmapped(tensor).contiguous()
    for part in torch.split(whole.reshape(-1), CONVERTED_ENTRIES):
        chunk = _copy(part, buffers[tensor.dtype][: len(part)])
        if len(part) and dtype != tensor.dtype:
            converted = buffers[dtype][: len(part)].copy_(chunk)
            ends = torch.stack(converted.aminmax()).double()  # of NaN, if there is one
            if not ends.isfinite().all() and chunk[converted.isinf()].double().isfinite().any():
                kind = str(dtype).removeprefix("torch.")
                raise InputError(f"{name}: has values beyond {kind}; bf16 has a wider range")
            chunk = converted
        yield chunk.view(torch.uint8).numpy().data
