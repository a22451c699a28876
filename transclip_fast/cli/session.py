"""The frame of every command: times, warnings, errors and the summary."""

from __future__ import annotations

import errno
import json
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from typing import Any

import click

from transclip_fast.errors import InputError, printable
from transclip_fast.ranks import LostRankError
from transclip_fast.version import __version__


class Stages:
    """Seconds of each stage of a command, by name; a stage inside another counts once."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds = {**(seconds or {})}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add the time spent in the block to the stage `name`."""
        start, before = time.perf_counter(), sum(self.seconds.values())
        yield
        inner = sum(self.seconds.values()) - before
        spent = time.perf_counter() - start - inner
        self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 4)


@contextmanager
def collected_warnings(origins: Mapping[str, str], *, shown: bool = True) -> Iterator[list[str]]:
    """
    Print every warning as one line on standard error, and collect them in a list.

    `origins` maps the name of an argument to its file, as in `errors_about`. Of the ranks that
    share some work, the first one shows what it finds.
    """
    messages: list[str] = []

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        warn(messages, _with_origin(str(message), origins), shown=shown)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries' warnings to their developers
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield messages


def warn(messages: list[str], message: str, *, shown: bool = True) -> None:
    """Append a warning to `messages`, unless it is there, and print it if it is shown."""
    if message in messages:
        return
    messages.append(message)
    if shown:
        click.echo(f"warning: {printable(message)}", err=True)


@contextmanager
def errors_about(origins: Mapping[str, str], file: str) -> Iterator[None]:
    """
    Turn errors about an argument ("labels: ...") into errors about the file it came from.

    Errors about no single argument (one is missing, two do not fit) are about `file`.
    """
    try:
        yield
    except LostRankError:  # about no input
        raise
    except InputError as error:
        subject = str(error).partition(": ")[0]
        known = subject in origins or subject == file
        message = _with_origin(str(error), origins) if known else f"{file}: {error}"
        raise InputError(message) from error


def _with_origin(message: str, origins: Mapping[str, str]) -> str:
    subject, colon, rest = message.partition(": ")
    return f"{origins[subject]}: {rest}" if colon and subject in origins else message


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that compute."""
    ours = {"python": platform.python_version(), "transclip_fast": __version__}
    return ours | _library_versions()


@cache
def _library_versions() -> dict[str, str]:
    """Versions of what is installed; reading them takes milliseconds, and `run` asks often."""
    found = {}
    for name in ("torch", "numpy", "numba", "faiss-cpu", "faiss-gpu", "open_clip_torch", "triton"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 class", "2,000 classes"."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def command_line(*words: str) -> str:
    """A command of this package as a shell takes it."""
    return shlex.join(["transclip-fast", *words])


def print_summary(summary: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print the summary as JSON, or as text, on standard output."""
    say(json.dumps(summary, indent=1) if as_json else text)


def say(text: str) -> None:
    """Print lines on standard output; where that fails, as on a full disk, exit with code 2."""
    try:
        click.echo("\n".join(map(printable, text.split("\n"))))
    except OSError as error:
        if error.errno == errno.EPIPE:  # of `| head`, which click ends quietly
            raise
        click.echo(f"error: standard output: cannot be written ({error.strerror})", err=True)
        with suppress(OSError, ValueError):  # what is left in its buffer would fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
