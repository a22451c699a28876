"""Small pictures of the images that a report shows."""

from __future__ import annotations

import base64
import io
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from PIL import Image

from transclip_fast.encode.pixels import decode
from transclip_fast.encode.sources import Source, open_source
from transclip_fast.encode.tars import Sample, is_tar, read_samples
from transclip_fast.encode.walk import path_of, utf8_name
from transclip_fast.errors import InputError, one_line
from transclip_fast.parallel import parallel_map
from transclip_fast.store.arrays import read_table
from transclip_fast.store.feature_shards import numbered

PATHS = ("path", "image_path")  # columns of metadata, the first that there is
STAMPS = ("size", "mtime_ns")  # columns that `encode` writes; a size alone may be anything
BLOCK = 64  # images read at a time, until there is no room for more
QUALITY = 75  # of a JPEG


@dataclass(frozen=True)
class Pictures:
    """Where the images of some rows are: row `r` is image `places[r]` of the source."""

    source: Source
    places: Mapping[int, int]
    sizes: Mapping[int, int]  # bytes of each row's image when it was encoded, where known
    suffixes: Mapping[int, str]  # as ".jpg", of the images in tars that `pictures_of` found

    def read(self, row: int, side: int) -> str:
        """A thumbnail of at most `side` x `side` pixels, a JPEG in base64; any error if damaged."""
        data = self.source.read(self.places[row])
        if self.sizes.get(row, len(data)) != len(data):
            raise InputError("not the image that was encoded")
        image = Image.fromarray(decode(data))
        image.thumbnail((side, side))
        content = io.BytesIO()
        image.save(content, "JPEG", quality=QUALITY)
        return base64.b64encode(content.getvalue()).decode()


def pictures_in(
    images: str, keys: Mapping[int, str | None], folder: Path | None = None
) -> Pictures:
    """
    The images of rows with these keys in a folder, list or tars, listed as `encode` does.

    They must have the sizes in the metadata of the feature `folder`, if it is there.
    """
    sizes = {} if folder is None else metadata_of(folder, sorted(keys))[1]
    source = open_source(images)
    place = {key: k for k, key in enumerate(source.keys)}
    places = {row: place[key] for row, key in keys.items() if key in place}
    return Pictures(source, places, sizes, {})


def pictures_of(folder: Path, keys: Mapping[int, str | None]) -> Pictures:
    """The images of rows with these keys, at the paths in the metadata of a feature folder."""
    rows = sorted(keys)
    paths, sizes = metadata_of(folder, rows)
    spans, refusals, suffixes = list[tuple[int, int]](), dict[int, str](), dict[int, str]()
    tars = {path: _in_tar(Path(path)) for path in {*paths.values()} if is_tar(Path(path))}
    for place, (row, path) in enumerate(paths.items()):
        if path not in tars:
            spans.append((0, _size(Path(path))))
            continue
        samples, refused = tars[path]
        if (sample := samples.get(str(keys[row]))) is None:
            spans.append((0, 0))
            refusals[place] = refused or "not in its tar any more"
        else:
            spans.append(sample.span)
            suffixes[row] = sample.suffix
    names = [str(keys[row]) for row in paths]
    source = Source("list", names, [*paths.values()], spans, refusals=refusals)
    places = {row: place for place, row in enumerate(paths)}
    return Pictures(source, places, sizes, suffixes)


def metadata_of(folder: Path, rows: Sequence[int]) -> tuple[dict[int, str], dict[int, int]]:
    """Path, and size if the metadata has one, of the images of sorted `rows`."""
    paths, sizes, start = dict[int, str](), dict[int, int](), 0
    for file in numbered(folder, "metadata").values():
        table = read_table(file, (*PATHS, *STAMPS))
        stop = start + table.num_rows
        here = rows[bisect_left(rows, start) : bisect_left(rows, stop)]
        column = next((name for name in PATHS if name in table.column_names), None)
        part = table.take(pa.array([row - start for row in here], pa.int64()))  # of no row, too
        if column is not None:
            found = zip(here, part.column(column).to_pylist(), strict=True)
            paths |= {row: path_of(path) for row, path in found if path is not None}
        if set(STAMPS) <= set(table.column_names):
            sizes |= zip(here, part.column("size").to_pylist(), strict=True)
        start = stop
    return paths, sizes


def thumbnails(
    pictures: Pictures | None, wanted: Collection[tuple[int, int]], room: int
) -> tuple[dict[int, str], Counter[str]]:
    """
    Thumbnails of rows, each with its side, until they fill `room` bytes; and why others are not.
    """
    found, missing = dict[int, str](), Counter[str]()
    if pictures is None:
        return found, missing
    order = [(row, side) for row, side in wanted if row in pictures.places]
    missing["not among the images"] += len(wanted) - len(order)

    def read(one: tuple[int, int]) -> tuple[str, str]:
        try:
            return pictures.read(*one), ""
        except Exception as error:  # noqa: BLE001 - decoders raise anything on damaged files
            return "", _reason(error)

    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        for (row, _), (picture, why) in zip(block, parallel_map(read, block), strict=True):
            if why:
                missing[why] += 1
            elif len(picture) > room:
                missing["the page would be too large"] += 1
            else:
                found[row] = picture
                room -= len(picture)
    return found, +missing


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return one_line(error) if isinstance(error, InputError) else "damaged"


def _in_tar(tar: Path) -> tuple[dict[str, Sample], str]:
    """The samples of a tar by key, or why there are none."""
    try:
        samples = read_samples(tar, Counter())
    except (InputError, OSError) as error:
        return {}, _reason(error)
    return {utf8_name(f"{tar.name}/{sample.key}"): sample for sample in samples}, ""


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except (OSError, ValueError):  # reading it fails later, and is counted
        return 0
