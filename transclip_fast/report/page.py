"""The page: one HTML file without any other, that a browser opens from disk."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from transclip_fast.errors import InputError, reading
from transclip_fast.report.content import Content
from transclip_fast.report.facts import facts, legend, settings, stages
from transclip_fast.report.figures import figures, solve_figures
from transclip_fast.report.view import View
from transclip_fast.store.atomic import writing
from transclip_fast.store.json_text import script_json
from transclip_fast.whole_files import new_file

STYLE, SCRIPTS = "page.css", ("common.js", "images.js", "tables.js")
FIRST_BYTES = b"<!doctype html>"  # of every page
WARNINGS, WARNING_LENGTH = 50, 1000  # that are shown, and their characters


def write_report(
    result: str | Path, out: str | Path, *, images: str | None = None, before: str | None = None
) -> dict[str, Any]:
    """
    Write the page of a result folder to the file `out`; what it shows, and its size in bytes.

    Parameters
    ----------
    result : path
        A result folder. Its features and images are read if they are where they were.
    out : path
    images : str, optional
        Folder, list or tars of the images, if they have moved.
    before : str, optional
        The result before corrections, with which the labels are compared.

    Raises
    ------
    InputError
        A folder that is no result, results of other images or twice the same, `out` without the
        suffix .html, a file that cannot be written, or one that is no page and would be replaced.
    """
    _check_place(Path(out))
    if before is not None and Path(before).resolve() == Path(result).resolve():
        raise InputError(f"before: {before} is the result itself; give the one before corrections")
    content = Content.of(View.open(result, before), images)
    # A path that is no UTF-8 has half characters, which are no text; they are shown escaped.
    page = render(content).encode("utf-8", "backslashreplace")
    out = Path(out)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_file(out) as partial:
            partial.write_bytes(page)
    return {
        "shown": {gallery.name: len(gallery.rows) for gallery in content.galleries},
        "thumbnails": len(content.thumbnails),
        "notes": content.notes,
        "bytes": len(page),
    }


def _check_place(out: Path) -> None:
    """InputError if no browser would open the page, or a file of another kind be replaced."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{out}: is for a page of HTML; name it {out.with_suffix('.html').name}")
    if out.is_file():
        with reading(out), open(out, "rb") as file:
            if file.read(len(FIRST_BYTES)) != FIRST_BYTES:
                raise InputError(f"{out}: exists and is no page of a result; name another file")


def render(content: Content) -> str:
    """The page as HTML."""
    view, data = content.view, content.data()
    folder = resources.files("transclip_fast.report")
    style, *scripts = (folder.joinpath(x).read_text(encoding="utf-8") for x in (STYLE, *SCRIPTS))
    found = view.run.get("warnings")
    warnings = [str(text)[:WARNING_LENGTH] for text in found] if isinstance(found, list) else []
    environment = Environment(
        loader=PackageLoader("transclip_fast.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = view.result.folder.resolve()
    template = environment.get_template("page.html.j2")
    return template.render(
        title=f"{shown.parent.name}/{shown.name}",
        policy=_policy(style, scripts),
        style=Markup(style),  # noqa: S704 - of this package
        scripts=[Markup(script) for script in scripts],  # noqa: S704
        data=Markup(script_json(data)),  # noqa: S704
        facts=facts(view),
        stages=stages(view.run),
        settings=settings(view.run),
        legend=legend(view),
        figures=_marked_up(figures(view)),
        solve_figures=_marked_up(solve_figures(view)),
        warnings=warnings[:WARNINGS],
        more_warnings=max(0, len(warnings) - WARNINGS),
        notes=content.notes,
        repeats=view.options is not None,
    )


def _marked_up(plots: Sequence[tuple[str, str]]) -> list[tuple[str, Markup]]:
    """Plots as the page takes them; numbers only are in their SVG."""
    return [(name, Markup(svg)) for name, svg in plots]  # noqa: S704


def _policy(style: str, scripts: Sequence[str]) -> str:
    """A content security policy: nothing but this style, these scripts and pictures in the page."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; img-src data:; style-src {source(style)}; "
        f"script-src {' '.join(map(source, scripts))}; base-uri 'none'; form-action 'none'"
    )
