"""Progress of long work on a terminal, in a notebook or in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transclip_fast.callbacks import Progress


@contextmanager
def progress_bar(name: str, unit: str) -> Iterator[Callable[..., None]]:
    yield lambda *a, **k: None


def shown_on(
    show: Callable[..., None], also: Callable[[Progress], None] | None = None
) -> Callable[[Progress], None]:
    """Return a report of a fit's progress that a bar shows, and that `also` receives."""

    def report(state: Progress) -> None:
        figures: dict[str, Any] = {"step": f"{state.steps}/{state.all_steps}"}
        if state.objective is not None:
            figures |= {"objective": f"{state.objective:.5f}", "changed": state.changed}
        show(state.rows, state.all_rows, **figures)
        if also is not None:
            also(state)

    return report
