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
    help="Folder to write. An earlier result is replaced, a killed run continued.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the summary as JSON on standard output."
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ..."
)

memory_option = click.option(
    "--memory",
    help="What the process, or its part of a GPU, may use, as 8GiB.  [default: what is free]",
)
recall_option = click.option(
    "--recall",
    default=0.99,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="What an approximate graph must reach, measured on 1000 rows.",
)
image_map_option = click.option(
    "--image-map", type=click.Path(), help="Matrix (d, d) that the image features are mapped by."
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

    On a terminal a bar with rate and time left, otherwise a plain line now and then. Both count
    from the first call.
    """
    shown = _Bar(name, unit) if sys.stderr.isatty() else _Lines(name, unit)
    try:
        yield shown
    finally:
        shown.close()


class _Bar:
    def __init__(self, name: str, unit: str) -> None:
        self.name, self.unit = name, unit
        self.bar: Any = None

    def __call__(self, done: int, total: int, **figures: Any) -> None:
        if self.bar is None:
            scale = self.unit != "steps"
            self.bar = tqdm.tqdm(
                desc=self.name, unit=f" {self.unit}", unit_scale=scale, leave=False, initial=done
            )
        self.bar.total = total
        self.bar.set_postfix(figures, refresh=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class _Lines:
    def __init__(self, name: str, unit: str) -> None:
        self.name, self.unit = name, unit
        self.first: tuple[float, int] | None = None  # time and done of the first call
        self.last = 0.0

    def __call__(self, done: int, total: int, **figures: Any) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.last = (now, done), now
        if now - self.last < PLAIN_INTERVAL or done == self.first[1]:
            return
        self.last, rate = now, (done - self.first[1]) / (now - self.first[0])
        beside = "".join(f", {key} {value}" for key, value in figures.items())
        click.echo(
            f"{self.name}: {done:,} of {total:,} {self.unit}, {rate:,.1f} a second, "
            f"{(total - done) / rate:,.0f} s left{beside}",
            err=True,
        )

    def close(self) -> None:
        pass


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
        what = str(error).partition(": ")[0]
        known = what in origins or what == file
        message = _named(str(error), origins) if known else f"{file}: {error}"
        raise InputError(message) from error


def _named(message: str, origins: Mapping[str, str]) -> str:
    what, colon, rest = message.partition(": ")
    return f"{origins[what]}: {rest}" if colon and what in origins else message


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what it computes with."""
    found = {"python": platform.python_version(), "transclip_fast": __version__}
    for name in ("torch", "numpy", "numba", "faiss-cpu", "faiss-gpu", "open_clip_torch", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def summarise(summary: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print the summary, or its text, on standard output."""
    click.echo(json.dumps(summary, indent=1) if as_json else text)
