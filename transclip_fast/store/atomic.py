"""Folders that appear under their name whole, or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transclip_fast.errors import InputError


@contextmanager
def new_folder(path: str | Path, contents: frozenset[str]) -> Iterator[Path]:
    """
    A temporary folder to fill, renamed to `path` at the end; gone if anything fails.

    Parameters
    ----------
    path : path
        Created, with its parents. An existing folder is replaced only if it is empty or holds
        nothing but files named in `contents`, that is, an earlier result.

    Raises
    ------
    InputError
        `path` is a file, holds other files, is being written by another process, or cannot be
        written (permissions, full disk).
    """
    target = Path(path).resolve()
    partial = target.with_name(f".{target.name}.partial")
    try:
        _check_replaceable(target, path, contents)
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{path}: another process is writing this folder") from error
        try:
            _empty(partial)  # what a killed run left behind
            yield partial
            _publish(partial, target)
        except OSError as error:
            raise unwritable(path, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """
    The object in a JSON file.

    Raises
    ------
    InputError
        Missing, damaged, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def _check_replaceable(target: Path, shown: str | Path, contents: frozenset[str]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{shown}: is a file; name a folder")
    others = sorted({entry.name for entry in target.iterdir()} - contents)
    if others:
        raise InputError(
            f"{shown}: holds other files ({others[0]}); name a new folder or an earlier result"
        )


def _publish(partial: Path, target: Path) -> None:
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    replaced = target.with_name(f".{target.name}.replaced")
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    partial.rename(target)
    _sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unwritable(path: str | Path, error: OSError) -> InputError:
    """The one line for a path that the system will not write."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return InputError(f"{path}: cannot be written ({reason}); free space or name another folder")
