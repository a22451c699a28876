"""Zip files of arrays, as numpy and torch write them, checked before they take memory."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from transclip_fast.errors import reading

DEFLATE_RATIO = 1032  # the most that a byte can stand for, https://zlib.net/zlib_tech.html
LAST_CHARACTER = 0x10FFFF  # of Unicode; 0xD800 to 0xDFFF are halves of UTF-16's
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class NpzArrays(Mapping[str, np.ndarray]):
    """
    The arrays of a .npz file by name; each is read when it is asked for.

    Raises
    ------
    ValueError, zipfile.BadZipFile
        Damage, or two members of one name.
    InputError
        When an array is asked for: it is damaged, larger than its member, or none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        self._members = {member.filename.removesuffix(".npy"): member for member in members}
        if len(self._members) < len(members):
            raise ValueError("has two arrays of one name")

    def __getitem__(self, name: str) -> np.ndarray:
        member = self._members[name]
        with (
            reading(self._path),
            zipfile.ZipFile(self._path) as archive,
            archive.open(member) as content,
        ):
            if member.file_size > DEFLATE_RATIO * member.compress_size:
                raise ValueError(f"{name!r} claims {member.file_size:,} bytes, which cannot be")
            check_npy(content, member.file_size)
            content.seek(0)
            return checked_texts(np.lib.format.read_array(content, allow_pickle=False))

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


def check_npy(content: IO[bytes], size: int) -> None:
    """ValueError unless a .npy file of that many bytes is just what its header claims."""
    read_header = HEADERS.get(np.lib.format.read_magic(content))
    if read_header is None:
        raise ValueError("is no array of numbers or texts")
    shape, _, dtype = read_header(content)
    if dtype.hasobject:
        raise ValueError("holds objects")
    number: int = math.prod(shape)
    claimed, found = number * dtype.itemsize, size - content.tell()
    if claimed != found or (number and not dtype.itemsize):
        raise ValueError(f"claims {claimed:,} bytes {dtype} {shape}, has {found:,}")


def checked_texts(array: np.ndarray) -> np.ndarray:
    """The array; ValueError if it is of texts and holds what is no character."""
    if array.dtype.kind == "U" and array.size:
        kind = np.dtype(np.uint32).newbyteorder(array.dtype.byteorder)
        codes = np.ascontiguousarray(array).view(kind)
        if ((codes > LAST_CHARACTER) | ((codes >= 0xD800) & (codes < 0xE000))).any():
            raise ValueError("holds what is no character")
    return array


def check_torch_zip(path: Path) -> None:
    """ValueError if a file of `torch.save` is damaged, which torch does not check."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len({member.filename for member in members}) < len(members):
            raise ValueError("has two members of one name")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("is compressed, as torch.save leaves no file")
        # `torch.serialization.set_crc32_options(False)` writes none.
        if any(member.CRC for member in members) and (damaged := archive.testzip()):
            raise ValueError(f"{damaged} is damaged")
