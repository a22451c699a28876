"""A command's --help: one screen, and all of it with --help-all."""

from __future__ import annotations

import inspect
from typing import Any

import click

from transclip_fast.cli.options import ARRAYS, COMPUTATION, PARAMETERS

SECTIONS = {
    "Files that replace or complete FEATURES": ARRAYS,
    "Parameters of the method": PARAMETERS,
    "Computation": {"device", *COMPUTATION},
}
FULL = "help_all"  # the option, and whether it was given


class Command(click.Command):
    """
    A command whose --help fits on a screen; --help-all has every option, in sections.

    `shown` names the options of the screen, beside those that are required; a form feed ends its
    part of the docstring.
    """

    def __init__(self, *args: Any, shown: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self._shown = {FULL, *shown.split()}
        flags = {flag for parameter in self.params for flag in parameter.opts}
        if "--class-names" in flags and "--classes" not in flags:  # a number, of `plan`
            self.context_settings["token_normalize_func"] = _as_class_names
        self.params.append(
            click.Option(
                ["--help-all"],
                is_flag=True,
                is_eager=True,
                expose_value=False,
                callback=_show_all,
                help="Show every option and detail.",
            )
        )

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the docstring, or its part before a form feed."""
        text, _, rest = inspect.cleandoc(self.help or "").partition("\f")
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(text + rest if FULL in ctx.meta else text)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options that are shown, or all of them."""
        sections: dict[str, list[tuple[str, str]]]
        sections = {title: [] for title in ("Options", "Advanced", *SECTIONS)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections[self._section(parameter)].append(record)
        for title, records in sections.items():
            if records and (title == "Options" or FULL in ctx.meta):
                with formatter.section(title):
                    formatter.write_dl(records)

    def _section(self, parameter: click.Parameter) -> str:
        of_click = parameter not in self.params  # --help
        if of_click or parameter.required or parameter.name in self._shown:
            return "Options"
        return next((x for x, names in SECTIONS.items() if parameter.name in names), "Advanced")


def _as_class_names(flag: str) -> str:
    """The name of a flag; --classes, as of `run` and `encode`, is --class-names."""
    return "class-names" if flag == "classes" else flag


def _show_all(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        ctx.meta[FULL] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()
