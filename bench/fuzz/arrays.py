"""Faults in files of arrays that keep the rest of the file valid."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

SHAPES: tuple[tuple[int, ...], ...] = (
    (), (0,), (1,), (2**63,), (2**62, 2), (2**40, 4), (-1, 4), (8, -4), (10**9, 10**9), (0, 4),
    (8, 0), (2**31, 1), (1, 2**31), (8, 4, 1), (4, 8),
)  # fmt: skip
TYPES = (
    "'<f4'", "'<f8'", "'<f2'", "'>f4'", "'|O'", "'<M8[ns]'", "'<m8[s]'", "'|S0'", "'<U3'", "'<c8'",
    "[('a', '<f4')]", "'|V4'", "'|b1'", "'<u8'", "'<i8'", "'<f16'", "'<f4,'", "'x'", "None",
    "[('a', '<f4', (1000, 1000))]",
)  # fmt: skip
SAFETENSORS_TYPES = ("F64", "F16", "BF16", "I64", "U64", "BOOL", "F8_E4M3", "F8_E5M2", "X", "C64")


def of_npy(content: bytes, draw: random.Random) -> bytes:
    """Change the header of a .npy file, or the array in it."""
    if draw.random() < 0.5:
        return npy(changed(np.load(io.BytesIO(content)), draw))
    length = int.from_bytes(content[8:10], "little")
    header = content[10 : 10 + length].decode()
    shape, order, dtype = (
        draw.choice(SHAPES),
        draw.choice(("True", "False", "0", "None")),
        draw.choice(TYPES),
    )
    parts = {
        "shape": header.replace(header[header.index("(") : header.index(")") + 1], repr(shape)),
        "order": header.replace("False", order),
        "type": header.replace(header.split("'descr': ")[1].split(", 'fortran")[0], dtype),
        "twice": header.replace("{", "{'shape': (1, 1), ", 1),
        "deep": header.replace("(", "(" * 3000, 1),
    }
    text = draw.choice([*parts.values()]).encode()
    return content[:8] + min(len(text), 65535).to_bytes(2, "little") + text + content[10 + length :]


def changed(array: np.ndarray, draw: random.Random) -> np.ndarray:
    """Return an array of another shape or type, or with an odd value."""
    rows = array.reshape(-1)
    spots = [draw.randrange(max(rows.size, 1))]
    number = draw.choice((np.nan, np.inf, -1, 0, 1e30, 2**40, -(2**40), 0.5, 10**6))
    with np.errstate(all="ignore"):
        match draw.randrange(9):
            case 0 | 1 | 2 if array.dtype.kind in "fiu" and rows.size:
                spoiled = array.copy() if array.dtype.kind == "f" else array.astype(np.float64)
                spoiled.reshape(-1)[spots] = number
                whole = array.dtype.kind != "f" and float(number).is_integer()
                return spoiled.astype(np.int64) if whole else spoiled
            case 3:
                return array[: len(array) // 2] if array.ndim else array
            case 4:
                return draw.choice((array.T, array[None], rows, rows[:0], np.float32(1)))
            case 5:
                kind = draw.choice((np.int8, np.uint16, np.uint64, np.float16, bool, complex, "U3"))
                return array.astype(kind) if array.dtype.kind not in "US" else rows[:1]
            case 6:
                odd = [("a", "<f4"), ("b", "<i8")]
                return np.zeros(
                    array.shape, draw.choice((odd, "M8[ns]", "m8[s]", "V7", "S3", ">f8"))
                )
            case 7:
                return np.concatenate([array, array]) if array.ndim else array
    return array[::-1] if array.ndim else array


def npy(array: np.ndarray) -> bytes:
    """Return an array as the content of a .npy file."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


def of_npz(content: bytes, draw: random.Random) -> bytes:
    """Change, double or add members of a .npz file, each with the right checksum."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    k = draw.randrange(len(members))
    name, own = members[k]
    match draw.randrange(8):
        case 0 | 1 | 2:
            members[k] = (name, of_npy(own, draw))
        case 3:
            members.append((name, draw.choice((own, of_npy(own, draw)))))
        case 4:
            extra = draw.choice(
                ("notes.txt", "folder/", "../x.npy", "a\0b.npy", "x.npy", name[:-4])
            )
            members.append((extra, draw.choice((b"", b"text", own))))
        case 5:
            members[k] = (name, draw.choice((b"", b"no array", own[:-3], own + b"more")))
        case 6:
            bomb = npy(np.zeros((8, 4), np.float32))[:128] + bytes(50_000_000)
            members[k] = (draw.choice((name, "other.npy")), bomb)
        case _:
            return _claimed_size(_zipped(members), draw)
    return _zipped(members)


def _zipped(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def _claimed_size(content: bytes, draw: random.Random) -> bytes:
    """Let an entry of the directory of a zip claim another size."""
    data, place = bytearray(content), content.find(b"PK\1\2")
    number = draw.choice((0, 2**32 - 2, 2**31, 10**9)).to_bytes(4, "little")
    start = place + draw.choice((20, 24, 42))
    data[start : start + 4] = number
    return bytes(data)


def of_safetensors(
    content: bytes, draw: random.Random, of_json: Callable[[bytes, random.Random], bytes]
) -> bytes:
    """Change the header of a .safetensors file, or a tensor's numbers."""
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    entry = header[draw.choice(names)]
    match draw.randrange(6):
        case 0:
            entry["dtype"] = draw.choice(SAFETENSORS_TYPES)
        case 1:
            entry["shape"] = draw.choice((*map(list, SHAPES), entry["shape"][::-1]))
        case 2:
            entry["data_offsets"] = draw.choice(([0, 2**63], [0, 4], [-4, 4], [8, 4], [0]))
        case 3:
            other = header[draw.choice(names)]
            entry["data_offsets"], entry["shape"] = other["data_offsets"], other["shape"]
        case 4:
            return _with_header(of_json(content[8 : 8 + length], draw), body)
        case _:
            begin, end = entry["data_offsets"]
            values = np.frombuffer(
                body[begin:end], np.float32 if entry["dtype"] == "F32" else np.uint8
            )
            spoiled = values.copy()
            if len(spoiled):
                spoiled[draw.randrange(len(spoiled))] = draw.choice((0, 1, 77, 255))
                if spoiled.dtype == np.float32:
                    spoiled[0] = draw.choice((np.nan, np.inf, -1, 1e30))
            body = body[:begin] + spoiled.tobytes() + body[end:]
    return _with_header(json.dumps(header).encode(), body)


def _with_header(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def of_pt(content: bytes, draw: random.Random) -> bytes:
    """Put another tensor, or something else, in the place of one of a file of `torch.save`."""
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    if draw.random() < 0.2:
        return of_torch_zip(content, draw)
    file = io.BytesIO()
    if isinstance(loaded, dict):
        loaded = loaded.get("state_dict", loaded)
        key = draw.choice(list(loaded))
        odd = _odd_tensor(loaded[key], draw)
        torch.save({**loaded, draw.choice((key, key, key, 1, None, ("a",))): odd}, file)
    else:
        torch.save(_odd_tensor(loaded, draw), file)
    return file.getvalue()


def of_torch_zip(content: bytes, draw: random.Random) -> bytes:
    """Flip a byte of a record of a file of `torch.save`, in place."""
    data = bytearray(content)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def _odd_tensor(tensor: Any, draw: random.Random) -> Any:
    if not isinstance(tensor, torch.Tensor):
        return torch.ones(2)
    rows = tensor.float()
    makers: tuple[Callable[[], Any], ...] = (
        lambda: torch.ones(1).expand(2**20, 4096),
        lambda: torch.ones(1).expand(*rows.shape),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        lambda: torch.quantize_per_tensor(rows, 0.1, 0, torch.qint8),
        lambda: rows.to_sparse(),
        lambda: rows.to("meta"),
        lambda: rows.to(torch.float8_e4m3fn),
        lambda: rows.to(torch.complex64),
        lambda: rows.to(torch.complex64).conj(),
        lambda: rows.to(torch.uint16),
        lambda: rows.to(torch.uint64),
        lambda: rows.bool(),
        lambda: rows[:0],
        lambda: rows.sum(),
        lambda: rows.T,
        lambda: rows * float("nan"),
        lambda: torch.nn.Parameter(rows),
        lambda: [rows],
        lambda: {"a": rows},
        lambda: "text",
        lambda: 3,
    )
    return draw.choice(makers)()
