"""`transclip-fast encode`: images and class names to a feature folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import click
import torch

from transclip_fast.cli import common
from transclip_fast.device import resolve_device
from transclip_fast.encode.encoder import EncodeProgress, encode_images, fixed_threads
from transclip_fast.encode.models import Backbone, identify, load_backbone
from transclip_fast.encode.networks import PRECISIONS
from transclip_fast.encode.sources import Source, open_source, resolve_labels
from transclip_fast.encode.text import ClassPrompts, encode_text
from transclip_fast.store.atomic import locked
from transclip_fast.store.shards import MANIFEST, FeatureWriter, RowTable

SHOWN_FAILURES = 5


def encode_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that encodes images."""
    for option in reversed(
        (
            click.option(
                "--model",
                required=True,
                help="open_clip model, e.g. ViT-B-32, or a folder with an open_clip_config.json.",
            ),
            click.option(
                "--pretrained",
                help="Weights: a tag open_clip knows, a checkpoint file, or none (random). "
                "A folder brings its own.",
            ),
            click.option(
                "--precision",
                default="fp32",
                show_default=True,
                type=click.Choice([*PRECISIONS]),
                help="Arithmetic of the model.",
            ),
            click.option(
                "--classes",
                "names",
                help="Class names: a text file, one a line, or imagenet.",
            ),
            click.option(
                "--templates",
                "template_spec",
                default="simple",
                show_default=True,
                help="Prompts: simple, openai, a text file with {} in each line, or CuPL JSON.",
            ),
            click.option(
                "--labels-from-folders",
                "folder_labels",
                is_flag=True,
                help="Sub-folder names are the true labels.",
            ),
            click.option("--batch-size", default=64, show_default=True, type=click.IntRange(min=1)),
            click.option(
                "--workers",
                default=min(os.cpu_count() or 1, 16),
                type=click.IntRange(min=0),
                help="Processes that decode images.  [default: one a core, at most 16]",
            ),
            click.option(
                "--shard-rows",
                default=4096,
                show_default=True,
                type=click.IntRange(min=1),
                help="Images a shard; a killed run loses at most the shard it was at.",
            ),
            click.option(
                "--strict", is_flag=True, help="Exit code 1 if an image could not be read."
            ),
        )
    ):
        command = option(command)
    return command


@click.command("encode")
@click.argument("images", type=click.Path())
@common.out_option
@encode_options
@common.device_option
@common.json_option
def command(images: str, out: str, device: str, as_json: bool, **options: Any) -> None:
    """Encode IMAGES into a feature folder; a killed run continues when started again.

    IMAGES is a folder of images, ImageNet's folders, a .txt, .csv or .parquet list of paths, or
    webdataset tars. --out receives img_emb/, metadata/, manifest.json, failures.csv and, with
    --classes, prototypes.npy: a folder that `graph` and `solve` open.

    \b
    Example:
      transclip-fast encode photos --model ViT-B-32 --pretrained openai --classes names.txt \\
          --out features
    """
    strict = options.pop("strict")
    with common.collected_warnings({}) as warnings:
        writer, seconds = encode(images, out, device, **options)
    summary, text = report(writer, out)
    common.summarise({**summary, "seconds": seconds, "warnings": warnings}, text, as_json)
    if strict and summary["failures"]:
        sys.exit(1)


def encode(
    images: str,
    out: str,
    device: str,
    *,
    model: str,
    pretrained: str | None,
    precision: str,
    names: str | None,
    template_spec: str,
    folder_labels: bool,
    batch_size: int,
    workers: int,
    shard_rows: int,
) -> tuple[FeatureWriter, dict[str, float]]:
    """Encode a source with an open_clip model; the writer of the folder, and seconds by stage."""
    stages = common.Stages()
    chosen = resolve_device(device)
    with stages.time("list"):
        source = open_source(images, folder_labels=folder_labels)
        text = ClassPrompts.read(names, template_spec) if names else None
        identity = identify(model, pretrained, precision)
    writer = _whole(source, {**identity, "device": chosen.type}, out, text)
    if writer is None:
        with stages.time("load"):
            backbone = load_backbone(model, pretrained, chosen, precision)
        writer = encode_with(
            source,
            backbone,
            out,
            text,
            stages,
            batch_size=batch_size,
            workers=workers,
            shard_rows=shard_rows,
        )
    return writer, stages.seconds


def encode_with(
    source: Source,
    backbone: Backbone,
    out: str,
    text: ClassPrompts | None,
    stages: common.Stages,
    *,
    batch_size: int = 64,
    workers: int = 0,
    shard_rows: int = 4096,
) -> FeatureWriter:
    """Encode a source, and the prompts of its classes, into the feature folder `out`."""
    config = {
        **backbone.identity,
        "device": backbone.device.type,
        "source": source.identity(),
        "dtype": "float16",
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "shard_rows": shard_rows,
    }
    with locked(out):
        writer = FeatureWriter(out, config, _table(source, text))
        with fixed_threads(writer.config["threads"]):
            if text is not None and not writer.has_prototypes(text.identity()):
                with stages.time("text"):
                    writer.write_prototypes(encode_text(backbone, text), text.identity())
            with stages.time("images"), common.progress("encode", "images") as show:

                def step(state: EncodeProgress) -> None:
                    show(state.done, state.total, waiting_for_images=f"{state.waiting:.0%}")

                encode_images(source, backbone, writer, workers=workers, progress=step)
    return writer


def _whole(
    source: Source, known: dict[str, Any], out: str, text: ClassPrompts | None
) -> FeatureWriter | None:
    """The folder if it is finished, so that no model need be loaded."""
    if not os.path.isfile(os.path.join(out, MANIFEST)):
        return None
    with locked(out):
        config = {**known, "source": source.identity()}
        writer = FeatureWriter(out, config, _table(source, text))
    whole = writer.complete and (text is None or writer.has_prototypes(text.identity()))
    return writer if whole else None


def _table(source: Source, text: ClassPrompts | None) -> RowTable:
    return source.table(None if text is None else resolve_labels(source, text.names))


def report(writer: FeatureWriter, out: str) -> tuple[dict[str, Any], str]:
    """What is in the folder and what could not be read: as a summary and as text."""
    failures = list(writer.failures())
    rows = int(writer.config["source"]["rows"]) - len(failures)
    summary = {
        "n_rows": rows,
        "failures": [[f.source_row, f.key, f.reason] for f in failures],
        "config": writer.config,
        "versions": common.versions(),
    }
    lines = [f"{rows:,} images encoded into {out}"]
    if failures:
        lines.append(f"{len(failures):,} could not be read, listed in {out}/failures.csv:")
        lines += [f"  {f.key}: {f.reason}" for f in failures[:SHOWN_FAILURES]]
        if len(failures) > SHOWN_FAILURES:
            lines.append("  ...")
    return summary, "\n".join(lines)
