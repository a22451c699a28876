"""`transclip-fast encode`: images and class names to a feature folder."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from transclip_fast.cli import session
from transclip_fast.cli.command import Command
from transclip_fast.cli.options import (
    PATH,
    POSITIVE,
    device_option,
    flag_of,
    json_option,
    options_of,
    refuse_unused,
)
from transclip_fast.device import resolve_device
from transclip_fast.encode import models
from transclip_fast.encode.batch_size import fitting_batch_size, forward_rate
from transclip_fast.encode.encoder import EncodeProgress
from transclip_fast.encode.folder import Encoded, encode_images
from transclip_fast.encode.networks import PRECISIONS
from transclip_fast.encode.pixels import decoder
from transclip_fast.encode.sources import SPLITS
from transclip_fast.errors import InputError
from transclip_fast.progress_bar import progress_bar
from transclip_fast.ranks import joined
from transclip_fast.store.feature_writer import Failure

SHOWN_FAILURES = 5

ENCODE = {  # parameters of `encode_images` that are options of every command that encodes images
    "model": "open_clip model, e.g. ViT-B-32, or a folder with an open_clip_config.json.",
    "pretrained": "Weights: a tag open_clip knows, a checkpoint file, or none (random). A folder "
    "brings its own.",
    "allow_hub": "Let a model folder's configuration name parts on the Hugging Face hub.",
    "precision": "Arithmetic of the model.",
    "compiled": "Let torch compile the image tower; pays for many images.",
    "classes": "Class names: a .txt (one a line), .json, .csv, .parquet or .npy, or imagenet; a "
    ".json of splits has its own.",
    "templates": "Prompts: simple, openai, a text file with {} in each line, or CuPL JSON.",
    "labels_from_folders": "Sub-folder names are the true labels.",
    "follow_links": "Also encode the images behind links to folders.",
    "split": "Split to encode, of a .json of splits.  [default: test]",
    "root": "Folder that the paths in a .json of splits start at.  [default: found]",
    "by_content": "Compare images with those encoded before by content, not by size and time.",
    "batch_size": "Images at a time.  [default: what fits a GPU, 16 on a CPU]",
    "workers": "Processes that decode images.  [default: one a core, at most 16]",
    "shard_rows": "Images a shard; a killed run loses at most the shard it was at.",
}
TIMED = (  # options that --synthetic takes
    *("model", "pretrained", "precision", "compiled", "allow_hub", "device"),
    *("batch_size", "shard_rows"),
)
TYPES: dict[str, Any] = {
    "precision": click.Choice([*PRECISIONS]),
    "split": click.Choice(SPLITS),
    "root": PATH,
    "batch_size": POSITIVE,
    "workers": click.IntRange(min=0),
    "shard_rows": POSITIVE,
}


def encode_option(name: str, *, optional: bool = False) -> Callable[..., Any]:
    """A parameter of `encode_images`, with its default; an `optional` one may be left out."""
    default = inspect.signature(encode_images).parameters[name].default
    needed = default is inspect.Parameter.empty
    # click takes any default of a required option, even None, for its value.
    settings = {"required": not optional} if needed else {"default": default}
    return click.option(
        "--compile" if name == "compiled" else flag_of(name),
        name,
        **settings,
        is_flag=default is False,
        type=TYPES.get(name),
        help=ENCODE[name],
    )


encode_options = options_of(
    *map(encode_option, ENCODE),
    click.option("--strict", is_flag=True, help="Exit code 1 if an image could not be read."),
)


@click.command(
    "encode",
    cls=Command,
    shown="out pretrained precision classes templates labels_from_folders batch_size device",
)
@click.argument("images", type=PATH, required=False)
@click.option("--out", type=PATH, help="Folder to write. A killed encode is resumed.")
@click.option(
    "--synthetic",
    is_flag=True,
    help="Time the model alone, on made images: the most that this machine can encode.",
)
@click.option(
    "--local-features",
    type=POSITIVE,
    metavar="G",
    help="Also write the features of at most G x G patches of each image, for the head plot.",
)
@encode_options
@device_option
@json_option
def command(
    images: str | None, out: str | None, synthetic: bool, strict: bool, as_json: bool, **values: Any
) -> None:
    """Encode IMAGES into a feature folder.

    IMAGES is a folder of images, ImageNet's folders, a .txt, .csv or .parquet list of paths,
    webdataset tars, or a .json of splits as CoOp has them. `graph` and `solve` open the folder
    --out. Run the same command again after a crash, or after images were added, removed or
    replaced: it encodes those that are new or changed, and the files are those of one run.

    \b
    Example:
      transclip-fast encode photos --classes names.txt --model ViT-B-32 \\
          --pretrained openai --out features
    \f
    \b
    More examples:
      transclip-fast encode split_zhou_OxfordPets.json --split test --model ViT-B-32 \\
          --pretrained openai --out oxford/test
      torchrun --nproc-per-node 8 -m transclip_fast.cli encode photos --model EVA-CLIP-8B \\
          --pretrained eva-clip-8b.safetensors --precision bf16 --out features
      transclip-fast encode --synthetic --model ViT-B-32 --pretrained none

    --out receives img_emb/, metadata/, manifest.json, failures.csv and, with --classes,
    prototypes.npy. --local-features adds local_emb/, a feature for each patch of an image. Started
    by torchrun, all processes encode into the same folder, each its shards. After a crash it
    resumes from the last whole shard; failures are tried again.
    """
    if synthetic:
        unused = {*values, "images", "out", "strict"} - {*TIMED}
        refuse_unused(unused, "--synthetic times the model alone")
        with session.collected_warnings({}) as messages:
            summary, text = time_model(values)
        session.print_summary({**summary, "warnings": messages}, text, as_json)
        return
    if images is None or out is None:
        raise InputError("encode needs IMAGES and --out (or --synthetic, which needs neither)")
    with (
        joined() as ranks,
        session.collected_warnings({}, shown=ranks.leads) as messages,
        encode_progress() as progress,
    ):
        encoded = encode_images(images, out, progress=progress, **values)
    if not encoded.leads:
        return
    summary, text = report(encoded)
    warn_of_random(messages, values["pretrained"], "features")
    session.print_summary({**summary, "warnings": messages}, text, as_json)
    if strict and encoded.failures:
        sys.exit(1)


@contextmanager
def encode_progress() -> Iterator[Callable[[EncodeProgress], None]]:
    """Show the progress of `encode_images`."""
    with progress_bar("encode", "images") as show:
        yield lambda state: show(state.done, state.total, waiting_for_images=f"{state.waiting:.0%}")


def warn_of_random(
    messages: list[str],
    weights: object,
    found: str,
    *,
    said: Sequence[str] = (),
    shown: bool = True,
) -> None:
    """Warn of what is `found` with random weights, unless it is `said`: it looks like any other."""
    text = f"the weights are random (--pretrained none): the {found} mean nothing"
    if weights == models.RANDOM and text not in said:
        session.warn(messages, text, shown=shown)


def report(encoded: Encoded) -> tuple[dict[str, Any], str]:
    """
    Counts of encoded and failed images and the throughput, as summary and as text.

    InputError if not one image could be read.
    """
    speed, failures = encoded.throughput, encoded.failures
    if not encoded.n_rows:
        raise InputError(
            f"{encoded.folder}/failures.csv: none of the images could be read, the first because: "
            f"{failures[0].reason}"
        )
    summary: dict[str, Any] = {
        "n_rows": encoded.n_rows,
        "n_kept": encoded.n_kept,
        "failures": [[f.source_row, f.key, f.reason] for f in failures],
        "throughput": speed and speed.summary(),
        "config": encoded.config,
        "seconds": {stage: round(spent, 4) for stage, spent in encoded.seconds.items()},
        "versions": session.versions(),
    }
    images = session.counted(encoded.n_rows, "image")
    lines = [f"{images} encoded into {encoded.folder}"]
    if encoded.n_kept:
        now = f"{encoded.n_rows - encoded.n_kept:,} of {images} encoded"
        lines = [f"{now}, {encoded.n_kept:,} kept in {encoded.folder}"]
    if speed is not None:
        waits = ", ".join(f"{stage} {share:.0%}" for stage, share in speed.shares().items())
        lines.append(
            f"{speed.images_per_second:,.1f} images a second in batches of {speed.batch_size}; "
            f"time spent waiting for {waits}: {speed.bottleneck} is the bottleneck"
        )
        if speed.bottleneck == "images" and decoder() == "Pillow":
            lines.append("JPEGs were decoded by Pillow; `pip install simplejpeg` is faster")
    if failures:
        listed = f"listed in {encoded.folder}/failures.csv"
        lines.append(f"{len(failures):,} could not be read, {listed}:")
        lines += failure_lines(failures)
    return summary, "\n".join(lines)


def failure_lines(failures: Sequence[Failure]) -> list[str]:
    """The first images that could not be read, and why, a line each."""
    lines = [f"  {failure.key}: {failure.reason}" for failure in failures[:SHOWN_FAILURES]]
    return lines + ["  ..."] * (len(failures) > SHOWN_FAILURES)


def time_model(options: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The rate of the image tower alone (--synthetic), as summary and as text."""
    named = {key: options[key] for key in ("model", "pretrained", "precision", "compiled")}
    device, allow_hub = resolve_device(options["device"]), options["allow_hub"]
    backbone = models.load_backbone(device=device, allow_hub=allow_hub, **named)
    size = options["batch_size"] or fitting_batch_size(backbone, options["shard_rows"])
    rate = forward_rate(backbone, size)
    summary = {
        **named,
        "device": backbone.device.type,
        "batch_size": size,
        "images_per_second": rate,
        "versions": session.versions(),
    }
    return summary, f"{rate:,.1f} images a second in batches of {size}, the model alone"
