"""`transclip-fast convert`: a checkpoint to one file that loads without a copy."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from transclip_fast.cli import session
from transclip_fast.cli.options import PATH, json_option
from transclip_fast.encode.architectures import network_config
from transclip_fast.encode.networks import PRECISIONS, empty_network, match_weights
from transclip_fast.encode.weights import WatchedFiles, checkpoint_files, read_checkpoint
from transclip_fast.errors import InputError, reading
from transclip_fast.progress_bar import progress_bar
from transclip_fast.store.tensors import check_writable, read_metadata, write_tensors

ENTRY = "transclip_fast.converted"  # key of the model's name in the file's metadata


@click.command("convert")
@click.argument("checkpoint", type=PATH)
@click.option("--model", required=True, help="The checkpoint's model, e.g. EVA-CLIP-8B.")
@click.option(
    "--dtype", default="bf16", type=click.Choice([*PRECISIONS]), help="Type of the written weights."
)
@click.option("--out", required=True, type=PATH, help="The .safetensors file to write.")
@json_option
def command(checkpoint: str, model: str, dtype: str, out: str, as_json: bool) -> None:
    """Convert CHECKPOINT to one .safetensors file in open_clip's names, tensor by tensor.

    CHECKPOINT is a .safetensors file, a file of torch.save, or the .index.json of either in
    several files. The written file is for `encode --pretrained`, which maps it from disk. No more
    than one tensor is in memory at any time, but all of a file of torch before 1.6.

    \b
    Example:
      transclip-fast convert EVA_CLIP_8B_psz14_s9B.pt --model EVA-CLIP-8B --dtype bf16 \\
          --out eva-clip-8b.safetensors
      transclip-fast encode photos --model EVA-CLIP-8B --pretrained eva-clip-8b.safetensors \\
          --precision bf16 --out features
    """
    files = checkpoint_files(Path(checkpoint))
    _check_out(out, files)
    stages = session.Stages()
    with stages.time("convert"), progress_bar("convert", "bytes") as show:
        config = network_config(model)
        with reading(model, "does not describe a network", "correct its configuration"):
            net = empty_network(config)
        watched = WatchedFiles.of(files)

        def step(done: int, total: int) -> None:
            watched.check()
            show(done, total)

        with watched.in_use():
            tensors = match_weights(net, read_checkpoint(checkpoint), checkpoint)
            size = write_tensors(out, tensors, PRECISIONS[dtype], step, metadata={ENTRY: model})
    n_parameters = sum(tensor.numel() for tensor in tensors.values())
    summary = {
        "out": out,
        "model": model,
        "dtype": dtype,
        "n_tensors": len(tensors),
        "n_parameters": n_parameters,
        "bytes": size,
        "seconds": stages.seconds,
        "versions": session.versions(),
    }
    text = (
        f"{len(tensors):,} tensors, {n_parameters:,} parameters as {dtype}, "
        f"{size / 2**30:.2f} GiB written to {out}"
    )
    session.print_summary(summary, text, as_json)


def _check_out(out: str, checkpoint: Iterable[Path]) -> None:
    """Raise InputError if the checkpoint, or a file that is no converted one, would be replaced."""
    if Path(out).resolve() in {file.resolve() for file in checkpoint}:
        raise InputError(f"{out}: is the checkpoint itself; name another file")
    check_writable(out, "converted checkpoint", _check_converted)


def _check_converted(path: Path) -> None:
    if ENTRY not in read_metadata(path):
        raise InputError(f"{path}: was not written by `convert`")
