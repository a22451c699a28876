"""What commands share: options, progress, warnings, the summary."""

from __future__ import annotations

import json
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any, TypeVar

import click
import tqdm

from transclip_fast.errors import InputError
from transclip_fast.version import __version__

Command = TypeVar("Command", bound=Callable[..., Any])
PLAIN_INTERVAL = 10.0  # seconds between lines of progress where there is no terminal

out_option = click.option(
    "--out",
    required=True,
    type=click.Path(),
    help="Folder to write; an earlier result is replaced.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the summary as JSON on standard output."
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ..."
)


class Stages:
    """Seconds of each stage of a command, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 4)


@contextmanager
def progress(name: str, unit: str) -> Iterator[Callable[..., None]]:
    """
    A function to call with (done, total) and any figures to show beside them.

    On a terminal a bar with rate and time left; otherwise a plain line now and then.
    """
    if sys.stderr.isatty():
        with tqdm.tqdm(desc=name, unit=f" {unit}", unit_scale=unit != "steps", leave=False) as bar:

            def show(done: int, total: int, **figures: Any) -> None:
                bar.total = total
                bar.set_postfix(figures, refresh=False)
                bar.update(done - bar.n)

            yield show
        return
    start = last = time.monotonic()

    def line(done: int, total: int, **figures: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_INTERVAL:
            return
        last, rate = now, done / (now - start)
        beside = "".join(f", {key} {value}" for key, value in figures.items())
        click.echo(
            f"{name}: {done:,} of {total:,} {unit}, {rate:,.1f} a second, "
            f"{(total - done) / rate:,.0f} s left{beside}",
            err=True,
        )

    yield line


@contextmanager
def collected_warnings(origins: Mapping[str, str]) -> Iterator[list[str]]:
    """Print every warning as one line on standard error, and keep it; see `named`."""
    messages: list[str] = []

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        warn(messages, _named(str(message), origins))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries' warnings to their developers
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield messages


def warn(messages: list[str], message: str) -> None:
    """Print a warning on standard error and keep it in `messages`."""
    messages.append(message)
    click.echo(f"warning: {message}", err=True)


@contextmanager
def named(origins: Mapping[str, str], file: str) -> Iterator[None]:
    """
    Errors about an argument ("labels: ...") become errors about the file it came from.

    Those about what is missing or does not go together name `file`.
    """
    try:
        yield
    except InputError as error:
        message = _named(str(error), origins)
        if message == str(error):
            message = f"{file}: {message}"
        raise InputError(message) from error


def _named(message: str, origins: Mapping[str, str]) -> str:
    what, colon, rest = message.partition(": ")
    return f"{origins[what]}: {rest}" if colon and what in origins else message


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what it computes with."""
    found = {"python": platform.python_version(), "transclip_fast": __version__}
    for name in ("torch", "numpy", "faiss-cpu", "faiss-gpu", "open_clip_torch", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def summarise(summary: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print the summary, or its text, on standard output."""
    click.echo(json.dumps(summary, indent=1) if as_json else text)
