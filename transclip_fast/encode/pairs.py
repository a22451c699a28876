"""Files of images with a true and a false caption, as ARO publishes them, to features."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transclip_fast.data.pairs import PairFeatures
from transclip_fast.encode.encoder import EncodeProgress
from transclip_fast.encode.folder import encode_source
from transclip_fast.encode.models import Backbone
from transclip_fast.encode.path_lists import check_any_there
from transclip_fast.encode.pixels import Box
from transclip_fast.encode.sources import Source, below, first_root
from transclip_fast.encode.text import embed_texts
from transclip_fast.errors import InputError, reading
from transclip_fast.store.feature_writer import Failure
from transclip_fast.store.features import load_features
from transclip_fast.store.json_text import parse_json
from transclip_fast.store.tables import TABLE_SUFFIXES, find_column, read_columns

SIDES = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
GROUPS = ("relation_name", "attributes", "group")  # columns, best first
COLUMNS = {
    "image": ("image_path", "image", "path"),
    "caption": ("true_caption", "caption"),
    "negative": ("false_caption", "negative"),
    **{name: (name,) for name in (*SIDES, *GROUPS)},
}


@dataclass(frozen=True)
class Pairs:
    """
    The rows of a file of pairs.

    `negatives` are None where a row has no false caption; `grouped_by` is the column of `groups`.
    """

    path: Path
    images: list[str]  # paths, relative to a folder of images
    boxes: list[Box | None]
    captions: list[str]
    negatives: list[str | None]
    groups: list[str] | None = None
    grouped_by: str | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class EncodedPairs:
    """Features of the pairs whose image could be read, and the failures of the other images."""

    features: PairFeatures
    failures: list[Failure]  # of images; several pairs may have the same
    n_failed: int  # pairs


def read_pairs(path: str | Path) -> Pairs:
    """
    Read a .json list of objects, a .csv or a .parquet file of pairs.

    Columns are those of ARO's VG-Relation and VG-Attribution: image_path, true_caption,
    false_caption, bbox_x, bbox_y, bbox_w and bbox_h, relation_name or attributes; short names are
    image, caption, negative and group. All but image and caption may be missing.

    Raises
    ------
    InputError
        A file that cannot be read, or a row without an image or a caption, with a part of a box,
        or without a group where others have one.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "pairs.csv")
    ...     _ = file.write_text("image,caption,negative\\na.png,a red hat,a blue hat\\n")
    ...     pairs = read_pairs(file)
    >>> pairs.captions, pairs.negatives, pairs.boxes
    (['a red hat'], ['a blue hat'], [None])
    """
    path = Path(path)
    if path.suffix.lower() in TABLE_SUFFIXES:
        columns, _ = read_columns(path, COLUMNS, "caption")
    elif path.suffix.lower() == ".json":
        columns = _json_columns(path)
    else:
        raise InputError(f"{path}: expected a .json, .csv or .parquet file of pairs")
    for name in ("image", "caption"):
        if name not in columns:
            raise InputError(f"{path}: has no column {name!r}, or {COLUMNS[name][0]!r}")
    sides = [columns.get(name) for name in SIDES]
    if None in sides and any(sides):
        raise InputError(f"{path}: has a part of the columns {', '.join(SIDES)}; give all or none")
    rows = range(len(columns["image"]))
    if not rows:
        raise InputError(f"{path}: holds no pairs")
    grouped_by = next((name for name in GROUPS if name in columns), None)
    return Pairs(
        path,
        [_text(path, row, columns["image"], "image") for row in rows],
        [_box(path, row, [side[row] for side in sides if side is not None]) for row in rows],
        [_text(path, row, columns["caption"], "caption") for row in rows],
        [
            None if value in (None, "") else _text(path, row, columns["negative"], "negative")
            for row, value in enumerate(columns.get("negative", [None] * len(rows)))
        ],
        None if grouped_by is None else [_group(path, r, columns[grouped_by]) for r in rows],
        grouped_by,
    )


def encode_pairs(
    pairs: Pairs,
    backbone: Backbone,
    folder: str | Path,
    *,
    root: str | Path | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    image_progress: Callable[[EncodeProgress], None] | None = None,
    text_progress: Callable[[int, int], None] = lambda done, of: None,
) -> EncodedPairs:
    """
    Encode each image, or its box, and each caption once.

    `folder` receives the features of the images as `encode_images` writes them: after a crash, and
    for other captions of the same images, those that are there are kept. Paths start at `root`, by
    default the folder of the file, or the one folder beside it that has the first image. Images
    that cannot be read are failures, and their pairs are left out.

    Raises
    ------
    InputError
        No image can be read, or one is outside of the root; what `encode_source` refuses.

    Examples
    --------
    >>> import tempfile
    >>> from PIL import Image
    >>> from transclip_fast.demo import backbone
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("RGB", (28, 28)).save(Path(folder, "a.png"))
    ...     file = Path(folder, "pairs.csv")
    ...     _ = file.write_text("image,caption,negative\\na.png,a photo,a number\\n")
    ...     found = encode_pairs(read_pairs(file), backbone(), Path(folder, "features"))
    >>> found.features.images.shape, found.failures
    (torch.Size([1, 512]), [])
    """
    source = _source(pairs, root)
    encoded = encode_source(
        source,
        backbone,
        folder,
        None,
        batch_size=batch_size,
        workers=workers,
        progress=image_progress,
    )
    if not encoded.n_rows:
        raise InputError(
            f"{pairs.path}: none of its images could be read, the first because: "
            f"{encoded.failures[0].reason}"
        )
    stored, keys = load_features(folder), _keys(pairs)
    places = {key: place for place, key in enumerate(stored.keys or [])}
    kept = [row for row, key in enumerate(keys) if key in places]
    image_rows = torch.from_numpy(stored.get("image_features")[:]).float()
    images = torch.nn.functional.normalize(image_rows, dim=1)[[places[keys[row]] for row in kept]]
    captions = [pairs.captions[row] for row in kept]
    negatives = [pairs.negatives[row] for row in kept]
    given = [text for text in negatives if text is not None]
    texts = _embed_captions(backbone, [*captions, *given], pairs.path, text_progress)
    false = torch.zeros_like(images)
    false[[place for place, text in enumerate(negatives) if text is not None]] = texts[len(kept) :]
    groups = None if pairs.groups is None else [pairs.groups[row] for row in kept]
    features = PairFeatures(images, texts[: len(kept)], false, groups)
    return EncodedPairs(features, encoded.failures, len(pairs) - len(kept))


def _keys(pairs: Pairs) -> list[str]:
    """The name of each row's image, with its box as in a media fragment's URI."""
    return [
        image if box is None else "{}#xywh={},{},{},{}".format(image, *box[:2], *_size(box))
        for image, box in zip(pairs.images, pairs.boxes, strict=True)
    ]


def _size(box: Box) -> tuple[int, int]:
    return box[2] - box[0], box[3] - box[1]


def _source(pairs: Pairs, root: str | Path | None) -> Source:
    """The images of pairs, or their boxes, each once."""
    folder = first_root(pairs.path, pairs.images) if root is None else Path(root)
    first = {key: row for row, key in reversed([*enumerate(_keys(pairs))])}
    rows = sorted(first.values())
    files = [str(below(folder, pairs.images[row], pairs.path)) for row in rows]
    check_any_there(pairs.path, pairs.images, files)
    boxes = {place: box for place, row in enumerate(rows) if (box := pairs.boxes[row]) is not None}
    return Source("pairs", sorted(first, key=first.__getitem__), files, boxes=boxes)


def _embed_captions(
    backbone: Backbone, texts: Sequence[str], path: Path, progress: Callable[[int, int], None]
) -> torch.Tensor:
    """
    Unit embeddings (len(texts), d) float32; texts that the model cannot tell apart have the same.

    Encoded twice, at other places of a batch, they may differ in their last bits.
    """
    tokenizer: Any = backbone.tokenizer
    first = dict[bytes, str]()  # text of its tokens
    stands_for = {
        text: first.setdefault(tokenizer([text]).numpy().tobytes(), text)
        for text in dict.fromkeys(texts)
    }
    rows, cut = embed_texts(backbone, [*first.values()], progress)
    if not rows.isfinite().all():
        raise InputError(f"{path}: the embedding of a caption is {backbone.not_finite}")
    backbone.weights.check()
    n_cut = sum(stands_for[text] in cut for text in texts)
    if n_cut:
        warnings.warn(
            f"{path}: {n_cut:,} of {len(texts):,} captions are longer than "
            f"{tokenizer.context_length} tokens and were cut",
            stacklevel=2,
        )
    places = {text: place for place, text in enumerate(first.values())}
    return rows[[places[stands_for[text]] for text in texts]]


def _json_columns(path: Path) -> dict[str, list[Any]]:
    """The columns of a list of objects; None where an object lacks one."""
    with reading(path, "is not JSON"):
        entries = parse_json(path.read_text(encoding="utf-8-sig"))
    if not isinstance(entries, list):
        raise InputError(f"{path}: expected a list of objects, one a pair")
    for row, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise InputError(f"{path}: row {row} is no object; expected image, caption, negative")
    names = [*dict.fromkeys(name for entry in entries for name in entry)]
    chosen = {name: find_column(path, names, spellings) for name, spellings in COLUMNS.items()}
    return {
        name: [entry.get(column) for entry in entries]
        for name, column in chosen.items()
        if column is not None
    }


def _text(path: Path, row: int, values: Sequence[Any], what: str) -> str:
    value = values[row]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{path}: row {row} has no {what}, but {value!r:.40}; write one")
    return value


def _group(path: Path, row: int, values: Sequence[Any]) -> str:
    """The group of a row; attributes are joined as ARO joins them."""
    value = values[row]
    if isinstance(value, list):
        value = "_".join(map(str, value))
    if value in (None, ""):
        raise InputError(f"{path}: row {row} has no group, as others have; write one")
    return str(value)


def _box(path: Path, row: int, sides: Sequence[Any]) -> Box | None:
    """The box of x, y, width and height, rounded as Pillow's crop does; None if all are missing."""
    if all(side in (None, "") for side in sides):
        return None
    try:
        x, y, width, height = (float(side) for side in sides)
        edges = round(x), round(y), round(x + width), round(y + height)
    except (TypeError, ValueError, OverflowError) as error:  # of texts, NaN and infinity
        raise InputError(
            f"{path}: row {row}: its box is {[*sides]}; expected x, y, width and height in pixels"
        ) from error
    if min(_size(edges)) <= 0:
        raise InputError(f"{path}: row {row}: its box {[*sides]} holds no pixel; leave it out")
    return edges
