"""Options of the commands about pairs of captions, and the features of a file of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from transclip_fast.cli import options
from transclip_fast.cli.encode import encode_option, encode_progress, failure_lines
from transclip_fast.cli.session import counted
from transclip_fast.cli.towers import encoder_of
from transclip_fast.data.pairs import PairFeatures
from transclip_fast.device import resolve_device
from transclip_fast.encode import models
from transclip_fast.encode.pairs import Pairs, encode_pairs, read_pairs
from transclip_fast.errors import InputError, reading
from transclip_fast.progress_bar import progress_bar
from transclip_fast.ranks import ALONE
from transclip_fast.store.arrays import SUFFIXES, open_arrays
from transclip_fast.store.feature_writer import Failure
from transclip_fast.store.names import as_names

ARRAYS = ("image_features", "caption_features", "negative_features")

# Options that features need not.
OF_IMAGES = (
    *("model", "pretrained", "allow_hub", "precision", "root", "features", "batch_size", "workers"),
    *("device", "attributes"),
)
pair_options = options.options_of(
    encode_option("model", optional=True),
    *map(encode_option, ("pretrained", "allow_hub", "precision")),
    click.option(
        "--root",
        type=options.PATH,
        help="Folder that the paths of images start at.  [default: found]",
    ),
    click.option(
        "--features",
        type=options.PATH,
        help="Folder to keep the features of the images in: a killed run resumes, and another "
        "file of the same images needs no new ones.",
    ),
    *map(encode_option, ("batch_size", "workers")),
    options.device_option,
    options.json_option,
)


@dataclass(frozen=True)
class LoadedPairs:
    """The features of a file, and what is known of the model and of images that failed."""

    features: PairFeatures
    grouped_by: str | None = None
    encoder: dict[str, Any] | None = None
    logit_scale: float | None = None
    failures: list[Failure] = field(default_factory=list)
    n_failed: int = 0

    def summary(self) -> dict[str, Any]:
        """The entries about failures in a command's JSON."""
        return {
            "n_failed": self.n_failed,
            "failures": [[failure.key, failure.reason] for failure in self.failures],
        }

    def failure_lines(self) -> list[str]:
        """The same for a reader."""
        if not self.failures:
            return []
        first = f"{counted(self.n_failed, 'pair')} left out, as images could not be read:"
        return [first, *failure_lines(self.failures)]


def load_pairs(
    path: str, values: Mapping[str, Any], complete: Callable[[Pairs], Pairs]
) -> LoadedPairs:
    """
    The features in a file, or of the images and captions that it lists.

    `complete` checks the listed pairs, or adds to them, before anything is encoded.
    """
    if Path(path).suffix in SUFFIXES:
        options.refuse_unused(OF_IMAGES, f"{path} holds features, and lists no images")
        return LoadedPairs(_stored(path))
    pairs = complete(read_pairs(path))
    if values["model"] is None:
        raise InputError(f"{path}: lists images, so give --model, or a file of {', '.join(ARRAYS)}")
    kept = values["features"]
    named = {name: values[name] for name in ("model", "pretrained", "precision", "allow_hub")}
    backbone = models.load_backbone(device=resolve_device(values["device"]), **named)
    workers = ALONE.cores() if values["workers"] is None else values["workers"]
    with (
        tempfile.TemporaryDirectory() if kept is None else nullcontext(kept) as folder,
        encode_progress() as image_progress,
        progress_bar("encode", "captions") as text_progress,
    ):
        found = encode_pairs(
            pairs,
            backbone,
            folder,
            root=values["root"],
            batch_size=values["batch_size"],
            workers=workers,
            image_progress=image_progress,
            text_progress=text_progress,
        )
    scale = getattr(backbone.model, "logit_scale", None)
    return LoadedPairs(
        found.features,
        pairs.grouped_by,
        encoder_of(backbone),
        None if scale is None else float(scale.detach().exp()),
        found.failures,
        found.n_failed,
    )


def text_lines(file: str) -> list[str]:
    """The lines of a text file that are not empty, each once."""
    with reading(file, "cannot be read as a list"):
        content = Path(file).read_text(encoding="utf-8-sig")
    found = [*dict.fromkeys(line.strip() for line in content.split("\n") if line.strip())]
    if not found:
        raise InputError(f"{file}: holds no line; write one a name")
    return found


def _groups(array: Any) -> list[Any] | None:
    """The group of each row, from an array of texts or numbers (N,)."""
    if array is None:
        return None
    values = np.asarray(array)
    if values.ndim != 1:
        raise InputError(f"groups: expected one a row, got shape {values.shape}")
    return as_names(values, "groups") if values.dtype.kind == "S" else values.tolist()


def _stored(path: str) -> PairFeatures:
    """Features of a file of arrays."""
    arrays = open_arrays(path)
    for name in ARRAYS:
        if name not in arrays:
            listed = ", ".join(arrays) or "none"
            raise InputError(f"{path}: has no array {name!r}, only {listed}")
    try:
        images, captions, negatives = (arrays[name] for name in ARRAYS)
        return PairFeatures.of(images, captions, negatives, _groups(arrays.get("groups")))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
