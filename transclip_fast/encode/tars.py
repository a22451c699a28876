"""Webdataset tars: the image and the label of each sample, or why the sample has none."""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transclip_fast.data.names import listed
from transclip_fast.encode.pixels import suffixes
from transclip_fast.encode.walk import HIDDEN, NO_SUFFIX
from transclip_fast.errors import InputError, reading
from transclip_fast.store.json_text import parse_json

LABEL_SUFFIXES = ("cls", "json", "txt")  # the first that a sample has holds its label
JSON_LABELS = ("label", "cls", "class")  # keys, the first that an object has
MAX_LABEL_BYTES = 2**20  # a larger file holds no label
MAX_HEADER_BYTES = 2**14  # of a name or attributes, which tarfile parses in quadratic time
SEARCHED_BYTES = 2**16  # a larger file that is no image is not read, as that would take long
EXTENSIONS = (  # headers that hold a name or attributes of the next
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
MAGIC, MAGIC_AT = b"ustar", 257  # of every header but those of the seventies
# Words for what is left out and not counted by its suffix.
UNPAIRED = "labels without an image"
ODD_LABEL = "labels that are neither number nor text"
SHOWN_NAMES = 3


@dataclass(frozen=True)
class Sample:
    """The files of a tar with one name up to its first dot."""

    key: str
    span: tuple[int, int]  # offset and size of its image in the tar
    label: float | str | None
    refusal: str | None  # why it is no image that can be read
    suffix: str = ""  # of the image, as ".jpg"


@dataclass(frozen=True)
class _File:
    """A file in a tar: its name as spelled there, where it is, or why it cannot be read."""

    name: str
    span: tuple[int, int] = (0, 0)  # offset and size
    refusal: str | None = None


def read_samples(tar: Path, left_out: Counter[str]) -> list[Sample]:
    """
    The samples of an uncompressed tar that have an image, in the order of their first files.

    A sample with two images, a file twice or a file that is none has a refusal. Files that are
    neither an image nor a label are counted in `left_out` by suffix.

    Raises
    ------
    InputError
        The tar is damaged, cut, or goes on after its end.
    """
    samples: dict[str, dict[str, _File]] = {}  # file by the rest of its name, by plain path
    keys: dict[str, str] = {}  # of samples, as their first files are spelled
    for path, file in _files(tar).items():
        stem, _, rest = posixpath.basename(path).partition(".")
        if stem and rest:
            sample = path.removesuffix(f".{rest}")
            samples.setdefault(sample, {})[rest] = file
            keys.setdefault(sample, file.name.removesuffix(f".{rest}"))
        else:
            left_out[NO_SUFFIX if stem else HIDDEN] += 1
    with open(tar, "rb") as content:
        found = (_sample(keys[path], samples[path], content, left_out) for path in samples)
        return [sample for sample in found if sample is not None]


def is_tar(path: Path) -> bool:
    """Whether a path has the suffix of a tar."""
    return path.suffix.lower() == ".tar"


def takes_in_next(content: bytes) -> bool:
    """
    Whether a file's content has a header in it: its own claims a size that is too large.

    Decoders take no notice of what follows an image, so that the next files would be lost.
    """
    place = content.find(MAGIC)
    while place >= 0:
        if place % tarfile.BLOCKSIZE == MAGIC_AT:
            return True
        place = content.find(MAGIC, place + 1)
    return False


def _sample(
    key: str, files: dict[str, _File], content: io.BufferedReader, left_out: Counter[str]
) -> Sample | None:
    """The sample with these files, by the rest of their names; None without an image."""
    pictures = [rest for rest in files if _is_image(rest)]
    plain = [rest for rest in pictures if "." not in rest]  # x.jpg, where x.mask.png is no second
    images = plain or pictures
    prefix = images[0].removesuffix(_suffix(images[0])) if images else ""  # "0." of x.0.jpg
    plain_case = {rest.lower(): rest for rest in files}
    labels = {
        suffix: plain_case.get(f"{prefix}{suffix}".lower(), plain_case.get(suffix))
        for suffix in LABEL_SUFFIXES
    }
    for rest in files.keys() - {*labels.values(), *images}:
        left_out[f".{rest} beside an image" if rest in pictures else f".{_suffix(rest)}"] += 1
    if not images:
        left_out[UNPAIRED] += any(labels.values())
        return None
    try:
        if len(images) > 1:
            names = listed([files[rest].name for rest in images], SHOWN_NAMES)
            raise InputError(
                f"sample {key} has {len(images)} images ({names}): "
                "all names with the same start up to a dot; leave one of them"
            )
        image = files[images[0]]
        if image.refusal:
            raise InputError(image.refusal)
        found = (_label(s, files[rest], content) for s, rest in labels.items() if rest is not None)
        label = next((value for value in found if value is not None), None)
        if not isinstance(label, int | float | str | None):
            left_out[ODD_LABEL] += 1
            label = None
    except InputError as error:
        return Sample(key, (0, 0), None, str(error))
    return Sample(key, image.span, label, None, f".{_suffix(images[0])}")


def _suffix(rest: str) -> str:
    """The last suffix of what follows a name's first dot."""
    return rest.rpartition(".")[2]


def _is_image(name: str) -> bool:
    return f".{_suffix(name)}".lower() in suffixes()


def _label(suffix: str, file: _File, content: io.BufferedReader) -> Any:
    """The label in a file; of JSON any value, or the first of an object's `JSON_LABELS`."""
    offset, size = file.span
    if file.refusal:
        raise InputError(file.refusal)
    if size > MAX_LABEL_BYTES:
        raise InputError(f"{file.name}: is too long for a label ({size:,} bytes)")
    content.seek(offset)
    with reading(file.name, "is not a label", "pack it again"):
        text = content.read(size).decode("utf-8-sig").strip()
        if suffix != "json":
            return int(text) if suffix == "cls" else text
        value = parse_json(text)
    found = map(value.get, JSON_LABELS) if isinstance(value, dict) else [value]
    return next((label for label in found if label is not None), None)


def _plain_path(name: str) -> str:
    """A name as it is compared: ./a//0.jpg and a/0.jpg are unpacked to one path."""
    return posixpath.normpath(name.lstrip("/"))


def _files(tar: Path) -> dict[str, _File]:
    """The files of a tar by their plain paths."""
    files: dict[str, _File] = {}
    with reading(tar), open(tar, "rb") as content:
        for member in _members(tar):
            if member.isdir():
                continue
            file, name = _file(member, files), member.name
            if tarfile.BLOCKSIZE < file.span[1] <= SEARCHED_BYTES and not _is_image(name):
                content.seek(file.span[0])
                if takes_in_next(content.read(file.span[1])):
                    raise InputError(
                        f"{tar}: {name} claims a size that takes in the next file; pack it again"
                    )
            path = _plain_path(name)
            if path in files:
                first = files[path].name
                spelled = "" if first == name else f", first as {first}"
                file = _File(first, refusal=f"{name} is in the tar twice{spelled}; keep one")
            files[path] = file
    return files


def _file(member: tarfile.TarInfo, files: dict[str, _File]) -> _File:
    """The file of a member; that of a hard link is the one before it that it names."""
    name, target = member.name, files.get(_plain_path(member.linkname))
    if member.isreg() and not member.issparse():
        return _File(name, (member.offset_data, member.size))
    if member.islnk() and target is not None:
        return _File(name, target.span, target.refusal)
    if member.islnk():
        refusal = f"{name} is a hard link to {member.linkname}, which is not before it in the tar"
    else:
        kind = "a link" if member.issym() else "stored sparse" if member.issparse() else "no file"
        refusal = f"{name} is {kind}"
    return _File(name, refusal=f"{refusal}; pack the file itself")


class _Header(tarfile.TarInfo):
    """A member's header, which must claim a size that can be."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in EXTENSIONS and header.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"the header of {header.name} claims {header.size:,} bytes")
        return header


def _members(tar: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, which `tarfile` would end without a word at damage."""
    with (
        reading(tar, "cannot be read as an uncompressed tar", "pack it again"),
        tarfile.open(tar, "r:", tarinfo=_Header) as archive,
    ):
        total = tar.stat().st_size
        for member in archive:
            room = archive.offset - member.offset_data  # up to where the next header is expected
            whole = room <= total - member.offset_data
            if member.isreg() and not member.issparse():
                whole &= room == -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if not whole or not (member.name or member.isdir()):
                raise InputError(
                    f"{tar}: {member.name or 'a file without name'} claims {member.size:,} bytes "
                    f"at byte {member.offset_data:,}, which cannot be; pack it again"
                )
            yield member
    with reading(tar):
        _check_end(tar, archive.offset)


def _check_end(tar: Path, offset: int) -> None:
    """Refuse a tar that does not end with two blocks of zeros, or with more than zeros."""
    zeros = 0
    with open(tar, "rb") as file:
        file.seek(offset)
        while block := file.read(tarfile.BLOCKSIZE):
            if block.strip(b"\0"):
                what = "goes on after its end, as joined tars do," if zeros else "is damaged"
                raise InputError(f"{tar}: {what} at byte {offset + zeros:,}; pack it again")
            zeros += len(block)
    if zeros < 2 * tarfile.BLOCKSIZE:
        raise InputError(
            f"{tar}: was cut at byte {offset + zeros:,} (a tar ends with two blocks of zeros); "
            "pack or copy it again"
        )
