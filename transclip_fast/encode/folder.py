"""A source of images to a feature folder: list, load the model, encode text and images."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from transclip_fast.device import resolve_device
from transclip_fast.encode import models
from transclip_fast.encode.batch_size import fitting_batch_size
from transclip_fast.encode.encoder import EncodeProgress, Throughput, encode_shards, merged, timed
from transclip_fast.encode.patches import LocalEncoder
from transclip_fast.encode.pixels import RULES
from transclip_fast.encode.sources import Source, open_source, resolve_labels
from transclip_fast.encode.text import ClassPrompts, encode_text
from transclip_fast.errors import InputError
from transclip_fast.parallel import fixed_threads
from transclip_fast.ranks import ALONE, Ranks, joined, understood
from transclip_fast.store.atomic import locked
from transclip_fast.store.feature_writer import MANIFEST, SETTLED, Failure, FeatureWriter
from transclip_fast.store.kept_rows import KeptRows
from transclip_fast.store.row_table import RowTable

SHARD_ROWS = 4096  # images; 8 MiB of features in 1,024 dimensions


@dataclass(frozen=True)
class Encoded:
    """
    A finished feature folder, and how it was made.

    Attributes
    ----------
    folder : str
    n_rows : int
        Images that have features.
    n_kept : int
        Those of them that had features before.
    failures : list of Failure
        Images that could not be read: `source_row`, `key`, `reason`.
    config : dict
        The configuration in the folder's manifest.
    seconds : dict
        Time by stage: list, load, text, images.
    throughput : Throughput or None
        None if the folder was finished before.
    leads : bool
        False in all but the first of the processes that `torchrun` started.
    """

    folder: str
    n_rows: int
    n_kept: int
    failures: list[Failure]
    config: dict[str, Any]
    seconds: dict[str, float]
    throughput: Throughput | None = None
    leads: bool = True


def encode_images(
    images: str | Path,
    out: str | Path,
    *,
    model: str,
    pretrained: str | None = None,
    allow_hub: bool = False,
    classes: str | Path | Sequence[str] | None = None,
    templates: str = "simple",
    labels_from_folders: bool = False,
    follow_links: bool = False,
    split: str | None = None,
    root: str | Path | None = None,
    by_content: bool = False,
    precision: str = "fp32",
    compiled: bool = False,
    local_features: int | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    shard_rows: int = SHARD_ROWS,
    device: str = "auto",
    progress: Callable[[EncodeProgress], None] | None = None,
    on_sizes: Callable[[int, int, int], None] | None = None,
) -> Encoded:
    """
    Encode images, and the prompts of their classes, into a feature folder.

    This is the command `transclip-fast encode`. The folder holds unit features in float16,
    metadata, manifest.json, failures.csv and, with classes, prototypes.npy; `load_features` opens
    it. Call again after a crash: finished shards stay, and the files end in the same bytes. Call
    again after images were added, removed or replaced: those that are new or changed are encoded,
    those that failed are tried again, and the folder ends in the bytes of one encoded at once.
    Processes that `torchrun` starts share the shards of one folder.

    Parameters
    ----------
    images : path
        A folder, a list of paths, webdataset tars or a .json of splits: see
        `transclip_fast.encode.sources.open_source`.
    out : path
        The folder to write.
    model : str
        A name that open_clip knows, or a folder with an open_clip_config.json.
    pretrained : str, optional
        A tag that open_clip knows, a checkpoint file, or "none" (random weights). A folder has its
        own checkpoint.
    allow_hub : bool
        Let the configuration of a model folder name parts on the Hugging Face hub.
    classes : path or sequence of str, optional
        Class names, a file of them (see `transclip_fast.store.names.read_names`), or "imagenet"; a
        .json of splits has its own.
    templates : str
        Prompts: "simple", "openai", a text file with {} in each line, or CuPL's JSON.
    labels_from_folders : bool
        The names of sub-folders are the true labels.
    follow_links : bool
        Also encode the images behind links to folders.
    split, root : str, path, optional
        Of a .json of splits.
    by_content : bool
        Compare images with those encoded before by content, not by size and time; reads them all.
    precision : {"fp32", "bf16", "fp16"}
        Arithmetic of the model.
    compiled : bool
        Let torch compile the image tower.
    local_features : int, optional
        G: also write the features of at most G x G patches of each image.
    batch_size : int, optional
        Images at a time; by default what fits a GPU, 16 on a CPU.
    workers : int, optional
        Processes that decode, 0 to decode in this one; by default one a core, at most 16.
    shard_rows : int
        Images of a shard; a killed run loses at most the shard in progress.
    device : str
        "auto", "cpu", "cuda" or "cuda:1".
    progress : callable, optional
        Called with the `EncodeProgress` after each batch.
    on_sizes : callable, optional
        Called with the numbers of rows, classes and dimensions before images are encoded, if
        there are classes and the folder is not finished.

    Returns
    -------
    Encoded
        Number of images, failures, configuration, times.

    Raises
    ------
    InputError
        Images, classes, templates or model that cannot be read or are not known; an existing
        folder of another model; embeddings that are not finite; weights or tars that change
        meanwhile; a device, memory or a disk that fails.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from transclip_fast import encode_images, load_features
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for colour in ("red", "blue"):
    ...         Image.new("RGB", (64, 64), colour).save(Path(folder, f"{colour}.png"))
    ...     encoded = encode_images(
    ...         folder, Path(folder, "features"), model="ViT-S-32", pretrained="none",
    ...         classes=["red", "blue"], workers=0, device="cpu",
    ...     )
    ...     features = load_features(encoded.folder).get("image_features")
    >>> encoded.n_rows, encoded.failures, features.shape
    (2, [], (2, 384))
    """
    if compiled and local_features is not None:
        raise InputError("local features: cannot be had of a compiled image tower; drop --compile")
    seconds: dict[str, float] = {}
    with joined() as ranks:
        torch_device = resolve_device(ranks.device(device))
        if torch_device.type == "cuda" and torch_device.index is not None:
            torch.cuda.set_device(torch_device)  # or each rank would also allocate on the first GPU
        with timed(seconds, "list"):
            source = open_source(
                images,
                labels_from_folders=labels_from_folders,
                follow_links=follow_links,
                split=split,
                root=root,
            )
            source.by_content = by_content
            names = source.class_names if classes is None else classes
            text = None if names is None else ClassPrompts.read(names, templates)
            weights = models.watch_weights(model, pretrained)
            identity = models.identify(model, pretrained, precision, compiled)
        known = _config(identity, torch_device, source, local_features)
        table = _row_table(source, text)
        wanted = _text_identity(text, identity)
        finished = _finished(out, known, table, wanted) if ranks.leads else None
        found = None if finished is None else asdict(_encoded(finished, seconds, None))
        if (sent := ranks.broadcast(found)) is not None:
            return _received(sent, ranks)
        with timed(seconds, "load"):
            backbone = models.load_backbone(
                model, pretrained, torch_device, precision, compiled, identity, allow_hub, weights
            )
            if local_features is not None:
                backbone.local = LocalEncoder.of(backbone.model, local_features, model)
        if on_sizes is not None and text is not None:
            on_sizes(len(source), len(text.names), backbone.dim)
        encoded = encode_source(
            source,
            backbone,
            out,
            text,
            ranks,
            batch_size=batch_size,
            workers=ranks.cores() if workers is None else workers,
            shard_rows=shard_rows,
            progress=progress,
        )
        return replace(encoded, seconds={**seconds, **encoded.seconds})


def encode_source(
    source: Source,
    backbone: models.Backbone,
    out: str | Path,
    text: ClassPrompts | None,
    ranks: Ranks = ALONE,
    *,
    batch_size: int | None = None,
    workers: int = 0,
    shard_rows: int = SHARD_ROWS,
    progress: Callable[[EncodeProgress], None] | None = None,
) -> Encoded:
    """Encode a source and its prompts with a loaded backbone, see `encode_images`."""
    seconds: dict[str, float] = {}
    with locked(out) if ranks.leads else nullcontext():
        local_features = None if backbone.local is None else backbone.local.max_grid
        config = {
            **_config(backbone.identity, backbone.device, source, local_features),
            "batch_size": batch_size,
            # The number of CPU threads changes last bits; on a GPU it may differ between ranks.
            "threads": torch.get_num_threads() if backbone.device.type == "cpu" else 1,
            "shard_rows": shard_rows,
        }
        if ranks.leads and batch_size is None:
            config["batch_size"] = fitting_batch_size(backbone, shard_rows)
        writer, missing = _open_folder(out, config, _row_table(source, text), ranks)
        if ranks.leads and text is None:
            writer.remove_prototypes()
        with fixed_threads(writer.config["threads"]):
            wanted = _text_identity(text, backbone.identity)
            if ranks.leads and text is not None and not writer.has_prototypes(wanted):
                with timed(seconds, "text"):
                    writer.write_prototypes(encode_text(backbone, text), wanted)
            with timed(seconds, "images"):
                throughput = encode_shards(
                    source,
                    backbone,
                    writer,
                    ranks.part(missing),
                    workers=workers,
                    progress=progress if ranks.leads else None,
                )
        parts = ranks.all_gather(asdict(throughput))
        with understood("another rank"):
            throughput = merged([Throughput(**part) for part in parts])
        found = None
        if ranks.leads:
            writer.finish()
            found = asdict(_encoded(writer, seconds, throughput if throughput.images else None))
    return _received(ranks.broadcast(found), ranks)


def _received(sent: Any, ranks: Ranks) -> Encoded:
    """The first rank's `Encoded`, from its fields in JSON."""
    with understood("the first rank"):
        failures = [Failure(**failure) for failure in sent["failures"]]
        throughput = sent["throughput"] and Throughput(**sent["throughput"])
        found = {**sent, "failures": failures, "throughput": throughput, "leads": ranks.leads}
        return Encoded(**found)


def _config(
    identity: dict[str, Any], device: torch.device, source: Source, local_features: int | None
) -> dict[str, Any]:
    """All that decides the features; a folder of another configuration is refused."""
    return {
        **{name: value for name, value in identity.items() if name != models.TOKENIZER},
        "device": device.type,
        "source": source.identity(),
        "pixels": RULES,
        "dtype": "float16",
        "local_features": local_features,
    }


def _text_identity(text: ClassPrompts | None, identity: dict[str, Any]) -> dict[str, Any]:
    """All that decides the prototypes beside the model; those of another identity are replaced."""
    tokenizer = {name: value for name, value in identity.items() if name == models.TOKENIZER}
    return {} if text is None else {**text.identity(), **tokenizer}


def _open_folder(
    out: str | Path, config: dict[str, Any], table: RowTable, ranks: Ranks
) -> tuple[FeatureWriter, list[int]]:
    """The folder as the first rank opens it, and the shards that are missing."""
    if ranks.leads:
        writer = FeatureWriter(out, config, table)
        writer.set_aside()
        kept = writer.kept
        ranks.broadcast([writer.config, writer.missing(), kept.names, kept.shard, kept.position])
        return writer, writer.missing()
    sent = ranks.broadcast(None)
    with understood("the first rank"):
        settled, missing, names, shard, position = sent
        own = json.loads(json.dumps(config))
        for name in sorted(own.keys() - set(SETTLED)):
            if settled[name] != own[name]:  # as of weights that were replaced in between
                raise InputError(
                    f"rank {ranks.rank}: its {name} differs from the first rank's; give all ranks "
                    "the same files and options"
                )
        if not all(type(number) is int for number in (*missing, *shard, *position)):
            raise TypeError("shards are numbers")  # they become names of files
        writer = FeatureWriter(out, settled, table, leads=False)
        writer.kept = KeptRows(writer.folder, names, shard, position)
    return writer, missing


def _finished(
    out: str | Path, known: dict[str, Any], table: RowTable, wanted: dict[str, Any]
) -> FeatureWriter | None:
    """The folder if it is finished and no image failed, so that no model needs to be loaded."""
    if not os.path.isfile(os.path.join(out, MANIFEST)):
        return None
    with locked(out):
        writer = FeatureWriter(out, known, table)
        whole = writer.complete and not any(writer.failures())
        if whole and not wanted:
            writer.remove_prototypes()
    return writer if whole and (not wanted or writer.has_prototypes(wanted)) else None


def _row_table(source: Source, text: ClassPrompts | None) -> RowTable:
    if text is None:
        if source.labels is not None:
            message = "labels are not kept without class names; give classes"
            warnings.warn(message, stacklevel=1)  # from one place, so that it is shown once
        return source.table(None)
    return source.table(resolve_labels(source, text.names, text.synsets))


def _encoded(
    writer: FeatureWriter, seconds: dict[str, float], throughput: Throughput | None
) -> Encoded:
    failures = list(writer.failures())
    n_rows = int(writer.config["source"]["rows"]) - len(failures)
    n_kept = n_rows if throughput is None else n_rows - (throughput.images - len(failures))
    return Encoded(str(writer.folder), n_rows, n_kept, failures, writer.config, seconds, throughput)
