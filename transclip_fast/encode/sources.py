"""Where images come from: folders, lists of paths, webdataset tars, splits of a data set."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from transclip_fast.errors import InputError, reading
from transclip_fast.store.atomic import read_json
from transclip_fast.store.feature_writer import RowTable

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
TAR_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
LABEL_SUFFIXES = ("cls", "json", "txt")  # the first that a sample has holds its label
SPLITS = ("train", "val", "test")
IMAGENET_CLASSES = 1000


@dataclass
class Source:
    """The images to encode, in a fixed order; row r is the r-th image."""

    kind: str  # "folder", "list", "webdataset" or "split"
    keys: list[str]  # name of each image within the source
    files: list[str]  # file that holds each image
    spans: list[tuple[int, int]] | None = None  # its offset and size there; None: the whole file
    labels: Sequence[int | str | None] | None = None  # positions, class names or synsets
    class_names: list[str] | None = None  # of a source that defines them; labels are positions

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, row: int) -> bytes:
        """The bytes of one image."""
        with open(self.files[row], "rb") as file:
            if self.spans is None:
                return file.read()
            offset, size = self.spans[row]
            file.seek(offset)
            return file.read(size)

    def table(self, labels: np.ndarray | None) -> RowTable:
        """The metadata of each row in a feature folder."""
        return RowTable(self.keys, [_printable(file) for file in self.files], labels)

    def identity(self) -> dict[str, Any]:
        """The manifest's entry: kind, rows, hash of names and sizes."""
        digest = hashlib.sha256()
        for row, key in enumerate(self.keys):
            size = self.spans[row][1] if self.spans else -1
            if not self.spans:
                with suppress(OSError):  # reading it fails later, and is reported
                    size = os.stat(self.files[row]).st_size
            digest.update(f"{key}\0{size}\0".encode())
        return {"kind": self.kind, "rows": len(self), "sha256": digest.hexdigest()}


def open_source(
    path: str | Path,
    *,
    labels_from_folders: bool = False,
    split: str | None = None,
    root: str | Path | None = None,
) -> Source:
    """
    List the images at a path.

    Parameters
    ----------
    path : path
        A folder of images (with sub-folders, in order of their paths); a folder of .tar files or
        one .tar file (webdataset); or a .txt, .csv or .parquet list with a column `path` (a .txt
        has one path a line) and optionally `label` and `key`, paths relative to the list; or a
        .json of splits as CoOp has them, lists of [path, label, class name].
    labels_from_folders : bool
        The name of an image's first sub-folder is its label.
    split : {"train", "val", "test"}, optional
        Of a .json of splits; "test" by default.
    root : path, optional
        Folder that the paths of a .json of splits start at; by default its own, or the one folder
        beside it that has the first image.

    Raises
    ------
    InputError
        Nothing there, no images, or a list, tar or split that cannot be read; a split's path that
        leads out of its folder.
    """
    path = Path(path)
    if path.suffix != ".json" and (split or root):
        raise InputError(f"{path}: split and root are for a .json of splits; leave them out")
    if not os.path.exists(path):  # unlike Path.exists, no error for a name that is too long
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        source = _webdataset(tars) if tars else _folder(path, labels_from_folders)
        if tars and any(entry.suffix.lower() in SUFFIXES for entry in path.iterdir()):
            raise InputError(f"{path}: holds images and .tar files; name one of the .tar files")
    elif path.suffix == ".tar":
        source = _webdataset([path])
    elif path.suffix in (".txt", ".csv", ".parquet"):
        source = _list(path)
    elif path.suffix == ".json":
        source = _split(path, split or "test", root)
    else:
        raise InputError(
            f"{path}: expected a folder, a .tar, a .txt, .csv or .parquet list, or a .json of "
            "splits"
        )
    if not len(source):
        raise InputError(f"{path}: holds no images ({', '.join(sorted(SUFFIXES))})")
    return source


def resolve_labels(source: Source, names: Sequence[str]) -> np.ndarray | None:
    """
    Labels of a source as positions in `names`, (rows,) int64, or None if it has none.

    A label may be a position, a class name (case, "_" and " " alike; not one that two classes
    share) or one of ImageNet's synsets, which stand for their positions among the 1000 classes;
    anything else raises InputError. But texts of a webdataset may be captions: if one is no class
    name, the result is None, with a warning.
    """
    if source.labels is None:
        return None
    positions: dict[str, int | None] = {}
    for k, name in enumerate(names):
        positions[plain_name(name)] = None if plain_name(name) in positions else k
    synsets = _synsets() if len(names) == IMAGENET_CLASSES else {}
    captions = any(isinstance(label, str) for label in source.labels)
    found = np.empty(len(source), dtype=np.int64)
    for row, label in enumerate(source.labels):
        position = label
        if isinstance(label, str):
            position = positions.get(plain_name(label), synsets.get(label))
            if position is None and label.isdecimal():
                position = int(label)
        if type(position) is not int or not 0 <= position < len(names):  # nor is True a position
            message = f"{source.keys[row]}: label {label!r} is none of the {len(names)} classes"
            if source.kind == "webdataset" and captions:
                warnings.warn(f"{message}; texts are taken for captions", stacklevel=2)
                return None
            raise InputError(message)
        found[row] = position
    return found


def _folder(root: Path, labels_from_folders: bool) -> Source:
    found = []
    for folder, subfolders, files in os.walk(root, onerror=_unreadable):
        links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
        if links:
            warnings.warn(
                f"{os.path.join(folder, links[0])}: is a link to a folder and is not followed",
                stacklevel=2,
            )
        for name in files:
            file = Path(folder, name)
            if file.suffix.lower() in SUFFIXES:
                found.append((_printable(file.relative_to(root).as_posix()), str(file)))
    found.sort()
    keys = [key for key, _ in found]
    labels = None
    if labels_from_folders:
        for key in keys:
            if "/" not in key:
                raise InputError(f"{root / key}: is in no sub-folder, so it has no label")
        labels = [key.split("/", 1)[0] for key in keys]
    return Source("folder", keys, [file for _, file in found], labels=labels)


def _list(path: Path) -> Source:
    with reading(path, "cannot be read as a list"):
        if path.suffix == ".txt":
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            table = pa.table({"path": [line.strip() for line in lines if line.strip()]})
        elif path.suffix == ".csv":
            text = {name: pa.string() for name in ("path", "key", "label")}
            options = pyarrow.csv.ConvertOptions(column_types=text, strings_can_be_null=False)
            table = pyarrow.csv.read_csv(path, convert_options=options)
        else:
            table = pq.read_table(path)
    if "path" not in table.column_names:
        raise InputError(f"{path}: has no column 'path', only {', '.join(table.column_names)}")
    wanted = [name for name in ("path", "key", "label") if name in table.column_names]
    columns = {name: table.column(name).to_pylist() for name in wanted}
    keys = [str(value) for value in columns.get("key", columns["path"])]
    files = [str(path.parent / str(value)) for value in columns["path"]]
    return Source("list", keys, files, labels=columns.get("label"))


def _split(path: Path, split: str, root: str | Path | None) -> Source:
    splits = read_json(path)
    lists = {name: splits[name] for name in SPLITS if isinstance(splits.get(name), list)}
    if split not in lists:
        raise InputError(f"{path}: has no split {split!r}, only {', '.join(lists) or 'none'}")
    names = _split_classes(path, lists)
    keys = [str(entry[0]) for entry in lists[split]]
    folder = _root(path, keys) if root is None else Path(root)
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    files = [str(_below(folder, key, path)) for key in keys]
    labels = [int(entry[1]) for entry in lists[split]]
    return Source("split", [_printable(key) for key in keys], files, None, labels, names)


def _split_classes(path: Path, lists: Mapping[str, list[Any]]) -> list[str]:
    """Class names by their labels, as written in all splits; with " " for "_", as in prompts."""
    names: dict[int, str] = {}
    for split, entries in lists.items():
        for row, entry in enumerate(entries):
            match entry:
                case [str(), int(label), str(name)] if not isinstance(label, bool):
                    if names.setdefault(label, name) != name:
                        raise InputError(
                            f"{path}: {split}, row {row}: calls class {label} {name!r}, rows "
                            f"before {names[label]!r}"
                        )
                case _:
                    raise InputError(
                        f"{path}: {split}, row {row}: expected [path, label, class name]"
                    )
    if sorted(names) != list(range(len(names))):
        raise InputError(f"{path}: labels are not 0 .. {len(names) - 1}, one for each class")
    return [names[k].replace("_", " ") for k in range(len(names))]


def _root(path: Path, keys: Sequence[str]) -> Path:
    """The folder of a .json of splits, or the one folder in it, with the first image."""
    folders = [path.parent, *sorted(entry for entry in path.parent.iterdir() if entry.is_dir())]
    found = [folder for folder in folders if keys and os.path.isfile(folder / keys[0])]
    if keys and len(found) != 1:
        where = " and ".join(map(str, found)) or f"neither {path.parent} nor a folder in it"
        has = "have" if len(found) > 1 else "has"
        raise InputError(f"{path}: {where} {has} {keys[0]}; name the folder with --root")
    return found[0] if found else path.parent


def _below(folder: Path, key: str, path: Path) -> Path:
    file = folder / key
    try:
        inside = Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder))
    except ValueError as error:
        raise InputError(f"{path}: {key!r} is no path ({error})") from error
    if not inside:
        raise InputError(f"{path}: {key!r} leads out of {folder}")
    return file


def _webdataset(tars: Iterable[Path]) -> Source:
    keys: list[str] = []
    files: list[str] = []
    spans: list[tuple[int, int]] = []
    labels: list[int | str | None] = []
    for tar in tars:
        for key, sample in _samples(tar).items():
            if sample.image is not None:
                keys.append(_printable(f"{tar.name}/{key}"))
                files.append(str(tar))
                spans.append((sample.image.offset_data, sample.image.size))
                labels.append(sample.label)
    labelled = any(label is not None for label in labels)
    return Source("webdataset", keys, files, spans, labels if labelled else None)


@dataclass
class _Sample:
    """The files of a tar with one name up to its first dot."""

    image: tarfile.TarInfo | None = None
    label: int | str | None = None
    rank: int = len(LABEL_SUFFIXES)  # of the label's suffix


def _samples(tar: Path) -> dict[str, _Sample]:
    samples: defaultdict[str, _Sample] = defaultdict(_Sample)
    with (
        reading(tar, "cannot be read as an uncompressed tar", "pack it again"),
        tarfile.open(tar, "r:") as archive,
    ):
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if not member.isreg() or not suffix:
                continue
            sample = samples[f"{folder}/{stem}" if folder else stem]
            if suffix.lower() in TAR_SUFFIXES:
                sample.image = member
            elif suffix in LABEL_SUFFIXES and LABEL_SUFFIXES.index(suffix) < sample.rank:
                content = archive.extractfile(member)
                label = _label(suffix, content.read() if content else b"", f"{tar}: {member.name}")
                if label is not None:
                    sample.label, sample.rank = label, LABEL_SUFFIXES.index(suffix)
    return samples


def _label(suffix: str, content: bytes, origin: str) -> int | str | None:
    with reading(origin, "is not a label", "pack it again"):
        text = content.decode("utf-8").strip()
        if suffix != "json":
            return int(text) if suffix == "cls" else text
        value = json.loads(text)
    found = map(value.get, ("label", "cls", "class")) if isinstance(value, dict) else ()
    return next((label for label in found if isinstance(label, int | str)), None)


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be listed ({error.strerror})")


def _printable(name: str) -> str:
    """A file name as text, with backslash escapes for bytes that are not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def plain_name(name: str) -> str:
    """A class name for comparison: case, "_" and " " do not matter."""
    return name.replace("_", " ").casefold().strip()


def _synsets() -> dict[str, int]:
    """The positions of ImageNet's synsets, as "n01440764"."""
    from timm.data.imagenet_info import ImageNetInfo

    names: list[str] = ImageNetInfo("imagenet-1k").label_names()  # type: ignore[no-untyped-call]
    return {name: k for k, name in enumerate(names)}
