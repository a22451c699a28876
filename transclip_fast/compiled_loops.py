"""
Loops that numba compiles, and keeps on disk; its own cache unpickles whatever lies there.

A file holds one loop: the hash of the rest, the hash of the sources it was compiled from, and its
pickle. Only files in a folder that no other user can write are read.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core import caching, compiler, serialize

from transclip_fast.errors import one_line

CompileResult: Any = compiler.CompileResult
dumps: Any = serialize.dumps
config: Any = numba.config
HASH_BYTES = 32  # of SHA-256
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def compiled(
    signature: str, fastmath: bool | set[str] = False
) -> Callable[[Callable[..., Any]], Any]:
    """
    Compile a loop for these types, or load it from the cache.

    `fastmath` is one flag, or all of them: numba passes several on in the order of a set, which
    differs between processes, and so would the code, and the last bits of what it computes.
    """
    if not isinstance(fastmath, bool) and len(fastmath) > 1:
        raise ValueError(f"fastmath: give one flag, or True for all, not {sorted(fastmath)}")

    def decorate(loop: Callable[..., Any]) -> Any:
        dispatcher: Any = numba.njit(nogil=True, fastmath=fastmath)(loop)
        dispatcher._cache = LoopCache(loop)
        dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher

    return decorate


class LoopCache(caching.NullCache):
    """
    The cache of one loop, as numba uses it: it loads before it compiles, and saves afterwards.

    A file that is damaged, and a folder that cannot be written, cost the compilation, with a
    warning.
    """

    def __init__(self, loop: Callable[..., Any]) -> None:
        self.loop = loop
        own = Path(loop.__code__.co_filename)
        self.folder = trusted_folder(str(own.parent))
        here = Path(__file__)
        constants = here.parent / "types.py"  # that loops compile in
        parts = own, here, constants, *sorted(here.parent.glob("ops/*.py"))
        self.sources = _sources_sha256(parts)

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """The compiled loop, or None."""
        if self.folder is None:
            return None
        file = self._file(signature, target_context.codegen())
        try:
            with open(file, "rb") as content:
                if not _only_ours(os.fstat(content.fileno())):
                    raise ValueError("others can write it")
                expected, data = content.read(HASH_BYTES), content.read()
            if hashlib.sha256(data).digest() != expected:
                raise ValueError("it is damaged")
            if not data.startswith(self.sources):
                return None
            target_context.refresh()
            return CompileResult._rebuild(target_context, *pickle.loads(data[HASH_BYTES:]))  # noqa: S301 - ours
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001 - of another build of numba, anything
            _warn_once(f"{self.folder}: compiled loops are compiled again ({one_line(error)})")
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Write the compiled loop."""
        if self.folder is None:
            return
        data = self.sources + dumps(compiled._reduce())
        file = self._file(signature, compiled.codegen)
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".tmp", delete=False) as new:
                try:
                    new.write(hashlib.sha256(data).digest() + data)
                    new.close()
                    os.replace(new.name, file)
                except OSError:
                    os.unlink(new.name)
                    raise
        except OSError as error:
            _warn_once(
                f"{self.folder}: compiled loops cannot be written ({error.strerror}), so they are "
                "compiled in every process; free space or name another folder with NUMBA_CACHE_DIR"
            )

    def _file(self, signature: Any, codegen: Any) -> Path:
        """The file of this loop for this processor, numba and Python."""
        machine = repr((str(signature), codegen.magic_tuple(), numba.__version__, sys.version))
        digest = hashlib.sha256(machine.encode()).hexdigest()[:16]
        return Path(str(self.folder), f"{self.loop.__module__}.{self.loop.__qualname__}.{digest}")


@cache
def trusted_folder(sources: str) -> Path | None:
    """The first folder for compiled loops that this user, and no other, can write; or None."""
    refusals = []
    for folder in _folders(sources):
        try:
            for missing in [f for f in (*reversed(folder.parents), folder) if not f.exists()]:
                missing.mkdir(mode=0o755, exist_ok=True)
            folder = folder.resolve(strict=True)
            for place in (folder, *folder.parents):
                state = os.stat(place)
                if not _only_ours(state, above=place != folder):
                    raise PermissionError(0, f"others can write {place}")
            tempfile.TemporaryFile(dir=folder).close()
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            refusals.append(f"{folder}: {getattr(error, 'strerror', None) or one_line(error)}")
        else:
            return folder
    _warn_once(
        f"there is no safe folder for compiled loops ({'; '.join(refusals)}), so they are compiled "
        "in every process; name one that only you can write with NUMBA_CACHE_DIR"
    )
    return None


def _folders(sources: str) -> Iterator[Path]:
    """Where numba, too, would keep what it compiles from the folder `sources`."""
    if config.CACHE_DIR:
        yield Path(config.CACHE_DIR, "transclip_fast")
        return
    yield Path(sources, "__pycache__")
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(caches):
        yield Path(caches, "transclip_fast")


def _only_ours(state: os.stat_result, above: bool = False) -> bool:
    """Whether only this user and root can write a file, or a folder or what is ours in it."""
    sticky = above and state.st_mode & stat.S_ISVTX  # as /tmp is: others replace only their own
    written = not sticky and state.st_mode & OTHERS_WRITE
    return state.st_uid in (0, os.geteuid()) and not written


@cache
def _sources_sha256(files: tuple[Path, ...]) -> bytes:
    """Hash of the sources of a loop and of all that it calls, which is compiled into it."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.digest()


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
