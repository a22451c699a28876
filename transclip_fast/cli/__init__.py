"""The command line `transclip-fast`; each command is a file of this folder."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from difflib import get_close_matches
from typing import Any, NoReturn

import click

from transclip_fast.cli.libraries import broken_library, describe_broken
from transclip_fast.errors import InputError, one_line, printable
from transclip_fast.version import __version__

GROUPS = {
    "Start here": {
        "demo": "Label handwritten digits, from images to labels, offline.",
        "run": "Label images with class names, in one go.",
        "doctor": "Check versions, devices and known conflicts.",
    },
    "One stage at a time": {
        "encode": "Encode images and class names into a feature folder.",
        "graph": "Search the neighbours of features, for several solves.",
        "plan": "Predict memory, disk and work of a solve.",
        "solve": "Label the rows of features, all of them jointly.",
        "predict": "Label new rows with the mixture of a result.",
    },
    "Look at a result, and correct it": {
        "report": "Write a page that shows a result, for the browser.",
        "suggest": "List the images whose correction helps most.",
        "evaluate": "Compare a result with the true labels.",
    },
    "Few-shot and other methods": {
        "train-head": "Train a few-shot method, such as CoOp, on features.",
        "compare": "Compare methods on the same features, in one table.",
        "protocol": "Make tables over data sets and seeds, as papers do.",
        "train-map": "Train a linear map of texts on captions, as LABCLIP does.",
        "evaluate-pairs": "Count the images closer to their caption than to a false one.",
    },
    "Large models": {
        "convert": "Convert a checkpoint to one file, loaded without a copy.",
    },
}
COMMANDS = {name: text for group in GROUPS.values() for name, text in group.items()}


SHARED = ("encode", "graph", "run", "solve")  # say themselves what several processes do
RESUMES = "transclip_fast.resumes"  # of a context's `meta`, where only some calls resume
RESUMED = ("demo", "run", "encode", "train-head", "solve", "graph", "protocol")


class _Commands(click.Group):
    """Imports a command when it is called, so that --help does not wait for torch."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if ctx.invoked_subcommand in RESUMED or RESUMES in ctx.meta:
                click.echo("stopped: the same command goes on from here", err=True)
            raise

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl(list(commands.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            nearest = get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {nearest[0]}?" if nearest else ""
            ctx.fail(f"No such command {printable(args[0])!r}.{hint}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"transclip_fast.cli.{name.replace('-', '_')}")
        command: click.Command = module.command
        return command


@click.group(
    cls=_Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
)
@click.version_option(__version__, prog_name="transclip-fast")
@click.pass_context
def _cli(context: click.Context) -> None:
    """Label images with a CLIP-like model, all of them jointly, without training.

    \b
    Example:
      transclip-fast run photos --classes names.txt --model ViT-B-32 --pretrained openai --out out
      transclip-fast solve features.npz --out result
    """
    name = context.invoked_subcommand
    if "WORLD_SIZE" in os.environ and name not in SHARED:
        from transclip_fast.ranks import started_ranks  # needs torch

        if started_ranks() > 1:
            raise InputError(f"{name} is one process; run it without torchrun")


def main() -> None:
    """Run the command line; bad input, a broken library or disk is one line and exit code 2."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of its caches
    try:
        code = _cli(prog_name="transclip-fast", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.Abort:
        click.echo("Aborted!", err=True)
        sys.exit(1)
    except click.ClickException as error:
        _refuse_words(error)
    except InputError as error:
        _refuse(str(error))
    except Exception as error:  # no mistake of the program, if a library or a disk is broken
        library = broken_library(error)
        if library is not None:
            found = describe_broken(library, error)
            _refuse(f"{found}; `transclip-fast doctor` checks all of them")
        if not isinstance(error, OSError):  # which any call can meet
            raise
        what, reason = error.filename or "a file", error.strerror or one_line(error)
        _refuse(f"{what}: cannot be read or written ({reason})")


def _refuse(text: str) -> NoReturn:
    click.echo(f"error: {printable(text)}", err=True)
    sys.exit(2)


def _refuse_words(error: click.ClickException) -> NoReturn:
    """Say in one line what is wrong with the words of a command; without words, print the help."""
    message = error.format_message()
    if "\n" in message:
        click.echo(message, err=True)
        sys.exit(2)
    context = getattr(error, "ctx", None)
    command = "transclip-fast" if context is None else context.command_path
    _refuse(f"{message.rstrip('.')}; see `{command} --help`")
