"""The images of a result in a folder for each class: links, and copies of those in tars."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from transclip_fast.encode.pixels import suffixes
from transclip_fast.encode.tars import is_tar
from transclip_fast.encode.walk import path_of
from transclip_fast.errors import InputError
from transclip_fast.report.thumbnails import Pictures, metadata_of, pictures_of
from transclip_fast.store.arrays import read_table
from transclip_fast.store.atomic import (
    check_replaceable,
    new_folder,
    read_json,
    write_json,
    writing,
)
from transclip_fast.store.feature_shards import numbered
from transclip_fast.store.feature_writer import MANIFEST
from transclip_fast.store.results import load_result

MARK = "sorted.json"  # of a folder that this wrote: the hash of what is in it
REJECTED = "rejected"
LONGEST = 200  # bytes of a name, of the 255 that file systems take
NO_NAME = re.compile(r'[<>:"/\\|?*]')  # characters that some file system refuses
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # of Windows
GONE, CHANGED = "not where they were encoded", "not as they were encoded"


@dataclass(frozen=True)
class Sorted:
    """How many images were sorted into how many folders, and how many of them were copied."""

    n_images: int
    n_folders: int
    n_copied: int
    n_rejected: int


def check_target(target: str | Path, apart: Iterable[str | Path]) -> None:
    """
    Refuse a file, and a folder that holds anything but what `sort_images` wrote.

    Or that is in one of `apart`, as images below a folder of images would be found there the next
    time; or is to hold one of them. They need not be there yet.
    """
    real, others = Path(os.path.realpath(target)), [*apart]
    for folder in others:
        if real.is_relative_to(os.path.realpath(folder)):
            raise InputError(f"{target}: is in {folder}; name a folder outside of it")
    with writing(target):
        there = _names_in(real)
        check_replaceable(real, target, there)
    if there and not _is_ours(real):
        raise InputError(
            f"{target}: holds other files, or was changed since it was written; name a new folder"
        )
    for folder in others:
        if Path(os.path.realpath(folder)).is_relative_to(real):
            raise InputError(f"{target}: is for images alone, not for {folder}; name a new folder")


def walked_folders(features: str | Path) -> list[Path]:
    """The folder whose images were encoded; none if they came from a list or from tars."""
    manifest = Path(features, MANIFEST)
    match read_json(manifest) if manifest.is_file() else {}:
        case {"config": {"source": {"kind": "folder"}}}:
            for file in numbered(Path(features), "metadata").values():
                match read_table(file, ("key", "path")).slice(0, 1).to_pylist():
                    case [{"key": str(key), "path": str(path)}]:
                        return [Path(path_of(path.removesuffix(key)))]
    return []


def check_paths(features: str | Path) -> None:
    """Refuse features that do not tell where their images are."""
    if not os.path.isdir(features) or not metadata_of(Path(features), [0])[0]:
        raise InputError(
            f"{features}: does not tell where its images are; give a folder that `encode` wrote"
        )


def sort_images(result: str | Path, features: str | Path, target: str | Path) -> Sorted:
    """
    Write a folder with the images of a result in a folder for each class, whole or not at all.

    Images are symbolic links to where `encode` read them, those of tars are copies. Rejected ones
    are in a folder of their own. Images that are gone, or have another size, are left out with a
    warning. What was written so before is replaced, unless anything in it was changed.

    Raises
    ------
    InputError
        A target that `check_target` refuses, features without paths, or no image where it was.
    """
    check_target(target, ())
    check_paths(features)
    loaded = load_result(result, ("key", "label", "rejected"))
    keys = loaded.predictions.column("key").to_pylist()
    labels, rejected = loaded.labels("label"), loaded.flags("rejected")
    names = folder_names(loaded.run["class_names"] or map(str, range(loaded.run["n_classes"])))
    folders = [REJECTED if out else names[k] for k, out in zip(labels, rejected, strict=True)]
    pictures = pictures_of(Path(features), dict(enumerate(keys)))
    with new_folder(target, _names_in(target)) as folder:
        placed, copied, missing = _place(folder, folders, pictures, target)
        if not placed:
            reason = " or ".join(missing)
            raise InputError(f"{target}: the images are {reason}; bring them back, or encode again")
        with writing(target):
            write_json(folder / MARK, {"images": placed.total(), "sha256": _digest(folder)})
    for reason, rows in missing.items():
        shown = f"{len(rows):,} of {len(keys):,} images are {reason}, e.g. {keys[rows[0]]}"
        warnings.warn(f"{target}: {shown}; they are left out", stacklevel=2)
    return Sorted(placed.total(), len(placed), copied, placed[REJECTED])


def folder_names(names: Iterable[str]) -> list[str]:
    """
    A folder name for each class: its name, as far as every file system takes it, each once.

    Names that differ in case or Unicode form alone are one for some file systems.
    """
    taken = {MARK, REJECTED}
    return [_free(safe_name(name), f" ({k})", taken) for k, name in enumerate(names)]


def safe_name(name: str) -> str:
    """A name of one file or folder that every file system takes, and that is not hidden."""
    shown = "".join(c if c.isprintable() else "_" for c in unicodedata.normalize("NFC", name))
    safe = NO_NAME.sub("_", shown).strip().rstrip(".")
    safe = f"_{safe[1:]}" if safe.startswith(".") else safe
    safe = _cut(safe, LONGEST).rstrip(" .") or "_"
    return f"{safe}_" if DEVICES.fullmatch(safe) else safe


def _place(
    folder: Path, folders: list[str], pictures: Pictures, target: str | Path
) -> tuple[Counter[str], int, Mapping[str, list[int]]]:
    """Put each image into its folder; images by folder, copies, and rows that are missing."""
    placed, copied, missing = Counter[str](), 0, dict[str, list[int]]()
    taken = dict[str, set[str]]()  # names by folder
    for row, name in enumerate(folders):
        if reason := _missing(pictures, row):
            missing.setdefault(reason, []).append(row)
            continue
        place = pictures.places[row]
        file = Path(pictures.source.files[place])
        content = pictures.source.read(place) if is_tar(file) else None
        stem, suffix = _stem_and_suffix(pictures, row)
        free = _free(safe_name(stem), f" ({row})", taken.setdefault(name, set()), suffix)
        with writing(target):
            (folder / name).mkdir(exist_ok=True)
            if content is None:
                os.symlink(os.path.abspath(file), folder / name / free)
            else:
                (folder / name / free).write_bytes(content)
        placed[name] += 1
        copied += content is not None
    return placed, copied, missing


def _stem_and_suffix(pictures: Pictures, row: int) -> tuple[str, str]:
    """The name of an image in two parts, in a tar that of its sample."""
    place = pictures.places[row]
    if row in pictures.suffixes:
        return PurePosixPath(pictures.source.keys[place]).name, pictures.suffixes[row]
    name = os.path.basename(pictures.source.files[place])
    stem, suffix = os.path.splitext(name)
    return (stem, suffix) if suffix.lower() in suffixes() else (name, "")


def _missing(pictures: Pictures, row: int) -> str:
    """Why the image of a row cannot be sorted; "" if it can."""
    place = pictures.places.get(row)
    if place is None or place in pictures.source.refusals:
        return GONE
    size = int(pictures.source.stamps[place, 0])
    if size < 0 or not os.path.isfile(pictures.source.files[place]):
        return GONE
    return "" if pictures.sizes.get(row, size) == size else CHANGED


def _free(name: str, number: str, taken: set[str], suffix: str = "") -> str:
    """The name, with the number if it is taken; the name is taken then."""
    found = name + suffix
    while (plain := unicodedata.normalize("NFC", found).casefold()) in taken:
        name = _cut(name, LONGEST) + number
        found = name + suffix
    taken.add(plain)
    return found


def _cut(name: str, n_bytes: int) -> str:
    return name.encode()[:n_bytes].decode(errors="ignore")


def _names_in(folder: str | Path) -> frozenset[str]:
    """The names in a folder; none if there is no such folder."""
    return frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()


def _is_ours(folder: Path) -> bool:
    """Whether a folder is as `sort_images` left it."""
    if not (folder / MARK).is_file():
        return False
    return read_json(folder / MARK).get("sha256") == _digest(folder)


def _digest(folder: Path) -> str:
    """Hash of the names below a folder, where links lead, and size and time of files."""
    found = hashlib.sha256()
    for line in _entries(folder):
        found.update(line + b"\0\0")
    return found.hexdigest()


def _entries(folder: Path) -> Iterator[bytes]:
    for above, subfolders, files in os.walk(folder):
        subfolders.sort()
        for name in (*subfolders, *sorted(files)):
            path = os.path.join(above, name)
            state, what = os.lstat(path), ""
            if os.path.islink(path):
                what = os.readlink(path)
            elif not os.path.isdir(path):
                what = f"{state.st_size} {state.st_mtime_ns}"
            shown = os.path.relpath(path, folder)
            if shown != MARK:
                yield os.fsencode(f"{shown}\0{what}")
