"""`transclip-fast encode`: images and class names to a feature folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import click
import torch

from transclip_fast.cli import session
from transclip_fast.cli.options import device_option, json_option
from transclip_fast.device import resolve_device
from transclip_fast.encode.batch_size import fitting_batch_size, forward_rate
from transclip_fast.encode.encoder import (
    EncodeProgress,
    Throughput,
    encode_images,
    merged,
)
from transclip_fast.encode.models import Backbone, identify, load_backbone
from transclip_fast.encode.networks import PRECISIONS
from transclip_fast.encode.patches import LocalEncoder
from transclip_fast.encode.pixels import decoder
from transclip_fast.encode.ranks import ALONE, Ranks, joined
from transclip_fast.encode.sources import SPLITS, Source, open_source, resolve_labels
from transclip_fast.encode.text import ClassPrompts, encode_text
from transclip_fast.errors import InputError
from transclip_fast.parallel import fixed_threads
from transclip_fast.progress_bar import progress_bar
from transclip_fast.store.atomic import locked
from transclip_fast.store.feature_writer import MANIFEST, FeatureWriter, RowTable

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
                "--compile",
                "compiled",
                is_flag=True,
                help="Let torch compile the image tower; pays for many images.",
            ),
            click.option(
                "--classes",
                "names",
                help="Class names: a text file, one a line, or imagenet; a .json of splits has "
                "its own.",
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
            click.option(
                "--split",
                type=click.Choice(SPLITS),
                help="Of a .json of splits.  [default: test]",
            ),
            click.option(
                "--root",
                type=click.Path(),
                help="Folder that the paths in a .json of splits start at.  [default: found]",
            ),
            click.option(
                "--batch-size",
                type=click.IntRange(min=1),
                help="Images at a time.  [default: what fits a GPU, 64 on a CPU]",
            ),
            click.option(
                "--workers",
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
@click.argument("images", type=click.Path(), required=False)
@click.option(
    "--out",
    type=click.Path(),
    help="Folder to write. A killed encode is continued.",
)
@click.option(
    "--synthetic",
    is_flag=True,
    help="Time the model alone, on made images: the most that this machine can encode.",
)
@click.option(
    "--local-features",
    type=click.IntRange(min=1),
    metavar="G",
    help="Also write the features of at most G x G patches of each image, for the head plot.",
)
@encode_options
@device_option
@json_option
def command(
    images: str | None,
    out: str | None,
    synthetic: bool,
    local_features: int | None,
    device: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Encode IMAGES into a feature folder; a killed run continues when started again.

    IMAGES is a folder of images, ImageNet's folders, a .txt, .csv or .parquet list of paths,
    webdataset tars, or a .json of splits as CoOp has them. --out receives img_emb/, metadata/,
    manifest.json, failures.csv and, with --classes, prototypes.npy: a folder that `graph` and
    `solve` open. --local-features adds local_emb/, a feature for each patch of an image. Started by
    torchrun, all processes encode into the same folder, each its shards.

    \b
    Examples:
      transclip-fast encode photos --model ViT-B-32 --pretrained openai --classes names.txt \\
          --out features
      transclip-fast encode split_zhou_OxfordPets.json --split test --model ViT-B-32 \\
          --pretrained openai --out pets/test
      torchrun --nproc-per-node 8 -m transclip_fast.cli encode photos --model EVA-CLIP-8B \\
          --pretrained eva-clip-8b.safetensors --precision bf16 --out features
      transclip-fast encode --synthetic --model ViT-B-32 --pretrained none
    """
    strict = options.pop("strict")
    if synthetic:
        session.print_summary(*time_model(device, options), as_json)
        return
    if images is None or out is None:
        raise InputError("encode needs IMAGES and --out (or --synthetic, which needs neither)")
    with session.collected_warnings({}) as warnings, joined() as ranks:
        encoded = encode(images, out, device, ranks, local_features=local_features, **options)
    if not ranks.leads:
        return
    summary, text = report(encoded, out)
    session.print_summary({**summary, "warnings": warnings}, text, as_json)
    if strict and summary["failures"]:
        sys.exit(1)


@dataclass(frozen=True)
class Encoded:
    """A finished folder, and how it came about: seconds by stage, throughput if any was encoded."""

    writer: FeatureWriter
    seconds: dict[str, float]
    throughput: Throughput | None = None


def encode(
    images: str,
    out: str,
    device: str,
    ranks: Ranks = ALONE,
    foresee: Callable[[int, int, int], None] | None = None,
    *,
    model: str,
    pretrained: str | None,
    precision: str,
    compiled: bool,
    names: str | None,
    template_spec: str,
    folder_labels: bool,
    split: str | None,
    root: str | None,
    batch_size: int | None,
    workers: int | None,
    shard_rows: int,
    local_features: int | None = None,
) -> Encoded:
    """
    Encode a source with an open_clip model into the folder `out`.

    `foresee` is told how many rows, classes and dimensions there will be, before they are encoded.
    """
    if compiled and local_features is not None:
        raise InputError("local features: cannot be had of a compiled image tower; drop --compile")
    stages = session.Stages()
    chosen = resolve_device(ranks.device(device))
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # or every rank would also take memory of the first GPU
    with stages.time("list"):
        source = open_source(images, folder_labels=folder_labels, split=split, root=root)
        classes = names or source.class_names
        text = ClassPrompts.read(classes, template_spec) if classes else None
        identity = identify(model, pretrained, precision, compiled)
    known = {
        **identity,
        "device": chosen.type,
        "source": source.identity(),
        "local_features": local_features,
    }
    finished = _finished(source, known, out, text) if ranks.leads else None
    if ranks.told(finished is not None):
        writer = finished or FeatureWriter(out, known, _table(source, text), leads=False)
        return Encoded(writer, stages.seconds)
    with stages.time("load"):
        backbone = load_backbone(model, pretrained, chosen, precision, compiled)
        if local_features is not None:
            backbone.local = LocalEncoder.of(backbone.model, local_features, model)
    if foresee is not None and text is not None:
        foresee(len(source), len(text.names), backbone.dim)
    return encode_with(
        source,
        backbone,
        out,
        text,
        stages,
        ranks,
        batch_size=batch_size,
        workers=ranks.cores() if workers is None else workers,
        shard_rows=shard_rows,
    )


def encode_with(
    source: Source,
    backbone: Backbone,
    out: str,
    text: ClassPrompts | None,
    stages: session.Stages,
    ranks: Ranks = ALONE,
    *,
    batch_size: int | None = None,
    workers: int = 0,
    shard_rows: int = 4096,
) -> Encoded:
    """Encode a source, and the prompts of its classes, into the feature folder `out`."""
    with locked(out) if ranks.leads else nullcontext():
        writer, plan = _begin(source, backbone, out, text, ranks, batch_size, shard_rows)
        with fixed_threads(writer.config["threads"]):
            if ranks.leads and text is not None and not writer.has_prototypes(text.identity()):
                with stages.time("text"):
                    writer.write_prototypes(encode_text(backbone, text), text.identity())
            with stages.time("images"), _progress(ranks) as step:
                throughput = encode_images(
                    source, backbone, writer, plan, workers=workers, progress=step
                )
        throughput = merged(ranks.gathered(throughput))
        if ranks.leads:
            writer.finish()
    return Encoded(writer, stages.seconds, throughput if throughput.images else None)


def _begin(
    source: Source,
    backbone: Backbone,
    out: str,
    text: ClassPrompts | None,
    ranks: Ranks,
    batch_size: int | None,
    shard_rows: int,
) -> tuple[FeatureWriter, list[int]]:
    """The folder as the first rank finds or begins it, and the shards that this rank encodes."""
    cpu = backbone.device.type == "cpu"
    config = {
        **backbone.identity,
        "device": backbone.device.type,
        "source": source.identity(),
        "dtype": "float16",
        "local_features": backbone.local and backbone.local.most,
        "batch_size": batch_size,
        # On a GPU they change nothing, and differ with the number of processes.
        "threads": torch.get_num_threads() if cpu else 1,
        "shard_rows": shard_rows,
    }
    if ranks.leads:
        if batch_size is None:
            config["batch_size"] = fitting_batch_size(backbone, shard_rows)
        writer = FeatureWriter(out, config, _table(source, text))
        ranks.told((writer.config, writer.missing()))
        return writer, ranks.part(writer.missing())
    settled, missing = ranks.told(None)
    if settled["source"] != config["source"]:
        raise InputError(f"rank {ranks.rank} does not see the images that the first rank sees")
    writer = FeatureWriter(out, settled, _table(source, text), leads=False)
    return writer, ranks.part(missing)


@contextmanager
def _progress(ranks: Ranks) -> Iterator[Callable[[EncodeProgress], None]]:
    if not ranks.leads:
        yield lambda _: None
        return
    with progress_bar("encode", "images") as show:
        yield lambda state: show(state.done, state.total, waiting_for_images=f"{state.waiting:.0%}")


def _finished(
    source: Source, known: dict[str, Any], out: str, text: ClassPrompts | None
) -> FeatureWriter | None:
    """The folder if it is finished, so that no model need be loaded."""
    if not os.path.isfile(os.path.join(out, MANIFEST)):
        return None
    with locked(out):
        writer = FeatureWriter(out, known, _table(source, text))
    whole = writer.complete and (text is None or writer.has_prototypes(text.identity()))
    return writer if whole else None


def _table(source: Source, text: ClassPrompts | None) -> RowTable:
    return source.table(None if text is None else resolve_labels(source, text.names))


def report(encoded: Encoded, out: str) -> tuple[dict[str, Any], str]:
    """What is in the folder, what could not be read, how fast it went: as summary and as text."""
    writer, fast = encoded.writer, encoded.throughput
    failures = list(writer.failures())
    rows = int(writer.config["source"]["rows"]) - len(failures)
    summary: dict[str, Any] = {
        "n_rows": rows,
        "failures": [[f.source_row, f.key, f.reason] for f in failures],
        "throughput": None if fast is None else fast.summary(),
        "config": writer.config,
        "seconds": encoded.seconds,
        "versions": session.versions(),
    }
    lines = [f"{rows:,} images encoded into {out}"]
    if fast is not None:
        waits = ", ".join(f"{stage} {share:.0%}" for stage, share in fast.shares().items())
        lines.append(
            f"{fast.images_per_second:,.1f} images a second in batches of {fast.batch_size}; "
            f"time spent waiting for {waits}: {fast.bottleneck} is the bottleneck"
        )
        if fast.bottleneck == "images" and decoder() == "Pillow":
            lines.append("JPEGs were decoded by Pillow; `pip install simplejpeg` is faster")
    if failures:
        lines.append(f"{len(failures):,} could not be read, listed in {out}/failures.csv:")
        lines += [f"  {f.key}: {f.reason}" for f in failures[:SHOWN_FAILURES]]
        if len(failures) > SHOWN_FAILURES:
            lines.append("  ...")
    return summary, "\n".join(lines)


def time_model(device: str, options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What --synthetic prints: the image tower's rate, as summary and as text."""
    names = ("model", "pretrained", "precision", "compiled")
    identity = {name: options[name] for name in names}
    backbone = load_backbone(
        options["model"],
        options["pretrained"],
        resolve_device(device),
        *[options[n] for n in names[2:]],
    )
    size = options["batch_size"] or fitting_batch_size(backbone, options["shard_rows"])
    rate = forward_rate(backbone, size)
    summary = {
        **identity,
        "device": backbone.device.type,
        "batch_size": size,
        "images_per_second": rate,
        "versions": session.versions(),
    }
    return summary, f"{rate:,.1f} images a second in batches of {size}, the model alone"
