"""`transclip-fast report`: a page that shows a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from transclip_fast.cli import options, session
from transclip_fast.report.page import write_report


@click.command("report")
@click.argument("result", type=options.PATH)
@click.option(
    "--images",
    type=options.PATH,
    help="Folder, list or tars of the images, as for `encode`, if they have moved.",
)
@click.option(
    "--before",
    metavar="RESULT",
    type=options.PATH,
    help="The result before corrections, to mark what they moved, and what moved back.",
)
@click.option("--out", default="report.html", type=options.PATH, help="File to write.")
@options.json_option
def command(result: str, images: str | None, before: str | None, out: str, as_json: bool) -> None:
    """Write one HTML file that shows RESULT, to open from disk without a network.

    It shows what happened, the classes, the images to correct first, changed, uncertain and
    typical images, and why an image has its label. In the page a person gives images their right
    class and saves corrections.csv, for `solve --corrections`. It holds samples of the images,
    however many there are.

    \b
    Examples:
      transclip-fast report out/result --out report.html
      transclip-fast report result2 --before result --out report2.html
    """
    with session.collected_warnings({}):
        summary = write_report(result, out, images=images, before=before)
    session.print_summary({"report": str(out), **summary}, describe_report(summary, out), as_json)


def describe_report(summary: dict[str, Any], out: str | Path) -> str:
    """The notes and the size of a page, as text."""
    lines = [f"note: {text}" for text in summary["notes"]]
    return "\n".join([*lines, f"report: {out}, {summary['bytes'] / 1e6:.1f} MB"])
