"""Files that appear under their name whole, or not at all, and which may be replaced."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transclip_fast.errors import InputError, reading

_locks = set[int]()  # descriptors of the files that this process writes


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """
    A hidden file to write, renamed to `target` at the end; removed if anything fails.

    InputError if another process is writing it.
    """
    partial = partial_of(target)
    with _locked(partial, target):
        try:
            yield partial
            sync(partial)
            partial.rename(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    sync(target.parent)


def check_replaced(path: str | Path, kind: str, is_kind: Callable[[Path], object]) -> None:
    """
    InputError for a folder, and for a file that is there and is no `kind`: it is not replaced.

    Of such a file `is_kind` is false, or raises any error.
    """
    if os.path.isdir(path):
        raise InputError(f"{path}: is a folder; name a file")
    if os.path.lexists(path):
        with suppress(InputError), reading(path):
            if is_kind(Path(path)):
                return
        raise InputError(f"{path}: is there and is no {kind}; name another file")


def starts_with(path: Path, start: bytes) -> bool:
    """Whether these are the first bytes of a file."""
    with open(path, "rb") as file:
        return file.read(len(start)) == start


def partial_of(target: Path) -> Path:
    """The hidden neighbour of a file while it is written."""
    return target.with_name(f".{target.name.lstrip('.')}.partial")


def sync(path: Path) -> None:
    """Write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(partial: Path, target: Path) -> Iterator[None]:
    """Hold the lock of a new or left-over file; the system releases that of a killed process."""
    while True:
        lock = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        _locks.add(lock)
        try:
            _lock(lock, target)
            if _is_at(lock, partial):  # not if its writer has just renamed or removed it
                yield
                return
        finally:
            if lock in _locks:
                _locks.remove(lock)
                os.close(lock)


def _lock(descriptor: int, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{target}: another process is writing it; wait for it") from error


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _release() -> None:
    """Leave the locks to the parent: they would outlive it if it were killed."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_release)
