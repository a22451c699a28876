"""The command line `transclip-fast`; each command is a file of this folder."""

from __future__ import annotations

import sys

import click

from transclip_fast.errors import InputError
from transclip_fast.version import __version__

COMMANDS = {
    "demo": "Handwritten digits, from images to labels, offline.",
    "run": "Images and class names to labels, in one go.",
    "encode": "Images and class names to a feature folder.",
    "convert": "A checkpoint to one file that loads without a copy.",
    "train-head": "A few-shot method on features, CoOp among them, to a file.",
    "solve": "Features to labels, all of them jointly.",
    "predict": "Label new rows with the mixture of a result.",
    "evaluate": "Compare a result with the true labels.",
    "graph": "Features to neighbour lists, for several solves.",
    "plan": "Memory and time of a solve, before it.",
    "protocol": "Tables over data sets, shots and seeds, as papers have them.",
    "doctor": "Versions, devices and known conflicts.",
}


class _Commands(click.Group):
    """Commands imported when they are called, so that --help does not wait for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = __import__(f"transclip_fast.cli.{name.replace('-', '_')}", fromlist=["command"])
        command: click.Command = module.command
        return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="transclip-fast")
def _cli() -> None:
    """Label images with a CLIP-like model, all of them jointly, without training.

    \b
    Example:
      transclip-fast run photos --classes names.txt --model ViT-B-32 --pretrained openai --out out
      transclip-fast solve features.npz --out result
    """


def main() -> None:
    """Run the command line; bad input is one line on standard error and exit code 2."""
    try:
        _cli(prog_name="transclip-fast")
    except InputError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
