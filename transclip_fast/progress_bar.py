"""A progress bar, or lines of progress where no bar can be drawn."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

import tqdm
import tqdm.auto

from transclip_fast.callbacks import Progress

LINE_SECONDS = 10.0  # between two lines: a log of an hour then has at most 360
LINE_WIDTH = 200  # columns; tqdm would cut lines at $COLUMNS
LINE = (
    "{desc}: {n:,} of {total:,} {unit}, {rate_noinv:,.1f} a second, {remaining_s:,.0f} s left"
    "{postfix}"
)


@contextmanager
def progress_bar(name: str, unit: str, *, shown: bool = True) -> Iterator[Callable[..., None]]:
    """
    Show the progress of long-running work on standard error.

    A terminal and a notebook show a bar, which disappears at the end; anything else gets a line
    every 10 s. Rate and time left count from the first call, without the work of an earlier process
    that is resumed.

    `name` is the work, `unit` what is counted, in the plural. Call the yielded function with
    (done, total), both int, and any figures to show as keyword arguments. Of processes that share
    the work one has it `shown`.

    Examples
    --------
    >>> with progress_bar("search", "rows") as show:
    ...     for done in range(0, 3000, 1000):
    ...         show(done, 3000, recall=0.99)
    """
    bar: Any = None

    def show(done: int, total: int, **figures: Any) -> None:
        nonlocal bar
        if not shown:
            return
        if bar is None:
            bar = _make_bar(name, unit, done, total)
        bar.total = max(done, total)
        bar.set_postfix_str(_in_words(figures), refresh=False)
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


def _in_words(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())


@contextmanager
def announced(text: str) -> Iterator[None]:
    """
    Announce on standard error work that may take long and has no steps to count.

    A terminal shows it at once, until it is over; anything else gets a line after 10 s.
    """
    if sys.stderr.isatty():
        sys.stderr.write(f"{text} ...\r")
        sys.stderr.flush()
        try:
            yield
        finally:
            sys.stderr.write(f"{' ' * len(f'{text} ...')}\r")
            sys.stderr.flush()
        return
    timer = threading.Timer(LINE_SECONDS, print, (f"{text} ...",), {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # encoding forks workers, which needs a process without other threads


def shown_on(
    show: Callable[..., None], also: Callable[[Progress], None] | None = None
) -> Callable[[Progress], None]:
    """Return a callback that shows the progress of a fit on a bar, and passes it on to `also`."""

    def report(state: Progress) -> None:
        figures: dict[str, Any] = {"step": f"{state.steps}/{state.all_steps}"}
        if state.objective is not None:
            figures |= {"objective": f"{state.objective:.5f}", "changed": state.changed}
        show(state.rows, state.all_rows, **figures)
        if also is not None:
            also(state)

    return report


def _make_bar(name: str, unit: str, done: int, total: int) -> Any:
    start = {"desc": name, "initial": done, "total": total}
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        return tqdm.auto.tqdm(**start, unit=f" {unit}", unit_scale=unit != "steps", leave=False)
    return _Lines(
        **start,
        unit=unit,
        bar_format=LINE,
        delay=LINE_SECONDS,
        mininterval=LINE_SECONDS,
        miniters=1,
        smoothing=0,  # the average rate since the first call
        ncols=LINE_WIDTH,
        position=0,
    )


class _Lines(tqdm.tqdm):  # type: ignore[misc]  # tqdm has no types
    """Writes whole lines instead of redrawing one."""

    monitor_interval = 0  # no thread: encoding forks workers

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        def write_line(line: str) -> None:
            file.write(f"{line}\n")
            file.flush()

        return write_line

    def close(self) -> None:
        self.disable = True  # nothing to clear
