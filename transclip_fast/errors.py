"""The one exception that a user's input can cause."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Files that a warning is not about: the package's, and what decorates its functions.
PASSED = (os.path.join(os.path.dirname(__file__), ""), contextlib.__file__)
REASON_CHARACTERS = 200  # of another library's message, which can hold a whole file


class InputError(ValueError):
    """
    Bad input, described in one line: what, where (file or row) and the remedy.

    Examples
    --------
    >>> from transclip_fast import InputError, build_graph
    >>> try:
    ...     build_graph([[3.0, 4.0], [0.0, 0.0]])
    ... except InputError as error:
    ...     print(error)
    features: row 1 is all zero; remove or recompute that row
    """


def not_fitted(message: str) -> InputError:
    """An `InputError` that is scikit-learn's `NotFittedError`, too, where that is loaded."""
    exceptions = sys.modules.get("sklearn.exceptions")
    if exceptions is None:
        return InputError(message)

    class NotFittedInputError(InputError, exceptions.NotFittedError):  # type: ignore[misc, name-defined]
        def __reduce__(self) -> Any:  # from another process, by pickle
            return not_fitted, self.args

    return NotFittedInputError(message)


def one_line(error: Exception) -> str:
    """The message of an error, or its type, in one line of at most `REASON_CHARACTERS`."""
    return " ".join(str(error).split())[:REASON_CHARACTERS] or type(error).__name__


def printable(message: str) -> str:
    """A message in one line; what a terminal cannot show is escaped, as in a file's odd name."""
    line = " ".join(message.splitlines())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def user_level() -> int:
    """The `stacklevel` of a warning about the line outside this package that called it."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PASSED):
        frame, level = frame.f_back, level + 1
    return level


def check_regular(path: str | Path) -> None:
    """Refuse what is no file: reading a FIFO waits, and some devices have no end."""
    mode = stat.S_IFREG
    with suppress(OSError, ValueError):  # reading it fails, and says why
        mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"{path}: is no regular file")


@contextmanager
def reading(
    path: str | Path,
    failure: str = "damaged or truncated",
    remedy: str = "write or copy it again",
) -> Iterator[None]:
    """
    Turn any error of reading or parsing the file `path` into one line.

    Libraries raise anything on a damaged file, from `AssertionError` to `MemoryError`, so the
    block should contain only the calls that read. What is no regular file is not read at all.

    Raises
    ------
    InputError
        "`path`: `failure` (reason); `remedy`", or that the file is missing, cannot be read, or
        holds pickled Python objects. An `InputError` of the block passes as it is.
    """
    check_regular(path)
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Exception as error:
        # EINVAL is a seek to an offset that a damaged file gave.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        reason = one_line(error)
        refused = isinstance(error, ValueError) and ("pickle" in reason or "objects" in reason)
        if refused or isinstance(error, pickle.UnpicklingError):
            raise InputError(
                f"{path}: damaged, or holds pickled Python objects, which are never loaded; "
                f"{remedy}, with nothing but numbers and fixed-width strings"
            ) from error
        raise InputError(f"{path}: {failure} ({reason}); {remedy}") from error
