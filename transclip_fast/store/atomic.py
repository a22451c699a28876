"""Folders that appear under their name whole, or not at all."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from transclip_fast.errors import InputError, reading
from transclip_fast.ranks import Ranks
from transclip_fast.store.json_text import parse_json
from transclip_fast.whole_files import new_file, sync

HALF_CHARACTER = re.compile("[\ud800-\udfff]")
HIDDEN = ("partial", "replaced", "lock")  # hidden neighbours of a folder while it is written
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux


@contextmanager
def new_folder(
    path: str | Path, contents: frozenset[str], *, obsolete: Iterable[Path] = ()
) -> Iterator[Path]:
    """
    A temporary folder to fill, renamed to `path` at the end; removed if anything fails.

    An existing folder is replaced only if it is empty or holds nothing but files named in
    `contents`, that is, an earlier result. The `obsolete` files and folders are removed once the
    folder is there.

    Raises
    ------
    InputError
        `path` is a file, holds other files, is being written by another process, or cannot be
        written (permissions, full disk).
    """
    target = Path(os.path.realpath(path))  # Path.resolve fails on a loop of links before 3.13
    partial, replaced = beside(path, "partial"), beside(path, "replaced")
    with writing(path):
        check_replaceable(target, path, contents)
    with locked(path):
        try:
            with writing(path):
                _recover(target, partial, replaced)
                partial.mkdir()
            yield partial
            with writing(path):
                check_replaceable(target, path, contents)  # what was put there meanwhile stays
                _publish(partial, target, replaced)
            remove(replaced, *obsolete)
        finally:
            remove(partial)


@contextmanager
def shared_folder(
    path: str | Path, contents: frozenset[str], ranks: Ranks, *, obsolete: Iterable[Path] = ()
) -> Iterator[Path]:
    """As `new_folder`, which ranks fill together: the first one makes it, and publishes it."""
    if ranks.leads:
        with new_folder(path, contents, obsolete=obsolete) as folder:
            ranks.broadcast("begun")
            yield folder
    else:
        ranks.broadcast(None)
        yield beside(path, "partial")
    ranks.broadcast("published")


@contextmanager
def written_file(path: str | Path) -> Iterator[Path]:
    """A hidden file to write, as of `new_file`, in a folder that is made if need be."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as partial:
            yield partial


def beside(path: str | Path, name: str) -> Path:
    """The hidden neighbour `.FOLDER.name` of a folder, for its lock and its checkpoints."""
    target = Path(os.path.realpath(path))
    return target.parent / f".{target.name}.{name}"


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    # A path that is no UTF-8 has half characters, which are no text; they are shown escaped.
    text = HALF_CHARACTER.sub(lambda half: "\\" + ascii(half[0])[1:-1], text)
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; InputError if it is missing, damaged, or not an object."""
    with reading(path, "cannot be read as JSON", "write it again"):
        value = parse_json(path.read_text(encoding="utf-8-sig"))
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def check_replaceable(target: Path, shown: str | Path, contents: frozenset[str]) -> None:
    """
    Refuse a file, or a folder that holds anything but `contents`.

    `shown` is the user's name for it, for the InputError.
    """
    if not target.exists():
        above = next(folder for folder in target.parents if folder.exists())
        if not above.is_dir():
            raise InputError(f"{shown}: {above} is a file; name another folder")
        return
    if not target.is_dir():
        raise InputError(f"{shown}: is a file; name a folder")
    unknown = sorted({entry.name for entry in target.iterdir()} - contents)
    if unknown:
        raise InputError(
            f"{shown}: holds other files ({unknown[0]}); name a new folder or an earlier result"
        )


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn the system's refusals to write `path`, an OSError, into an InputError."""
    try:
        yield
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder; name a file") from error
    except OSError as error:
        in_the_way = isinstance(error, FileExistsError) and os.path.isfile(str(error.filename))
        if in_the_way or isinstance(error, NotADirectoryError):
            raise InputError(f"{path}: is a file, or in one; name a folder") from error
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise InputError(
            f"{path}: cannot be written ({reason}); free space or name another folder"
        ) from error


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Keep other processes from writing the same folder; InputError if one is writing it."""
    file = beside(path, "lock")
    lock = FileLock(file, mode=0o600)
    with writing(path):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)  # filelock takes some refusals, as in /proc, for another process
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise InputError(
                f"{path}: another process is writing this folder; wait for it"
            ) from error
    try:
        yield
    finally:
        remove(file)  # before the release: afterwards it can be another's lock
        lock.release()


def remove(*paths: Path) -> None:
    """
    Remove files and folders that are not needed any more, if they are there.

    A warning if that fails: what was written is whole all the same.
    """
    for path in paths:
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            warnings.warn(f"cannot remove {path} ({error.strerror}); do so by hand", stacklevel=2)


def clean(path: str | Path, obsolete: Iterable[Path]) -> None:
    """Remove what a run that was killed at its very end left beside the whole folder `path`."""
    entries = [beside(path, name) for name in HIDDEN if name != "lock"] + [*obsolete]
    if any(map(os.path.lexists, [*entries, beside(path, "lock")])):
        with locked(path):
            remove(*entries)


def _recover(target: Path, partial: Path, replaced: Path) -> None:
    """Clean up after a killed run."""
    if replaced.exists() and not target.exists():  # killed between the two renames
        replaced.rename(target)
    for folder in (replaced, partial):
        if folder.exists():
            shutil.rmtree(folder)


def _publish(partial: Path, target: Path, replaced: Path) -> None:
    """Rename the filled folder to its name; what had the name is hidden then."""
    for file in partial.iterdir():
        sync(file)
    sync(partial)
    if not target.exists() or not exchanged(partial, target):
        if target.exists():
            target.rename(replaced)
        try:
            partial.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
    sync(target.parent)


def exchanged(first: Path, second: Path) -> bool:
    """Swap two folders, so that each name has one at any time; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:  # another C library
        return False
    ends = os.fsencode(first), os.fsencode(second)
    return bool(rename(AT_FDCWD, ends[0], AT_FDCWD, ends[1], RENAME_EXCHANGE) == 0)
