"""Where images come from: folders, lists of paths, webdataset tars, splits of a data set."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from transclip_fast.data.labels import UNKNOWN, label_positions, number_doubt
from transclip_fast.data.names import first_difference
from transclip_fast.encode.path_lists import check_any_there, check_repeats, read_path_list
from transclip_fast.encode.pixels import Box, suffixes
from transclip_fast.encode.tars import Sample, is_tar, read_samples, takes_in_next
from transclip_fast.encode.walk import HIDDEN, NO_SUFFIX, left_out_words, utf8_name, walk_images
from transclip_fast.errors import InputError, check_regular, one_line, reading
from transclip_fast.parallel import parallel_map
from transclip_fast.store.atomic import read_json
from transclip_fast.store.row_table import RowTable

MAX_FILE_BYTES = 2**30  # of an image
SPLITS = ("train", "val", "test")
HASHED_ROWS = 1024  # at a time, by one thread
# Errors of the machine or of a whole tar, not of the image: a later run can read it.
FATAL_ERRNOS = frozenset(
    {errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EBADMSG}
)


@dataclass
class Source:
    """The images to encode, in a fixed order; row r is the r-th image."""

    kind: str  # "folder", "list", "webdataset", "split" or "pairs"
    keys: list[str]  # name of each image within the source
    files: list[str]  # file that holds each image
    spans: list[tuple[int, int]] | None = None  # its offset and size there; None: the whole file
    labels: Sequence[float | str | None] | None = None  # positions, class names or synsets
    class_names: list[str] | None = None  # of a source that defines them; labels are positions
    refusals: dict[int, str] = field(default_factory=dict)  # why a row is known not to be readable
    left_out: str = ""  # what is there besides and is not read, in words
    own_keys: bool = False  # keys are a column of the list, no paths
    boxes: Mapping[int, Box] = field(default_factory=dict)  # what is cut from the image of a row
    by_content: bool = False  # images change with their content, not with size and time
    # (rows, 2) int64: size of each image, time of its file in nanoseconds; -1 if unknown.
    stamps: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        found = {}
        for file in dict.fromkeys(self.files):
            found[file] = (-1, -1)
            with failing_later():
                state = os.stat(file)
                found[file] = (state.st_size, state.st_mtime_ns)
        self.stamps = np.array([found[file] for file in self.files], np.int64).reshape(-1, 2)
        if self.spans is not None:
            self.stamps[:, 0] = [size for _, size in self.spans]

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, row: int) -> bytes:
        """
        The bytes of one image.

        Raises
        ------
        InputError
            The file is no regular one (a FIFO would wait, a device may never end), too large, or
            not as it was when it was listed; or the row is one of `refusals`.
        OSError
            A tar is not as it was: nothing is known of where its images are now. Or the image has
            others of its tar in it, which would be lost without a count.
        """
        if row in self.refusals:
            raise InputError(self.refusals[row])
        check_regular(self.files[row])
        with open(self.files[row], "rb") as file:
            offset, size = (0, os.fstat(file.fileno()).st_size)
            if self.spans is not None:
                offset, size = self.spans[row]
            if size > MAX_FILE_BYTES:
                raise InputError(f"has {size:,} bytes, more than {MAX_FILE_BYTES:,}; compress it")
            file.seek(offset)
            content = file.read(size)
            state = os.fstat(file.fileno())
        if (len(content), state.st_mtime_ns) != tuple(self.stamps[row].tolist()):
            if self.spans is not None:
                raise OSError(errno.ESTALE, f"{self.files[row]} changed after it was listed")
            raise InputError("changed after it was listed; run again")
        if self.spans is not None and takes_in_next(content):
            reason = "claims a size in its tar that takes in the next file; pack it again"
            raise OSError(errno.EBADMSG, reason)
        return content

    @functools.cached_property
    def contents(self) -> list[str]:
        """
        The sha256 of each image; of one that cannot be read, nothing.

        InputError if the machine fails to read one; a later run may not.
        """

        def hashed(rows: Sequence[int]) -> list[str]:
            found = []
            for row in rows:
                found.append("")
                try:
                    with failing_later():
                        found[-1] = hashlib.sha256(self.read(row)).hexdigest()
                except OSError as error:  # no fault of the folder that is written meanwhile
                    reason = f"{self.keys[row]}: {one_line(error)}; run again to continue"
                    raise InputError(reason) from error
            return found

        rows = range(len(self))
        parts = [rows[start : start + HASHED_ROWS] for start in rows[::HASHED_ROWS]]
        return [content for part in parallel_map(hashed, parts) for content in part]

    def table(self, labels: np.ndarray | None) -> RowTable:
        """The metadata of each row in a feature folder."""
        # Read from other folders later; not normalised, as a folder before ".." may be a link.
        paths = [utf8_name(os.path.join(os.getcwd(), file)) for file in self.files]
        contents = (lambda: self.contents) if self.by_content else None
        return RowTable(self.keys, paths, labels, self.stamps, contents, self.own_keys)

    def identity(self) -> dict[str, Any]:
        """The manifest's entry: kind, rows, hash of names and sizes."""
        digest = hashlib.sha256()
        for key, size in zip(self.keys, self.stamps[:, 0].tolist(), strict=True):
            digest.update(f"{key}\0{size}\0".encode())
        return {"kind": self.kind, "rows": len(self), "sha256": digest.hexdigest()}


def open_source(
    path: str | Path,
    *,
    labels_from_folders: bool = False,
    follow_links: bool = False,
    split: str | None = None,
    root: str | Path | None = None,
) -> Source:
    """
    List the images at a path, and warn about files that are left out.

    Parameters
    ----------
    path : path
        A folder of images (with sub-folders, in order of their paths; all whose suffix Pillow
        knows); a folder of .tar files or one .tar file (webdataset); or a .txt, .csv or .parquet
        list with a column `path` (a .txt has one path a line) and optionally `label` and `key`,
        paths relative to the list; or a .json of splits as CoOp has them, lists of
        [path, label, class name].
    labels_from_folders : bool
        The name of an image's first sub-folder is its label.
    follow_links : bool
        Also list the images behind links to folders.
    split : {"train", "val", "test"}, optional
        Of a .json of splits; "test" by default.
    root : path, optional
        Folder that the paths of a .json of splits start at; by default its own, or the one folder
        beside it that has the first image.

    Raises
    ------
    InputError
        Nothing there, no images, or a list, tar or split that cannot be read; a split's path that
        leads out of its folder; a parameter that is for another kind of source.
    """
    path = Path(path)
    if path.suffix.lower() != ".json" and (split or root):
        raise InputError(f"{path}: split and root are for a .json of splits; leave them out")
    if not os.path.exists(path):  # unlike Path.exists, no error for a name that is too long
        raise InputError(f"{path}: no such file or folder")
    tars = _tars_in(path) if path.is_dir() else []
    if (labels_from_folders or follow_links) and (tars or not path.is_dir()):
        raise InputError(
            f"{path}: labels_from_folders and follow_links are for a folder of images; leave them "
            "out"
        )
    if tars:
        source = _webdataset(tars, _beside_tars(path))
    elif path.is_dir():
        source = _folder(path, labels_from_folders, follow_links)
    else:
        source = _file(path, split, root)
    if not len(source):
        besides = f"; {source.left_out}" if source.left_out else ""
        raise InputError(
            f"{path}: holds no images that can be read here{besides}; name a folder or list of "
            ".jpg, .png, .webp or other images"
        )
    if len(source.refusals) == len(source):
        raise InputError(f"{path}: holds no image that can be read; {source.refusals[0]}")
    if source.left_out:
        warnings.warn(f"{path}: {source.left_out}", stacklevel=2)
    return source


@contextmanager
def failing_later() -> Iterator[None]:
    """Let errors of an image pass, as reading it fails later and is reported, but no others."""
    try:
        yield
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in FATAL_ERRNOS:
            raise


def resolve_labels(
    source: Source, names: Sequence[str], synsets: Sequence[str] | None = None
) -> np.ndarray | None:
    """
    Labels of a source as positions in `names`, (rows,) int64, -1 of rows without one.

    See `label_positions`, which raises InputError for a label that is none of the classes. But
    texts of a webdataset may be captions: if one is no class name, the result is None, with a
    warning. It is None without a word if the source has no labels.
    """
    labels = source.labels
    if labels is None:
        return None
    labels = [None if row in source.refusals else label for row, label in enumerate(labels)]
    own = source.class_names
    if own is not None and first_difference(own, names) is not None:
        # Positions among its own names.
        labels = [own[label] if isinstance(label, int) else label for label in labels]
    numbers = {label for label in labels if isinstance(label, int | float)} if own is None else ()
    if doubt := number_doubt(numbers, names):
        warnings.warn(f"labels: {doubt}", stacklevel=1)  # from one place, so that it is shown once
    try:
        found = label_positions(labels, names, source.keys.__getitem__, synsets)
    except InputError as error:
        if source.kind != "webdataset" or not any(isinstance(label, str) for label in labels):
            raise
        message = f"{error}; texts are taken for captions"
        warnings.warn(message, stacklevel=1)  # from one place, so that it is shown once
        return None
    return found if (found != UNKNOWN).any() else None


def _file(path: Path, split: str | None, root: str | Path | None) -> Source:
    check_regular(path)
    if is_tar(path):
        return _webdataset([path], Counter())
    if path.suffix.lower() in (".txt", ".csv", ".parquet"):
        return _list(path)
    if path.suffix.lower() == ".json":
        return _split(path, split or "test", root)
    raise InputError(
        f"{path}: expected a folder, a .tar, a .txt, .csv or .parquet list, or a .json of splits"
    )


def _folder(root: Path, labels_from_folders: bool, follow_links: bool) -> Source:
    found, left_out = walk_images(root, follow_links)
    keys = [key for key, _ in found]
    labels = None
    if labels_from_folders:
        for key in keys:
            if "/" not in key:
                raise InputError(f"{root / key}: is in no sub-folder, so it has no label")
        labels = [key.split("/", 1)[0] for key in keys]
    files = [file for _, file in found]
    return Source("folder", keys, files, labels=labels, left_out=left_out)


def _list(path: Path) -> Source:
    keys, paths, labels = read_path_list(path)
    files = [str(path.parent / name) for name in paths]
    check_any_there(path, paths, files)
    check_repeats(path, files, labels)
    return Source("list", keys or paths, files, labels=labels, own_keys=keys is not None)


def _split(path: Path, split: str, root: str | Path | None) -> Source:
    splits = read_json(path)
    lists = {name: splits[name] for name in SPLITS if isinstance(splits.get(name), list)}
    if split not in lists:
        raise InputError(f"{path}: has no split {split!r}, only {', '.join(lists) or 'none'}")
    names = _split_classes(path, lists)
    keys = [str(entry[0]) for entry in lists[split]]
    folder = first_root(path, keys) if root is None else Path(root)
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    files = [str(below(folder, key, path)) for key in keys]
    check_any_there(path, keys, files)
    labels = [int(entry[1]) for entry in lists[split]]
    check_repeats(path, files, labels)
    return Source("split", [utf8_name(key) for key in keys], files, None, labels, names)


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


def first_root(path: Path, keys: Sequence[str]) -> Path:
    """The folder of a list of images, or the one folder in it, with the first image."""
    folders = [path.parent, *sorted(entry for entry in path.parent.iterdir() if entry.is_dir())]
    found = [folder for folder in folders if keys and os.path.isfile(folder / keys[0])]
    if keys and len(found) != 1:
        where = " and ".join(map(str, found)) or f"neither {path.parent} nor a folder in it"
        has = "have" if len(found) > 1 else "has"
        raise InputError(f"{path}: {where} {has} {keys[0]}; name the folder with --root")
    return found[0] if found else path.parent


def below(folder: Path, key: str, path: Path) -> Path:
    """A file of a folder; InputError, about the list `path`, if `key` leads out of it."""
    file = folder / key
    try:
        inside = Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder))
    except ValueError as error:
        raise InputError(f"{path}: {key!r} is no path ({error})") from error
    if not inside:
        raise InputError(f"{path}: {key!r} leads out of {folder}")
    return file


def _webdataset(tars: Sequence[Path], left_out: Counter[str]) -> Source:
    samples, times = list[tuple[Path, Sample]](), dict[str, int]()
    for tar in tars:
        with reading(tar):
            times[str(tar)] = os.stat(tar).st_mtime_ns
        samples += [(tar, sample) for sample in read_samples(tar, left_out)]
    labels = [sample.label for _, sample in samples]
    source = Source(
        "webdataset",
        [utf8_name(f"{tar.name}/{sample.key}") for tar, sample in samples],
        [str(tar) for tar, _ in samples],
        [sample.span for _, sample in samples],
        labels if any(label is not None for label in labels) else None,
        refusals={row: s.refusal for row, (_, s) in enumerate(samples) if s.refusal is not None},
        left_out=left_out_words(left_out),
    )
    for file, time in zip(source.files, source.stamps[:, 1].tolist(), strict=True):
        if time != times[file]:
            raise InputError(f"{file}: changed while it was listed; run again")
    return source


def _tars_in(folder: Path) -> list[Path]:
    """The tars in a folder; hidden ones are of the system, as macOS writes beside each file."""
    found = (file for file in folder.iterdir() if is_tar(file) and file.name[0] != ".")
    return sorted(file for file in found if not file.is_dir())


def _beside_tars(folder: Path) -> Counter[str]:
    """What a folder of tars holds besides, by suffix."""
    left_out = Counter[str]()
    for entry in folder.iterdir():
        if entry.is_dir():
            suffix = "folders"
        else:
            suffix = HIDDEN if entry.name[0] == "." else entry.suffix.lower() or NO_SUFFIX
        if suffix in suffixes():
            raise InputError(f"{folder}: holds images and .tar files; name one of the .tar files")
        left_out[suffix] += suffix != ".tar"
    return left_out
